"""Untrusted and damaged files are either read correctly or refused with a clear error."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdmodule.components.checkpoint import load_components
from sdmodule.components.single_file import load_single_file
from sdmodule.conditioning.masked_image import read_masked_image
from sdmodule.data.cache.tensor_store import TensorStore
from sdmodule.data.sources.folder import Folder
from sdmodule.data.sources.verify import load_beside, load_rgb, readable_images
from sdmodule.errors import SettingsError
from sdmodule.io.fingerprint import fingerprint
from sdmodule.io.png_metadata import read_metadata, save_png
from sdmodule.sampling.requests import build_requests
from sdmodule.training.checkpoint_io import read_checkpoint

SECONDS, BYTES = 5.0, 2**30
"""The most time and memory that reading one file may take."""

Case = tuple[Path, Callable[[Path], object]]
"""A good file and its reader."""


@pytest.fixture(scope="module")
def cases(checkpoint, tmp_path_factory) -> dict[str, Case]:
    """A good file of each kind, with its reader."""
    root = tmp_path_factory.mktemp("good")

    config = shutil.copytree(checkpoint, root / "checkpoint")
    weights = config / "vae" / "diffusion_pytorch_model.safetensors"

    single = root / "single.safetensors"
    save_file({f"model.diffusion_model.{k}": torch.randn(3, 4) for k in range(9)}, single)
    content = {"global_step": 3, "state_dict": {"a": torch.randn(50)}, "loops": {}, "callbacks": {}}
    torch.save(content | {"optimizer_states": []}, root / "run.ckpt")
    torch.save({"state_dict": {f"model.diffusion_model.{k}": torch.randn(9) for k in range(3)}}, root / "single.ckpt")

    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    metadata = {"index": 0, "prompt": "a cat", "negative_prompt": "", "seed": 3, "steps": 2, "guidance_scale": 2.0}
    metadata |= {
        "scheduler": "DDIMScheduler",
        "scheduler_settings": {"eta": 1},
        "model": "tiny",
        "tome": {"ratio": 0.5},
    }
    save_png(Image.fromarray(noise), root / "made.png", metadata)
    Image.fromarray(noise).save(root / "photo.jpg", exif=Image.Exif())
    Image.fromarray(noise[..., 0]).save(root / "mask.png")
    Image.fromarray(noise[..., 0]).save(root / "mask.gif")

    photos = root / "photos"
    photos.mkdir()
    rows = []
    for k in range(3):
        Image.fromarray(noise).save(photos / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "text": f"image {k}", "mask_file_name": f"{k}.png"})
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (photos / "metadata.csv").write_text("file_name,text\n" + "".join(f'{k}.png,"a, ""b"""\n' for k in range(3)))
    prompts = [{"prompt": "a (red:1.2) circle", "negative_prompt": "b", "seed": 3}, {"prompt": "c"}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    store = TensorStore(root / "cache")
    store.add({fingerprint(k): torch.randn(8, 4, 4) for k in range(3)})
    [cached] = (root / "cache").iterdir()

    def read_folder(file: Path, name: str) -> object:
        folder = shutil.copytree(photos, file.parent / "photos", dirs_exist_ok=True)
        for other in folder.glob("metadata.*"):
            other.unlink()
        shutil.copy(file, folder / name)
        examples, readable = readable_images(Folder(str(folder)), skip_bad=False)
        assert readable.tolist() == list(range(len(examples)))
        assert all(Path(str(example.path)).is_relative_to(folder) for example in examples)
        return examples

    def read_part(file: Path) -> object:
        shutil.copy(file, weights)
        return load_components(str(config))

    def read_cache(file: Path) -> object:
        folder = file.parent / "cache"
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder / "x.safetensors")
        held = TensorStore(folder)
        return [held[fingerprint(k)] for k in range(3) if fingerprint(k) in held]

    return {
        "safetensors of a part": (shutil.copy(weights, root / "part.safetensors"), read_part),
        "safetensors of one file": (single, load_single_file),
        "safetensors of a cache": (cached, read_cache),
        "ckpt of a training": (root / "run.ckpt", read_checkpoint),
        "ckpt of one file": (root / "single.ckpt", load_single_file),
        "PNG text": (root / "made.png", read_metadata),
        "JPEG": (root / "photo.jpg", load_rgb),
        "mask of a request": (
            root / "mask.png",
            lambda file: read_masked_image(Image.new("RGB", (32, 24)), str(file)),
        ),
        "mask of data": (root / "mask.gif", lambda file: load_beside(file, file, (32, 24), "mask")),
        "metadata.jsonl": (photos / "metadata.jsonl", lambda file: read_folder(file, "metadata.jsonl")),
        "metadata.csv": (photos / "metadata.csv", lambda file: read_folder(file, "metadata.csv")),
        "prompts.jsonl": (root / "prompts.jsonl", lambda file: build_requests(prompts=str(file))),
    }


