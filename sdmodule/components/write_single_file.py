"""Write a checkpoint as a single file in the original layout, with the metadata of modelspec.

The file has all weights; web UIs take it alone. A folder beside it has the configurations and the tokenizers, which
diffusers takes as ``config`` and `load_single_file` finds by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sdmodule.components.checkpoint import Components
from sdmodule.components.folder_kinds import SINGLE_FILE
from sdmodule.components.learned_words import check_no_words
from sdmodule.components.load_network import UnfitWeights
from sdmodule.components.modelspec import modelspec
from sdmodule.components.original_layout import to_original
from sdmodule.components.save import megabytes, save_config, save_configs
from sdmodule.components.weights_file import Weights
from sdmodule.errors import SettingsError
from sdmodule.io.atomic import atomic_write
from sdmodule.io.progress import LONG_TASK, progress


def save_single_file(parts: Components, folder: str | Path, dtype: str = "float32") -> None:
    """Write ``model.safetensors`` with all weights as ``dtype``, and their configurations to ``model/``.

    Raises:
        SettingsError: for a network with layers that the original implementation does not have, and if a word was added
            to a text encoder.
    """
    check_no_words(encoder for _, encoder in parts.text_encoders)
    file = Path(folder) / SINGLE_FILE
    save_configs(parts, file.with_suffix(""))
    weights: Weights = {}
    sizes = {name: megabytes(network, dtype) for name, network in parts.networks.items()}
    with progress(sum(sizes.values()), "writing weights, in MB", delay=LONG_TASK) as on_done:
        for name, network in parts.networks.items():
            weights |= _original_weights(name, network, parts.family.original_prefixes[name], dtype)
            on_done(sizes[name] // 2)  # the other half is writing
        weights |= {mark: torch.zeros(0, dtype=getattr(torch, dtype)) for mark in _marks(parts.scheduler.config)}
        _save(weights, file, modelspec(parts, weights))
        on_done(sum(size - size // 2 for size in sizes.values()))


def save_single_vae(vae: Any, folder: str | Path, dtype: str = "float32") -> None:
    """Write ``vae.safetensors``, which web UIs take as a VAE, and its configuration to ``vae/``."""
    save_config("vae", vae, Path(folder) / "vae")
    _save(_original_weights("vae", vae, "", dtype), Path(folder) / "vae.safetensors", {})


def _save(weights: Weights, file: Path, metadata: dict[str, str]) -> None:
    with atomic_write(file) as aside:
        save_file(weights, aside, metadata={"format": "pt", **metadata})


def _original_weights(name: str, network: Any, prefix: str, dtype: str) -> Weights:
    try:
        own = to_original(name, network)
    except UnfitWeights as error:
        raise SettingsError(f"layout=single_file: {error}, which this {name} has; use layout=diffusers.") from error
    wanted = getattr(torch, dtype)
    return {f"{prefix}{key}": value.detach().to("cpu", wanted).contiguous() for key, value in own.items()}


def _marks(scheduler: Any) -> list[str]:
    """Keys without values, by which other tools know what is predicted."""
    if scheduler.prediction_type != "v_prediction":
        return []
    return ["v_pred", "ztsnr"] if scheduler.get("rescale_betas_zero_snr") else ["v_pred"]
