"""Which images of a predict run exist already, so that ``resume=true`` samples only the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdmodule.errors import SettingsError
from sdmodule.io.png_metadata import read_metadata
from sdmodule.io.run_folder import IMAGES
from sdmodule.sampling.requests import SampleRequest, image_name, request_metadata

NOT_COMPARED = frozenset({"seconds", "device", "software", "batch_size", "batch_row", "family"})
"""Metadata that say how an image was computed, or follow from others: a resumed run may differ in them."""


def find_finished(
    folder: Path, requests: Sequence[SampleRequest], metadata: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """Records of the images that an earlier run finished, by index; a corrupt image counts as missing.

    The metadata in the images decide, not ``predictions.jsonl``: a run that was killed may not have written its
    records.

    Args:
        folder: folder of the earlier run.
        requests: the requests of this run.
        metadata: the settings of this run that all its images share.

    Raises:
        SettingsError: if an image in the folder was requested with other settings, or is not requested at all.
    """
    planned = {image_name(request): request for request in requests}
    finished = {}
    for file in sorted((folder / IMAGES).glob("*.png")):
        name = f"{IMAGES}/{file.name}"
        try:
            found = read_metadata(file)
        except (SettingsError, OSError):
            continue
        if name not in planned:
            raise SettingsError(
                f"resume=true: output_dir={folder} contains {name}, which this run does not request; give the prompts "
                "and the seed of the run that was started there, or another output_dir."
            )
        _check_same(folder, name, found, {**request_metadata(planned[name]), **metadata})
        finished[planned[name].index] = {"file": name, **found}
    return finished


def _check_same(folder: Path, name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in dict.fromkeys((*wanted, *found)):
        if key not in NOT_COMPARED and found.get(key) != wanted.get(key):
            raise SettingsError(
                f"resume=true: {name} in output_dir={folder} has {key}={found.get(key)!r}, but this run has "
                f"{key}={wanted.get(key)!r}; give the settings of the run that was started there, or another "
                "output_dir."
            )
