"""Means of sampling faster: those that change nothing, those that change rounding, and those that change images."""
