"""What the denoiser is told: prompts as embeddings."""
