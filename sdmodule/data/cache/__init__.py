"""Latents and text embeddings that are computed once."""
