"""The equations of diffusion models: noising, targets, loss weighting, guidance and the denoising loop."""
