"""Data modules: captioned images for training, requests for sampling."""
