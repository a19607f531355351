"""What the denoiser is given beside the latents: text embeddings, masks, control images."""
