"""The denoising loss, tuning methods, optimizers, and exact resume."""
