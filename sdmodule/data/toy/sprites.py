"""Sprites: small images of things on a transparent background, in several styles."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from sdmodule.errors import SettingsError
from sdmodule.io.fingerprint import file_fingerprint, fingerprint

PLAIN = "noto"
"""The style that captions do not name."""


class Sprites:
    """The sprites of a folder, ``STYLE/NAME.png``, each RGBA and square, such as ``noto/palm tree.png``.

    Every tenth combination of a thing and a style is held out of training, no thing in two of the three styles; so is
    every tenth ordered pair of things. Which ones depends on the names alone.

    Args:
        folder: the folder.
        styles: names of the styles to use.
        things: names of the things to use; None for all of them.

    Attributes:
        names: names of things, sorted.
        files: file of each (thing, style).

    Raises:
        SettingsError: for a folder, a style or a thing that is not there.
    """

    def __init__(self, folder: str | Path, styles: Sequence[str], things: Sequence[str] | None = None) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise SettingsError(
                f"data.sprites={folder}: not found; make it with python examples/embedded/make_sprites.py {folder}."
            )
        if not styles:
            raise SettingsError("data.styles=[]: is empty; give at least one style, such as [noto].")
        self.styles = list(styles)
        self.files: dict[tuple[str, str], Path] = {}
        for style in self.styles:
            found = {file.stem: file for file in sorted((self.folder / style).glob("*.png"))}
            if not found:
                own = sorted({file.parent.name for file in self.folder.glob("*/*.png")})
                raise SettingsError(f"data.styles={self.styles}: {folder} has no sprites in {style}; it has {own}.")
            self.files.update({(name, style): file for name, file in found.items()})
        known = sorted({name for name, _ in self.files})
        if missing := sorted(set(things or ()) - set(known)):
            raise SettingsError(f"data.things: {missing[0]} has no sprite in {folder}; {', '.join(known[:5])}, … have.")
        self.names = known if things is None else sorted(set(things))
        every = [(name, style) for name in self.names for style in self.styles if (name, style) in self.files]
        self._combinations: dict[bool | None, list[tuple[str, str]]] = {
            None: every,
            False: [pair for pair in every if not self.is_held_out(*pair)],
            True: [pair for pair in every if self.is_held_out(*pair)],
        }

    def combinations(self, held_out: bool | None = False) -> list[tuple[str, str]]:
        """Things with a style: those of training (False), the held-out ones (True), or all (None)."""
        return self._combinations[held_out]

    @staticmethod
    def is_held_out(name: str, style: str) -> bool:
        """Whether no training image shows a thing in a style."""
        turn = {PLAIN: 0, "flat": 3, "3d": 6}.get(style, zlib.crc32(style.encode()))
        return (zlib.crc32(name.encode()) + turn) % 10 == 0

    @staticmethod
    def is_held_out_pair(first: str, second: str) -> bool:
        """Whether no training image shows two things in this order."""
        return zlib.crc32(f"{first} {second}".encode()) % 10 == 0

    def content(self) -> str:
        """A key of the sprites: of their names and of the bytes of their files."""
        return fingerprint(*((*pair, file_fingerprint(self.files[pair])) for pair in self.combinations(None)))

    def image(self, name: str, style: str) -> Image.Image:
        """A sprite, premultiplied (``RGBa``), so that it can be resized and pasted without fringes."""
        return _read(self.files[name, style])


@lru_cache(maxsize=4096)
def _read(file: Path) -> Image.Image:
    return Image.open(file).convert("RGBA").convert("RGBa")
