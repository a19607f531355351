"""Synthetic data that needs no download."""
