"""Packing: any data set as tar shards with an index, in parallel, and resumed where it was killed.

Which samples a shard holds, and in which order, is a function of the source and the seed; so are its bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule.data.buckets import Size
from sdmodule.data.example import CaptionStyle, Example, View
from sdmodule.data.streaming.encoding import Encoder
from sdmodule.data.streaming.index import INDEX, ShardIndex, parse_index
from sdmodule.data.streaming.remote import DISK_ERRORS
from sdmodule.data.streaming.set import PACKED_CAPTION
from sdmodule.data.streaming.tar_samples import CONTROL, ENCODED, MASK
from sdmodule.errors import SettingsError, unwritable
from sdmodule.io.atomic import atomic_write, atomic_write_text, remove_leftovers
from sdmodule.io.fingerprint import file_fingerprint, fingerprint
from sdmodule.io.image_files import FORMAT_SUFFIXES, ImageFile, identity, open_image, upright_size
from sdmodule.io.images import to_images
from sdmodule.io.progress import progress

RECORDS = ".packing"
"""Folder with a record of each complete shard; deleted at the end."""

TRAINING, VALIDATION = "train", "val"


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write.

    Attributes:
        name: its file.
        part: ``train`` or ``val``.
        bucket: height and width that its images are for; None without buckets.
        indices: numbers of its samples in their data set.
        first: number of its first sample among those of its part, for the names of files.
    """

    name: str
    part: str
    bucket: Size | None
    indices: np.ndarray
    first: int


def plan_shards(parts: dict[str, Any], samples: int, seed: int, buckets: bool) -> list[ShardPlan]:
    """Which samples go into which shard; those for training are shuffled, within their bucket.

    Args:
        parts: data sets by name.
        samples: number of samples in a shard.
        seed: of the order.
        buckets: give each bucket shards of its own, in training.
    """
    plans = []
    for part, images in parts.items():
        groups: dict[Size | None, Any] = {None: np.arange(len(images))}
        if buckets and part == TRAINING:
            sizes = np.array([images.size_of(k) for k in range(len(images))], dtype=np.int64)
            groups = {(int(h), int(w)): np.flatnonzero((sizes == (h, w)).all(1)) for h, w in np.unique(sizes, axis=0)}
        first = 0
        for size, indices in groups.items():
            if part == TRAINING:
                generator = torch.Generator().manual_seed(int(fingerprint(seed, size)[:15], 16))
                indices = indices[torch.randperm(len(indices), generator=generator).numpy()]
            label = part if size is None else f"{part}-{size[0]}x{size[1]}"
            for number, start in enumerate(range(0, len(indices), samples)):
                own = indices[start : start + samples]
                plans.append(ShardPlan(f"{label}-{number:06}.tar", part, size, own, first))
                first += len(own)
    return plans


class ShardWriter(Dataset[dict[str, Any]]):
    """Writes shard k when example k is asked for, and returns its record; so a ``DataLoader`` packs in parallel.

    Args:
        plans: the shards.
        parts: the data sets that they are of.
        folder: where they go.
        encoder: encodes images and captions; None packs them as they are.
    """

    def __init__(
        self, plans: Sequence[ShardPlan], parts: dict[str, Any], folder: Path, encoder: Encoder | None
    ) -> None:
        self.plans = plans
        self.parts = parts
        self.folder = folder
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.plans)

    @override
    def __getitem__(self, number: int) -> dict[str, Any]:
        plan = self.plans[number]
        images, file = self.parts[plan.part], self.folder / RECORDS / f"{plan.name}.json"
        content = fingerprint(*(_identity(images, int(index)) for index in plan.indices))
        if (record := self._complete(file, plan, content)) is not None:
            return record
        try:
            record = self._write(plan, images) | {"content": content}
            atomic_write_text(file, json.dumps(record))
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise unwritable(self.folder, error.strerror) from error
            raise SettingsError(
                f"{plan.name}: cannot be packed ({error}); check the files that it is made of."
            ) from error
        return record

    def _write(self, plan: ShardPlan, images: Any) -> dict[str, Any]:
        """Write a shard; returns what the index needs of it."""
        encoded = self.encoder(images, plan.indices) if self.encoder and plan.part == TRAINING else None
        kinds: list[tuple[bool, bool, bool]] = []
        with atomic_write(self.folder / plan.name) as aside:
            with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for k, index in enumerate(plan.indices):
                    files, style = _files(images, int(index))
                    if encoded is not None:
                        files[ENCODED] = save(next(encoded))
                    for suffix, data in files.items():
                        entry = tarfile.TarInfo(f"{plan.first + k:09}{suffix}")
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
                    held = [any(suffix.startswith(kind) for suffix in files) for kind in (MASK, CONTROL)]
                    kinds.append((held[0], held[1], style))
            return {
                "name": plan.name,
                "samples": len(plan.indices),
                "bytes": aside.stat().st_size,
                "digest": file_fingerprint(aside),
                "bucket": plan.bucket,
                "validation": plan.part == VALIDATION,
                "masks": all(mask for mask, _, _ in kinds),
                "controls": all(control for _, control, _ in kinds),
                "varied": any(style for _, _, style in kinds),
            }

    def _complete(self, file: Path, plan: ShardPlan, content: str) -> dict[str, Any] | None:
        """The record of a shard that an earlier run has written from the same files."""
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            whole = (self.folder / plan.name).stat().st_size == record["bytes"]
            return record if whole and record["content"] == content else None
        except (OSError, ValueError, KeyError):
            return None