NUMBERS = [b"\x00" * 8, b"\xff" * 8, struct.pack("<Q", 2**62), struct.pack("<I", 2**31 - 1), b"-1", b"1e999", b"NaN"]
WORDS = [b"../", b"/etc/passwd", b"\x00", b"\xe2\x80\xa8", b"{}", b"[[[[[[[[", b'"', b"\\", b"%s%n", b"{0.__class__}"]
WORDS += [b'{"_target_": "os.system"}', b"a" * 5000, b"\xff\xfe", b"\n", b"(((((:1.1)", b"9" * 5000, b"[" * 3000]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """The content of a file with one to four changes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        # readers decide what to do by the header, so half of the changes are there
        at = min(at, rng.randrange(200)) if rng.random() < 0.5 else at
        kind = rng.randrange(7)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + rng.randint(1, 64)]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
        elif kind == 5:
            word = rng.choice(NUMBERS + WORDS)
            changed[at : at + len(word)] = word
        else:
            changed[at:at] = rng.choice(NUMBERS + WORDS)
    return bytes(changed)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture
def bounded() -> Iterator[None]:
    """Limit the memory that the test may allocate."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


KINDS = ["safetensors of a part", "safetensors of one file", "safetensors of a cache", "ckpt of a training"]
KINDS += ["ckpt of one file", "PNG text", "JPEG", "mask of a request", "mask of data", "metadata.jsonl", "metadata.csv"]
KINDS += ["prompts.jsonl"]
COUNTS = dict.fromkeys(KINDS, 190) | {"safetensors of a part": 60}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused_with_an_error(cases, tmp_path, bounded, kind):
    good, read = cases[kind]
    content, rng = good.read_bytes(), random.Random(kind)
    file = tmp_path / good.name
    outcomes: Counter[str] = Counter()
    before = set(Path("/tmp").iterdir())
    for _ in range(COUNTS[kind]):
        file.write_bytes(mutate(content, rng))
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(file)
            outcomes["read"] += 1
        except SettingsError as error:
            assert len(str(error)) > 20
            outcomes["refused"] += 1
        assert time.monotonic() - start < SECONDS
    print(dict(outcomes))
    assert outcomes.total() == COUNTS[kind] and outcomes["refused"] >= 10
    assert {path for path in set(Path("/tmp").iterdir()) - before if "owned" in path.name} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_file_is_read(cases, tmp_path, kind):
    good, read = cases[kind]
    file = shutil.copy(good, tmp_path / good.name)
    if "one file" in kind:  # too small to be a model
        with pytest.raises(SettingsError):
            read(file)
        return
    read(file)


class Harmful:
    """Runs code when it is unpickled: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["run.ckpt", "single.ckpt"])
def test_no_pickle_runs_code(tmp_path, name):
    file, trace = tmp_path / name, tmp_path / "trace"
    torch.save({"global_step": 1, "state_dict": {"model.diffusion_model.x": Harmful(trace)}}, file)
    for read in (read_checkpoint, load_single_file):
        with pytest.raises(SettingsError):
            read(file)
    file.write_bytes(pickle.dumps(Harmful(trace)))
    for read in (read_checkpoint, load_single_file):
        with pytest.raises(SettingsError):
            read(file)
    assert not trace.exists()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that decompresses to that many white pixels."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(9), b"\x00" + b"\xff" * (width // 8)
    data = b"".join(packer.compress(row * 1000) for _ in range(height // 1000)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_an_image_with_too_many_pixels_is_refused_before_it_fills_the_memory(tmp_path, bounded):
    file = tmp_path / "bomb.png"
    for size in ((10_000, 10_000), (48_000, 48_000)):
        file.write_bytes(bomb(*size))
        assert file.stat().st_size < 2**20
        before = resident()
        for read in (load_rgb, read_metadata, lambda path: read_masked_image(str(path), [0, 0, 8, 8])):
            with pytest.raises(SettingsError, match="exceeds limit"):
                read(file)
        assert resident() - before < 2**26


def test_a_small_archive_that_decompresses_to_half_a_gigabyte_is_refused(tmp_path, bounded):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**29))
    file = tmp_path / "bomb.ckpt"
    file.write_bytes(packed.getvalue())
    with pytest.raises(SettingsError):
        read_checkpoint(file)
