"""Adapters that a model samples with: of low rank, and learned words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sdmodule.components.adapter_file import DIFFUSERS_FILE, KOHYA_FILE, is_adapter, read_tensors, to_adapter
from sdmodule.components.checkpoint import Components
from sdmodule.components.learned_words import EMBEDDING_FILE, add_word
from sdmodule.components.lora_layers import LOHA, LOKR, Adapter, attach_adapter, make_active, merge
from sdmodule.errors import SettingsError, build_settings, check_bool, choices
from sdmodule.io.redact import shorten_home

WHOLE = "emb_params"
"""What AUTOMATIC1111's web UI calls the vectors of a word, whose name is then the file's."""


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter to sample with.

    Args:
        path: a ``.safetensors`` file, or the folder that a training exported.
        scale: how much it counts; below 0 it is turned round.

    Raises:
        SettingsError: for a value out of range.
    """

    path: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise SettingsError(f"adapters: path={self.path} is no path; give one of a .safetensors file.")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not abs(self.scale) < 1e4:
            raise SettingsError(f"adapters: scale={self.scale} is not allowed; give a number such as 0.8.")

    @property
    def file(self) -> Path:
        """The file itself.

        Raises:
            SettingsError: for a folder without one.
        """
        place = Path(self.path).expanduser()
        if not place.is_dir():
            return place
        names = (DIFFUSERS_FILE, KOHYA_FILE, EMBEDDING_FILE)
        for name in names:
            if (place / name).is_file():
                return place / name
        raise SettingsError(f"adapters: {self.path} holds none of {choices(names)}; give the path of a file.")


def parse_adapters(adapters: Sequence[Mapping[str, Any]] | None) -> list[AdapterChoice]:
    """Adapters as a configuration names them.

    Raises:
        SettingsError: for anything else than a list of mappings with ``path`` and ``scale``.
    """
    if isinstance(adapters, str):
        raise SettingsError(f"adapters={adapters} is no list; give adapters=[{{path: {adapters}}}].")
    chosen = []
    for one in adapters or []:
        if not isinstance(one, Mapping) or "path" not in one or one.keys() - {"path", "scale"}:
            raise SettingsError(f"adapters has {one!r}; each is {{path: FILE, scale: 0.8}}.")
        chosen.append(AdapterChoice(**dict(one)))
    return chosen


def use_adapters(parts: Components, chosen: Sequence[AdapterChoice], merged: bool) -> None:
    """Put adapters on a model, in place, in order.

    Args:
        parts: the model.
        chosen: which, and how much each counts.
        merged: add them to the weights, which costs no time in sampling; otherwise they stand beside them.

    Raises:
        SettingsError: for a file that cannot be read or does not belong to this model; the model cannot be used then.
    """
    beside: list[tuple[str, Adapter]] = []
    for number, one in enumerate(chosen):
        tensors, header = read_tensors(one.file)
        if not is_adapter(tensors):
            _add_word(parts, one, tensors)
            continue
        adapter = to_adapter(tensors, header, one.file, parts)
        if not merged and beside and (kinds := {adapter.method, beside[0][1].method}) & {LOHA, LOKR} and len(kinds) > 1:
            raise SettingsError(
                f"adapters: {choices(kinds)} cannot stand beside the same weights; set merge_adapters=true."
            )
        name = f"adapter_{number}"
        attach_adapter(parts, adapter, one.scale, name)
        if merged:
            merge(parts, name)
        else:
            beside.append((name, adapter))
    make_active(parts, [name for name, _ in beside])


def _add_word(parts: Components, one: AdapterChoice, tensors: Mapping[str, Tensor]) -> None:
    width = parts.text_encoder.config.hidden_size
    name, vectors = next(iter(tensors.items())) if len(tensors) == 1 else ("", None)
    if vectors is None or vectors.ndim not in (1, 2):
        raise SettingsError(
            f"adapters: {one.path} is neither an adapter of low rank (keys such as unet.… or lora_unet_…) nor a "
            "learned word (one tensor)."
        )
    if vectors.shape[-1] != width or (vectors.ndim == 2 and not 1 <= len(vectors) <= 75):
        raise SettingsError(
            f"adapters: the word of {one.path} has the shape {tuple(vectors.shape)} and this model takes 1 to 75 "
            f"vectors of {width}; give one that was learned on a model of this architecture."
        )
    if one.scale != 1:
        raise SettingsError(f"adapters: {one.path} is a learned word, which has no scale; leave scale={one.scale} out.")
    placeholder = one.file.stem if name == WHOLE else name
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
    def parse(cls, adapters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> AdapterSettings:
        """Adapters as a configuration names them: ``{"files": [{"path": …, "scale": …}], "merge": …}``, or the list.

        Raises:
            SettingsError: for anything else.
        """
        given = adapters if isinstance(adapters, Mapping) else {"files": adapters}
        own = build_settings(cls, "adapters", given)
        return replace(own, files=tuple(parse_adapters(own.files)))  # type: ignore[arg-type]

    def plain(self) -> dict[str, Any]:
        """In plain types, with ``~`` for the home folder; `parse` reads it."""
        files = [{"path": shorten_home(one.path), "scale": one.scale} for one in self.files]
        return {"files": files, "merge": self.merge}

    def metadata(self) -> dict[str, Any]:
        """What the metadata of an image says of its adapters."""
        return {"adapters": self.plain()["files"], "merge_adapters": self.merge}
