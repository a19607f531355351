"""The folder of a predict run: what lies where, and what of it is done."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from sdmodule.errors import SettingsError, unwritable
from sdmodule.io.atomic import atomic_write, atomic_write_text
from sdmodule.io.png_metadata import read_metadata
from sdmodule.sampling.requests import SampleRequest

IMAGES, INPUTS, RECORDS, TIMINGS = "images", "inputs", "predictions.jsonl", "timings.json"

NOT_COMPARED = frozenset({"seconds", "device", "software", "batch_size", "batch_row"})
"""Facts that tell how an image came about and not what was asked for: two runs may differ in them."""


def image_name(request: SampleRequest) -> str:
    """Where a request's image lies in the folder of its run."""
    return f"{IMAGES}/{request.index:05d}-{request.seed}.png"


def request_metadata(request: SampleRequest) -> dict[str, Any]:
    """What was asked of one image, in plain types; an image to repaint is told by its content."""
    metadata: dict[str, Any] = {
        "index": request.index,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
    }
    return metadata | {key: input_name(given) for key, given in request.inputs().items()}


def input_name(image: Image.Image) -> str:
    """Where an image or a mask that was given lies in the folder of a run: under the hash of its pixels."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode() + image.tobytes(), digest_size=8)
    return f"{INPUTS}/{digest.hexdigest()}.png"


def set_aside(folder: Path) -> Path | None:
    """Put the images and records of an earlier run aside, under the next number that is free, and say where.

    Raises:
        SettingsError: if the folder cannot be written.
    """
    images = folder / IMAGES
    if not any(images.glob("*.png")):
        return None
    records = folder / RECORDS
    for number in itertools.count(1):
        places = folder / f"{IMAGES}-{number}", folder / f"{records.stem}-{number}{records.suffix}"
        if not any(place.exists() for place in places):
            break
    try:
        images.rename(places[0])
        if records.exists():
            records.rename(places[1])
        return places[0]
    except OSError as error:
        raise unwritable(folder, error.strerror) from error


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of records, one at a time; one that a killed run left half-written is passed over."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            if (record := _parsed(line)) is not None:
                yield record


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode(errors="replace"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def gather_records(files: Sequence[Path]) -> None:
    """Put the lines of several files into the first, in the order of their images; of an image's the last one.

    Of the lines only their places are in memory: a run may have any number of images.
    """
    places: dict[int, tuple[Path, int]] = {}
    for file in filter(Path.is_file, files):
        start = 0
        with file.open("rb") as lines:
            for line in lines:
                if (record := _parsed(line)) is not None:
                    places[record["index"]] = file, start
                start += len(line)
    with ExitStack() as stack:
        aside = stack.enter_context(atomic_write(files[0]))
        gathered = stack.enter_context(aside.open("wb"))
        opened = {file: stack.enter_context(file.open("rb")) for file in {file for file, _ in places.values()}}
        for index in sorted(places):
            file, start = places[index]
            opened[file].seek(start)
            gathered.write(opened[file].readline().rstrip(b"\n") + b"\n")


def to_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON; no letter in it ends the line early."""
    line = json.dumps(record, ensure_ascii=False)
    for end in "\u0085\u2028\u2029":
        line = line.replace(end, f"\\u{ord(end):04x}")
    return line + "\n"


def write_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records in the order of their images."""
    atomic_write_text(file, "".join(to_line(record) for record in sorted(records, key=lambda record: record["index"])))


def find_finished(
    folder: Path, requests: Sequence[SampleRequest], metadata: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """The records of the images that an earlier run has left, by index; a broken image counts as not made.

    The images are what is believed, and their own text, since a killed run may not have come to write its records.

    Args:
        folder: of the earlier run.
        requests: what this run is to make.
        metadata: its settings.

    Raises:
        SettingsError: if there is an image in the folder that this run would make otherwise, or not at all.
    """
    planned = {image_name(request): request for request in requests}
    done = {}
    for file in sorted((folder / IMAGES).glob("*.png")):
        name = f"{IMAGES}/{file.name}"
        try:
            found = read_metadata(file)
        except (SettingsError, OSError):
            continue
        if name not in planned:
            raise SettingsError(
                f"resume=true found {name} in output_dir={folder}, which this run does not ask for; give the prompts "
                "and the seed of the run that was begun there, or another output_dir."
            )
        _check_same(folder, name, found, {**request_metadata(planned[name]), **metadata})
        done[planned[name].index] = {"file": name, **found}
    return done


def _check_same(folder: Path, name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in dict.fromkeys((*wanted, *found)):
        if key not in NOT_COMPARED and found.get(key) != wanted.get(key):
            raise SettingsError(
                f"resume=true found {name} in output_dir={folder} with {key}={found.get(key)!r}, and this run has "
                f"{key}={wanted.get(key)!r}; give the settings of the run that was begun there, or another output_dir."
            )
