"""What a start has learned about a source of images, kept in Arrow columns from run to run."""
