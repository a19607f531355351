"""Short names of contents: what is the same has the same one, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdmodule.errors import SettingsError
from sdmodule.io.image_files import ImageFile

SIZE = 16
"""Bytes of a fingerprint: two of a billion contents share one with a probability of 1e-21."""

PASSING = ("transformers_version", "dtype", "torch_dtype")
"""Entries of a model's configuration that say who wrote it, not what it computes."""


def fingerprint(*texts: object) -> str:
    """The fingerprint of texts, or of what is written as such."""
    return hashlib.blake2b(json.dumps([str(text) for text in texts]).encode(), digest_size=SIZE).hexdigest()


def file_fingerprint(path: ImageFile) -> str:
    """The fingerprint of a file's bytes, the same wherever they are stored.

    Raises:
        SettingsError: if it cannot be read.
    """
    try:
        if not isinstance(path, Path):
            return hashlib.blake2b(path.read(), digest_size=SIZE).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=SIZE)).hexdigest()
    except OSError as error:
        raise SettingsError(f"data: {path} cannot be read ({error.strerror}); replace or remove it.") from error


def model_fingerprint(model: nn.Module, config: Mapping[str, Any]) -> str:
    """The fingerprint of a model's weights and of the settings that they are used with."""
    settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in PASSING}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=SIZE)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
