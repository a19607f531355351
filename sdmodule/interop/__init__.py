"""Files that other Stable Diffusion tools write and read."""
