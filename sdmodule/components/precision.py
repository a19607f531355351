"""In which precision a network computes, and its latents are kept."""

from __future__ import annotations

from typing import Any

import torch


def computes_in(network: Any) -> torch.dtype:
    """What a network computes in: the dtype of its weights, or that of autocast."""
    device = network.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else network.dtype


def latents_dtype(network: Any) -> torch.dtype:
    """What the latents of a denoiser are kept in between its steps: the dtype of its weights, on a GPU float32.

    Each step of a scheduler adds a little to the latents, which 16 bits round off; on a GPU float32 costs nothing here.
    On a CPU images stay what they were in earlier releases.
    """
    return network.dtype if network.device.type == "cpu" else torch.float32
