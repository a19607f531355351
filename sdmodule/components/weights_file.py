"""Named tensors in a single file: safetensors, or a pickle of which only the weights are loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sdmodule.errors import SettingsError

Weights = dict[str, torch.Tensor]

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)


class _CallbackKey:
    """Placeholder for a class that old `.ckpt` files use as the key of a callback's state and never call."""


SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_CallbackKey, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
]


def read_weights(path: Path) -> Weights:
    """Map the tensors of a file into memory; pages are read on use.

    Raises:
        SettingsError: if it is missing, corrupt, of another kind, or a pickle of more than weights.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: not found; give the path of a .safetensors or .ckpt file.")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise SettingsError(f"{path}: corrupt or incomplete ({error}); download or export it again.") from error
    if suffix in PICKLES:
        return _read_pickle(path)
    raise SettingsError(f"{path}: unknown suffix {suffix}; give a .safetensors or .ckpt file.")


def read_nested_weights(path: Path, sections: Sequence[str]) -> dict[str, Weights]:
    """The tensors of a file in sections: dictionaries of a pickle, or keys of safetensors that begin with their names.

    Raises:
        SettingsError: as `read_weights` does.
    """
    if path.suffix.lower() not in PICKLES:
        flat = read_weights(path)
        starts = {name: f"{name}." for name in sections}
        return {
            name: {key.removeprefix(start): value for key, value in flat.items() if key.startswith(start)}
            for name, start in starts.items()
        }
    saved = _load_pickle(path)
    return {name: _tensors(saved.get(name, {}) if isinstance(saved, dict) else {}) for name in sections}


def read_header(path: Path) -> dict[str, str]:
    """What a file that `read_weights` has read says of itself; only safetensors do."""
    if path.suffix.lower() != ".safetensors":
        return {}
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def _read_pickle(path: Path) -> Weights:
    saved = _load_pickle(path)
    while isinstance(saved, dict) and "state_dict" in saved:
        saved = saved["state_dict"]
    if not isinstance(saved, dict):
        raise SettingsError(f"{path}: holds a {type(saved).__name__} instead of named weights; give a full checkpoint.")
    return _tensors(saved)


def _tensors(saved: Any) -> Weights:
    pairs = saved.items() if isinstance(saved, dict) else ()
    return {key: value for key, value in pairs if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a corrupt or hostile pickle may raise anything
        raise SettingsError(
            f"{path}: cannot be loaded as weights only, since it is corrupt or wants to run code, which is refused; "
            "give a .safetensors version of it."
        ) from error
