"""Layers that run faster on a CPU than torch's own."""
