"""Adapters to sample with: low-rank adapters and learned words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sdmodule.components.adapter_file import read_tensors
from sdmodule.components.adapter_layouts import is_adapter, to_adapter
from sdmodule.components.adapter_weights import add_adapters
from sdmodule.components.checkpoint import Components
from sdmodule.components.folder_kinds import ADAPTER_FILES, EXPORT, PEFT_FILE, how_to_use, peft_folders
from sdmodule.components.learned_words import add_word
from sdmodule.components.lora_layers import (
    DORA,
    Adapter,
    attach_adapter,
    find_layers,
    is_attachable,
    is_dora,
    set_active_adapters,
)
from sdmodule.components.peft_layout import read_peft
from sdmodule.errors import SettingsError, build_settings, check_bool, check_number, choices
from sdmodule.families.family import LEARNED_WORDS
from sdmodule.io.redact import shorten_home

UNNAMED_WORD = "emb_params"
"""Key of a learned word in AUTOMATIC1111's web UI, which names the word after the file."""


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter file and how strongly it is applied.

    Args:
        path: a ``.safetensors`` file, or the export folder of a training run.
        scale: factor of the adapter's update; a negative one inverts it.

    Raises:
        SettingsError: for a value out of range.
    """

    path: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise SettingsError(f"adapters.path={self.path}: must be the path of a .safetensors file.")
        check_number("adapters.scale", self.scale, above=-1e4, below=1e4)

    @property
    def file(self) -> Path:
        """Path of the file; in a folder, the first that is found under a known name, or the folder if it is peft's.

        Raises:
            SettingsError: for a folder without one.
        """
        path = Path(self.path).expanduser()
        if not path.is_dir():
            return path.parent if path.name == PEFT_FILE else path
        for name in ADAPTER_FILES:
            if (path / name).is_file():
                return path / name
        if peft_folders(path):
            return path
        if use := how_to_use(path, self.path):
            raise SettingsError(f"adapters={self.path}: {use}.")
        if use := how_to_use(path / EXPORT, f"{self.path.rstrip('/')}/{EXPORT}"):
            raise SettingsError(f"adapters={self.path}: is the folder of a training; its {EXPORT}/ {use}.")
        raise SettingsError(
            f"adapters={self.path}: the folder holds none of {choices(ADAPTER_FILES)}; give the path of a file."
        )


def parse_adapters(adapters: Any) -> list[AdapterChoice]:
    """Parse the setting ``adapters``: one adapter or a list of them, each a path or ``{path: FILE, scale: 0.8}``.

    Raises:
        SettingsError: for anything else.
    """
    listed = [adapters] if isinstance(adapters, (str, Path, Mapping)) and adapters else adapters
    if listed and (not isinstance(listed, Sequence) or isinstance(listed, str)):
        raise SettingsError(f"adapters={adapters}: must be a path, or a list such as [{{path: FILE, scale: 0.8}}].")
    chosen = []
    for one in listed or []:
        if isinstance(one, (str, Path)):
            chosen.append(AdapterChoice(str(one)))
            continue
        if not isinstance(one, Mapping) or "path" not in one or one.keys() - {"path", "scale"}:
            raise SettingsError(f"adapters={one!r}: each entry must have the form {{path: FILE, scale: 0.8}}.")
        chosen.append(AdapterChoice(**dict(one)))
    return chosen


def use_adapters(parts: Components, chosen: Sequence[AdapterChoice], merged: bool) -> None:
    """Apply adapters to a model, in place and in order.

    Args:
        parts: the model.
        chosen: the files and their scales.
        merged: add them to the weights, which costs no time when sampling; otherwise they stay separate layers, where
            peft has layers that compute the same.

    Raises:
        SettingsError: if a file cannot be read or does not fit this model, which is then half-adapted: discard it.
    """
    adapters: dict[str, tuple[Adapter, float]] = {}
    for number, one in enumerate(chosen):
        tensors, header = (read_peft if one.file.is_dir() else read_tensors)(one.file)
        if is_adapter(tensors):
            adapters[adapter_name(number)] = (to_adapter(tensors, header, one.file, parts), one.scale)
        else:
            _add_word(parts, one, tensors)
    if merged or not _can_be_attached(list(adapters.values()), parts):
        add_adapters(parts, list(adapters.values()))
        return
    for name, (adapter, scale) in adapters.items():
        attach_adapter(parts, adapter, scale, name)
    set_active_adapters(parts, list(adapters))


def adapter_name(number: int) -> str:
    """The name that peft has for the adapter that is the file of this number."""
    return f"adapter_{number}"


def _can_be_attached(adapters: Sequence[tuple[Adapter, float]], parts: Components) -> bool:
    """Whether peft's layers beside the weights give what the adapters say; otherwise they become part of the weights.

    Its layers of different methods exclude each other, and those of DoRA give weights their lengths at any scale, and
    beside any other adapter.
    """
    one_method = len({adapter.method for adapter, _ in adapters}) <= 1
    changed = any(adapter.method == DORA and (scale != 1 or len(adapters) > 1) for adapter, scale in adapters)
    return one_method and not changed and all(is_attachable(adapter, parts) for adapter, _ in adapters)


def _add_word(parts: Components, one: AdapterChoice, tensors: Mapping[str, Tensor]) -> None:
    parts.family.check_supports(LEARNED_WORDS, f"adapters={one.path}: a learned word", parts.source)
    width = parts.text_encoder.config.hidden_size
    name, vectors = next(iter(tensors.items())) if len(tensors) == 1 else ("", None)
    if vectors is None or vectors.ndim not in (1, 2):
        raise SettingsError(
            f"adapters={one.path}: neither a low-rank adapter (keys such as unet.… or lora_unet_…) nor a learned word "
            "(one tensor); give one of these."
        )
    if vectors.shape[-1] != width or (vectors.ndim == 2 and not 1 <= len(vectors) <= 75):
        raise SettingsError(
            f"adapters={one.path}: the learned word has the shape {tuple(vectors.shape)}, and this model takes 1 to 75 "
            f"vectors of {width}; give one that was learned on a model of this architecture."
        )
    if one.scale != 1:
        raise SettingsError(f"adapters={one.path}: scale={one.scale} does not apply to a learned word; leave it out.")
    placeholder = one.file.stem if name == UNNAMED_WORD else name
    vectors = vectors.float().reshape(-1, width)
    add_word(placeholder, vectors, parts.tokenizer, parts.text_encoder).requires_grad_(False)


@dataclass(frozen=True)
class AdapterSettings:
    """The adapters to sample with.

    Args:
        files: which, in order.
        merge: add them to the weights, which costs no time in sampling; equal but for rounding.

    Raises:
        SettingsError: for a value out of range.
    """

    files: Sequence[AdapterChoice] = ()
    merge: bool = False

    def __post_init__(self) -> None:
        check_bool("merge_adapters", self.merge)

    @classmethod
    def parse(cls, adapters: Any) -> AdapterSettings:
        """Adapters as a configuration names them: ``{"files": [{"path": …, "scale": …}], "merge": …}``, or the files.

        Each file may be given as a path alone, and one file without a list.

        Raises:
            SettingsError: for anything else.
        """
        given = adapters if isinstance(adapters, Mapping) and "path" not in adapters else {"files": adapters}
        own = build_settings(cls, "adapters", given)
        return replace(own, files=tuple(parse_adapters(own.files)))  # type: ignore[arg-type]

    def rescaled(self, parts: Components, scales: Sequence[float]) -> AdapterSettings:
        """These adapters at other scales, to which a model's layers are set, in place.

        Args:
            parts: the model, on which they are.
            scales: one for each file, in order; an adapter at 0 is turned off.

        Raises:
            SettingsError: for another number of scales, or if the scale of a file cannot be changed; nothing is then.
        """
        if isinstance(scales, str) or not isinstance(scales, Sequence) or len(scales) != len(self.files):
            raise SettingsError(
                f"set_adapters({scales!r}): {len(self.files)} adapters are loaded; give a list of one scale for each."
            )
        files = [replace(one, scale=scale) for one, scale in zip(self.files, scales, strict=True)]
        attached = {name: find_layers(parts, name) for name in map(adapter_name, range(len(files)))}
        active = [name for name, one in zip(attached, files, strict=True) if one.scale and attached[name]]
        for one, before, layers in zip(files, self.files, attached.values(), strict=True):
            if one.scale != before.scale and not layers:
                raise SettingsError(
                    f"set_adapters: {one.path} is a learned word or part of the weights, so its scale stays "
                    f"{before.scale}; load the model anew for another."
                )
            if is_dora(layers) and one.scale and (one.scale != 1 or len(active) > 1):
                raise SettingsError(
                    f"set_adapters: {one.path} is a DoRA, which can be switched between 0 and 1, with no other adapter "
                    f"beside it; for scale={one.scale}, load the model anew."
                )
        for (name, layers), one in zip(attached.items(), files, strict=True):
            for layer in layers:
                layer.set_scale(name, one.scale)
        set_active_adapters(parts, active)
        own = replace(self, files=tuple(files))
        parts.origin |= {"adapters": own.plain()["files"]}
        return own

    def check_saved(self) -> None:
        """Check that what is written of the model holds them.

        Raises:
            SettingsError: if they are layers beside the weights.
        """
        if self.files and not self.merge:
            raise SettingsError(
                "adapters: are not part of the weights; set merge_adapters=true to write them together."
            )

    def plain(self) -> dict[str, Any]:
        """In plain types, with ``~`` for the home folder; `parse` reads it."""
        files = [{"path": shorten_home(one.path), "scale": one.scale} for one in self.files]
        return {"files": files, "merge": self.merge}

    def metadata(self) -> dict[str, Any]:
        """What the metadata of an image says of its adapters."""
        return {"adapters": self.plain()["files"], "merge_adapters": self.merge}
