"""PNGs checked by their checksums: whatever decoding would notice is noticed."""

from __future__ import annotations

import random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.soak import damage
from sdmodule.errors import SettingsError
from sdmodule.io.png_metadata import read_metadata, save_png
from sdmodule.io.png_scan import PNGScanner

METADATA = {"index": 3, "prompt": "é, a <b>star</b>\u2028", "negative_prompt": "", "seed": 10, "steps": 2}
METADATA |= {"guidance_scale": 7.5, "scheduler": "DDIMScheduler", "model": "tiny", "tome": {"ratio": 0.5}}


@pytest.fixture
def image(tmp_path):
    save_png(Image.effect_noise((48, 40), 80), tmp_path / "image.png", METADATA | {"not": "known"})
    return tmp_path / "image.png"


def test_the_metadata_are_those_that_were_written_in_their_order(image):
    scanner = PNGScanner()
    for _ in range(2):
        assert list(scanner.metadata(image).items()) == list(METADATA.items())
    assert read_metadata(image) == METADATA


def test_a_damaged_image_is_found(image, tmp_path):
    content, rng, scanner = image.read_bytes(), random.Random(0), PNGScanner()
    scanner.metadata(image)
    bad = tmp_path / "bad.png"
    damaged = [content[:length] for length in (0, 5, 8, 20, len(content) // 2, len(content) - 12, len(content) - 1)]
    damaged += [damage(content, rng) for _ in range(300)]
    for one in damaged:
        bad.write_bytes(one)
        if one != content:
            with pytest.raises(SettingsError):
                scanner.metadata(bad)


def test_an_image_that_another_program_wrote_again_is_read(image, tmp_path):
    text = PngInfo()
    for name, value in Image.open(image).text.items():
        text.add_text(name, value, zip=name == "prompt")
    Image.open(image).save(tmp_path / "again.png", pnginfo=text)
    assert PNGScanner().metadata(tmp_path / "again.png") == METADATA


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n" + bytes(12)])
def test_a_file_that_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(SettingsError):
        PNGScanner().metadata(tmp_path / "x.png")
