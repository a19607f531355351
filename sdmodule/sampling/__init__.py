"""From requests to images."""