def pack(
    parts: dict[str, Any],
    folder: Path,
    *,
    samples: int,
    seed: int,
    buckets: bool,
    processes: int,
    resolution: Size | None,
    settings: str,
    encoder: Encoder | None = None,
) -> ShardIndex:
    """Pack data sets into a folder of shards with an index.

    Args:
        parts: data sets for training (``train``) and validation (``val``).
        folder: where to.
        samples: number of samples in a shard.
        seed: of the order.
        buckets: give each bucket shards of its own.
        processes: how many pack; 0 packs in this one.
        resolution: what buckets and encoded images are made for.
        settings: a text of all that the set depends on; an interrupted run is resumed if it is the same.
        encoder: encodes images and captions.

    Raises:
        SettingsError: if the folder holds another set, or cannot be written.
    """
    plans = plan_shards(parts, samples, seed, buckets)
    about = None if encoder is None else encoder.about
    plan = fingerprint(settings, samples, seed, buckets, resolution, about, *map(len, parts.values()))
    if (finished := _finished(folder, plan)) is not None:
        return finished
    records = _packed(ShardWriter(plans, parts, folder, encoder), processes)
    held = {kind: all(record[kind] for record in records) for kind in ("masks", "controls")}
    index = ShardIndex.of(
        records,
        resolution=resolution if buckets or encoder else None,
        varied=any(record["varied"] for record in records),
        encoded=about,
        plan=plan,
        **held,
    )
    if encoder is not None:
        encoder.save_empty_prompt(folder)
    atomic_write_text(folder / INDEX, index.text())
    shutil.rmtree(folder / RECORDS)
    return index


def _finished(folder: Path, plan: str) -> ShardIndex | None:
    """The index, if this set is complete already; else the folder is prepared for packing it.

    Raises:
        SettingsError: if the folder holds another set, or what is left of packing one.
    """
    note = folder / RECORDS / "plan"
    other = "choose another folder, or delete this one"
    if (folder / INDEX).is_file():
        index = parse_index((folder / INDEX).read_bytes(), f"output_dir={folder}")
        if index.plan != plan:
            raise SettingsError(f"output_dir={folder}: holds a set that was packed from other settings; {other}.")
        shutil.rmtree(folder / RECORDS, ignore_errors=True)
        return index
    if note.is_file() and note.read_text(encoding="utf-8") != plan:
        raise SettingsError(f"output_dir={folder}: holds a part of a set of other settings; {other}.")
    if not note.is_file() and folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise SettingsError(f"output_dir={folder}: holds other files; give an empty or a new folder.")
    note.parent.mkdir(parents=True, exist_ok=True)
    for place in (folder, note.parent):
        remove_leftovers(place)
    atomic_write_text(note, plan)
    return None


def _packed(writer: ShardWriter, processes: int) -> list[dict[str, Any]]:
    """The records of all shards, in their order."""
    records: list[dict[str, Any]] = []
    workers = min(processes, len(writer))
    loader = DataLoader(writer, batch_size=None, num_workers=workers, generator=torch.Generator())
    with progress(len(writer), f"Packing shards into {writer.folder}") as on_done:
        for record in loader:
            records.append(record)
            on_done(1)
    return records


def _files(images: Any, index: int) -> tuple[dict[str, bytes], bool]:
    """The files of a sample by their suffixes, and whether it has a style of captions that varies."""
    if not hasattr(images, "examples"):  # drawn, not stored
        image = io.BytesIO()
        [drawn] = to_images(images.load(index, View())["image"][None] / 2 + 0.5)
        drawn.save(image, "PNG")
        text = {PACKED_CAPTION: images.caption(index), "size": list(images.original_size(index))}
        return {".png": image.getvalue(), ".json": _json(text)}, False
    example: Example = images.examples[index]
    width, height = upright_size(example.path)
    text = {PACKED_CAPTION: example.caption, "size": [height, width], "source": _name(example.path)}
    style = example.style
    if style != CaptionStyle():
        text["style"] = [list(style.templates), style.shuffle_tags, style.keep_tags]
    content, suffix = _content(example.path)
    files = {suffix: content, ".json": _json(text)}
    for kind, beside in ((MASK, example.mask), (CONTROL, example.control)):
        if beside is not None:
            content, suffix = _content(beside)
            files[kind + suffix] = content
    return files, style.shuffle_tags or len(style.templates) > 1


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()  # in ASCII: names of files may hold what no UTF-8 can


def _content(image: ImageFile) -> tuple[bytes, str]:
    """The bytes of an image file, and the suffix of its format."""
    with open_image(image) as opened:
        suffix = FORMAT_SUFFIXES[str(opened.format)][0] if opened.format in FORMAT_SUFFIXES else ".jpg"
    return image.read_bytes() if isinstance(image, Path) else image.read(), suffix


def _name(image: ImageFile) -> str:
    return os.path.basename(str(image)) if isinstance(image, Path) else str(image)


def _identity(images: Any, index: int) -> str:
    """Changes when a sample does."""
    if not hasattr(images, "examples"):
        return str(images.content(index))
    example = images.examples[index]
    return fingerprint(*map(identity, example.files), example.caption, example.style)
