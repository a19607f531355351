"""Faster sampling: options that keep the bits, options that change rounding, and options that change the image."""
