"""What experiment trackers are told, each in its own way."""
