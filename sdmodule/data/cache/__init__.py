"""Latents and text embeddings that are computed once and read from disk."""
