"""Sprites are made of the archives that npm gives: cropped, centred, of the categories that data of things needs."""

from __future__ import annotations

import io
import json
import runpy
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.docs.test_pages import ROOT


@pytest.fixture(scope="module")
def make_sprites():
    """The script as a module."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "embedded" / "make_sprites.py")))


def archive(path, files: dict[str, bytes]) -> tarfile.TarFile:
    """An archive as npm packs it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return tarfile.open(path)


def test_svgs_and_webps_become_centred_squares(make_sprites, tmp_path):
    icons = {"fox": {"body": '<rect x="1" y="2" width="4" height="2" fill="#f00"/>'}, "wink": {"body": ""}}
    svg = archive(
        tmp_path / "svg.tgz",
        {
            "icons.json": json.dumps({"icons": icons, "width": 16, "height": 16}).encode(),
            "metadata.json": json.dumps(
                {"categories": {name: ["fox"] for name in make_sprites.CATEGORIES} | {"Smileys": ["wink"]}}
            ).encode(),
            "chars.json": json.dumps({"1f98a": "fox", "1f609": "wink"}).encode(),
        },
    )
    noto = make_sprites.SvgSet(svg)
    assert noto.names == {"fox"}
    sprite = make_sprites.centred(noto.image("fox"))
    assert sprite.size == (128, 128) and sprite.getbbox() == (0, 32, 128, 96)
    assert sprite.getpixel((64, 64)) == (255, 0, 0, 255)

    data = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 255, 255)).save(data, "webp", lossless=True)
    image = make_sprites.webp_images(
        archive(tmp_path / "3d.tgz", {"assets/1f98a-fe0f.webp": data.getvalue()}), noto.codes
    )
    assert image("fox").getpixel((4, 4)) == (0, 0, 255, 255) and image("wink") is None


def test_names_of_signs_are_left_out(make_sprites):
    assert all(
        make_sprites.LEFT_OUT.search(name) for name in ("one-oclock", "ten-thirty", "waxing-gibbous-moon", "dvd")
    )
    assert not any(make_sprites.LEFT_OUT.search(name) for name in ("fox", "old-key", "full-moon", "alarm-clock"))
