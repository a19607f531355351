"""Files: images, metadata, reports, atomic writes."""
