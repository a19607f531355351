"""Files: images and their metadata, atomic writes, run folders and reports."""
