"""Fingerprints: short hashes of content, the same wherever it is stored and whatever its name."""

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
"""Bytes of a fingerprint: among a billion contents, two collide with a probability of about 1e-21."""

IGNORED_CONFIG = ("transformers_version", "dtype", "torch_dtype")
"""Entries of a model's configuration that do not change what it computes."""


def fingerprint(*texts: object) -> str:
    """The fingerprint of texts, or of the ``str`` of other objects."""
    return hashlib.blake2b(json.dumps([str(text) for text in texts]).encode(), digest_size=SIZE).hexdigest()


def file_fingerprint(path: ImageFile) -> str:
    """The fingerprint of a file's bytes.

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
    """The fingerprint of a model's weights and configuration."""
    settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in IGNORED_CONFIG}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=SIZE)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
