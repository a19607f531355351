"""Token merging for Stable Diffusion (Bolya and Hoffman 2023): fewer tokens in the UNet's attention."""
