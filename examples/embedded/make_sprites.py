"""Fetch emoji under permissive licences and rasterize them to the folder that ``data=emoji_scenes`` reads.

Three sets, each a style: Noto Emoji (Apache 2.0), Fluent Emoji flat and Fluent Emoji 3D (both MIT), from npm packages
whose versions and digests are given below. People, faces, flags, letters, clocks and signs are left out; so is what one
of the first two sets lacks. Each image is cropped to what is drawn and centred on a transparent square.

Needs npm and ``pip install resvg-py``::

    python examples/embedded/make_sprites.py outputs/sprites
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image

SIDE = 128
"""Side of a sprite, in pixels."""

CATEGORIES = {"Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places"}

LEFT_OUT = re.compile(
    r"o-?clock|-thirty|flag|banknote|chart|speaker-|bookmark-tabs|e-mail|envelope-with|incoming-|-suit$|-yen|-sign"
    r"|^(first|last)-quarter|gibbous|waning|waxing|new-moon|full-moon-face|wind-face|sun-with-face|globe-with|map-of"
    r"|^(dvd|joker|label|kaaba|hamsa|identification-card|placard|x-ray|dna|stop|key|card-index-dividers)$"
    r"|-medal$|place-medal|mahjong|calendar|page-|mailbox|bell-with-slash|inbox|outbox|police-car-light|locked"
    r"|playing-cards|slot-machine|input|arrow$|keycap|mobile-phone-with|level-slider|control-knobs"
)
"""Names of letters, signs and what only a legend tells apart."""


@dataclass(frozen=True)
class Package:
    """A package of npm with a set of emoji.

    Attributes:
        name: of the package.
        version: of the package.
        digest: SHA-512 of its archive, as npm gives it.
    """

    name: str
    version: str
    digest: str


NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
)
FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
)
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)


def fetch(package: Package, folder: Path) -> tarfile.TarFile:
    """The archive of a package, by npm.

    Raises:
        SystemExit: if its digest is not the expected one.
    """
    command = ["npm", "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", str(folder)]
    file = folder / subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if digest != package.digest:
        sys.exit(f"{package.name} {package.version}: has the SHA-512 {digest}, not {package.digest}.")
    return tarfile.open(file)


def read(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of a file of a package."""
    file = archive.extractfile(f"package/{name}")
    assert file is not None
    return file.read()


class SvgSet:
    """The SVGs of an Iconify package."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        icons = json.loads(read(archive, "icons.json"))
        self.icons, self.side = icons["icons"], icons["width"]
        categories = json.loads(read(archive, "metadata.json"))["categories"]
        self.names = {name for key in CATEGORIES for name in categories[key] if name in self.icons}
        self.codes: dict[str, list[str]] = {}
        for code, name in json.loads(read(archive, "chars.json")).items():
            self.codes.setdefault(name, []).append(code)

    def image(self, name: str) -> Image.Image:
        """An emoji as RGBA, at twice the side of a sprite."""
        width, height = (self.icons[name].get(key, self.side) for key in ("width", "height"))
        body = self.icons[name]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
        data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE)
        return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def webp_images(archive: tarfile.TarFile, codes: dict[str, list[str]]) -> Callable[[str], Image.Image | None]:
    """Reads emoji of the 3D set, which names them by their code points; None for what it lacks."""
    files = {Path(name).stem.replace("-fe0f", ""): name for name in archive.getnames() if name.endswith(".webp")}

    def image(name: str) -> Image.Image | None:
        for code in codes.get(name, []):
            if (file := files.get(code.replace("-fe0f", ""))) is not None:
                data = archive.extractfile(file)
                assert data is not None
                return Image.open(io.BytesIO(data.read())).convert("RGBA")
        return None

    return image


def centred(image: Image.Image) -> Image.Image:
    """What is drawn, as large as fits, on a transparent square."""
    box = image.getchannel("A").point([255 * (level > 8) for level in range(256)]).getbbox()
    drawn = image.crop(box).convert("RGBa")  # premultiplied, so that no colour of transparent pixels bleeds in
    scale = SIDE / max(drawn.size)
    drawn = drawn.resize([max(1, round(side * scale)) for side in drawn.size], Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(drawn.convert("RGBA"), ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
    return square


def sprites(folder: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """Style, name and image of every sprite; packages are fetched into ``folder``."""
    noto, flat = SvgSet(fetch(NOTO, folder)), SvgSet(fetch(FLAT, folder))
    names = sorted(name for name in noto.names & flat.names if not LEFT_OUT.search(name))
    solid = webp_images(fetch(FLUENT_3D, folder), noto.codes)
    for name in names:
        yield "noto", name, noto.image(name)
        yield "flat", name, flat.image(name)
        if (image := solid(name)) is not None:
            yield "3d", name, image


def main(target: Path) -> None:
    """Write ``target/STYLE/NAME.png`` for every sprite."""
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for style, name, image in sprites(Path(folder)):
            file = target / style / f"{name.replace('-', ' ')}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            centred(image).save(file)
            counts[style] = counts.get(style, 0) + 1
    print(", ".join(f"{count} of style {style}" for style, count in counts.items()), "in", target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Give the folder to write to.")
    main(Path(sys.argv[1]))
