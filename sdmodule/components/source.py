"""Where a checkpoint is read from: shipped with the package, a diffusers folder, a hub id, or a single file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from sdmodule.components.folder_kinds import INDEX, not_a_checkpoint, read_index
from sdmodule.components.weights_file import SUFFIXES
from sdmodule.errors import SettingsError, check_path, choices
from sdmodule.families.family import Family
from sdmodule.families.recognize import STABLE_DIFFUSION, recognize_family

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = {"tiny": "tiny", "tiny-inpaint": "tiny"}
"""Checkpoints shipped with the package, and for each the one that has the parts missing from its folder."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A local folder or a hub repository that parts are read from.

    Attributes:
        location: the folder, or the hub id.
        setting: how the user named it, such as ``pretrained=tiny``, for messages.
        revision: branch, tag or commit of a hub id.
        variant: which weights, such as ``fp16``.
        index: what the index of a whole checkpoint says.
        family: the family of a whole checkpoint.
    """

    location: str
    setting: str
    revision: str | None = None
    variant: str | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    family: Family = STABLE_DIFFUSION


def is_single_file(pretrained: str) -> bool:
    """Whether a checkpoint is named by the path of a file in the original layout."""
    return Path(pretrained).suffix.lower() in SUFFIXES


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name`` of a hub repository."""
    return _HUB_ID.fullmatch(name) is not None


def local_folder(pretrained: str) -> Path:
    """Folder of a shipped checkpoint, or the path that was given; it may not exist."""
    return ASSETS / pretrained if pretrained in EMBEDDED else Path(pretrained).expanduser()


def find_source(
    pretrained: str,
    revision: str | None = None,
    variant: str | None = None,
    *,
    whole: bool = True,
    key: str = "pretrained",
) -> Source:
    """Resolve a name to a shipped checkpoint, a local folder or a hub repository.

    Args:
        pretrained: what the user gave.
        revision: branch, tag or commit of a hub id.
        variant: which weights, such as ``fp16``.
        whole: a folder must be a whole checkpoint, with a ``model_index.json``.
        key: the setting that named it, for messages.

    Raises:
        SettingsError: if it is none of them, or the hub cannot be reached.
    """
    check_path(key, pretrained)
    folder, setting = local_folder(pretrained), f"{key}={pretrained}"
    if folder.is_dir():
        if revision:
            raise SettingsError(
                f"revision={revision}: {key}={pretrained} is a folder, without revisions; leave it out."
            )
        if whole and not (folder / INDEX).is_file():
            raise not_a_checkpoint(folder, pretrained, key)
        return _with_family(Source(str(folder), setting, None, variant), folder / INDEX, whole)
    if folder.is_file():
        raise SettingsError(
            f"{key}={pretrained}: is a file of another kind; give {choices(SUFFIXES)}, or a diffusers folder."
        )
    if not is_hub_id(pretrained) or pretrained.startswith("."):
        raise SettingsError(
            f"{key}={pretrained}: not found; give {choices(EMBEDDED)}, a diffusers folder, a hub id such as "
            "owner/name, or a .safetensors or .ckpt file."
        )
    index = try_to_load_from_cache(pretrained, INDEX, revision=revision)
    if not isinstance(index, str):
        index = _index_from_hub(pretrained, revision, key)
    return _with_family(Source(pretrained, setting, revision, variant), Path(index), whole)


def _with_family(source: Source, index: Path, whole: bool) -> Source:
    """The source of a whole checkpoint with what its index says; that of a part may lack an index."""
    if not whole:
        return source
    said = read_index(index, source.setting)
    return replace(source, index=said, family=recognize_family(said, source.setting))


def folder_with_part(source: Source, part: str) -> str:
    """Location of one part: a shipped checkpoint may keep it in the folder of another."""
    folder = Path(source.location)
    if folder.parent != ASSETS or (folder / part).is_dir():
        return source.location
    return str(ASSETS / EMBEDDED[folder.name])


def _index_from_hub(pretrained: str, revision: str | None, key: str) -> str:
    """A checkpoint's index from the hub, asked for once first: without a network, a download retries half a minute."""
    try:
        get_hf_file_metadata(hf_hub_url(pretrained, INDEX, revision=revision))
        return hf_hub_download(pretrained, INDEX, revision=revision)
    except Exception as error:  # of the hub, the system, or whatever HTTP client huggingface_hub uses today
        raise SettingsError(
            f"{key}={pretrained}: neither a local folder nor available on the hub ({type(error).__name__}); "
            f"if the weights are on disk, give their folder: {key}=/path/to/folder."
        ) from error
