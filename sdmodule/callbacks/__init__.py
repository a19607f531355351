"""What happens around training and sampling, one callback a file."""
