"""The folder in which the commands of the documentation run: a few images under the names that the pages use."""

import json
import shutil

import pytest
from PIL import Image, ImageDraw

CAPTIONS = [
    "a red circle on a blue background",
    "a green square on a white background",
    "a yellow heart on a purple background",
    "a blue triangle on a black background",
]
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "yellow": (250, 220, 50), "blue": (48, 88, 220)}


def draw(colour, size=(64, 64)):
    """A coloured disc in the middle of a light ground."""
    image = Image.new("RGB", size, (225, 225, 235))
    width, height = size
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=colour)
    return image


@pytest.fixture(scope="session")
def materials(tmp_path_factory):
    """Photographs with captions, masks and prompts, made once."""
    folder = tmp_path_factory.mktemp("materials")
    for name in ("my_photos", "my_cat", "my_dog", "drawings"):
        (folder / name).mkdir()
        rows = []
        for k, (caption, colour) in enumerate(zip(CAPTIONS, COLOURS.values(), strict=True)):
            draw(colour).save(folder / name / f"{k}.png")
            rows.append({"file_name": f"{k}.png", "text": caption})
        if name != "my_dog":  # DreamBooth gives all of them one caption
            (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(COLOURS["red"], (96, 80)).save(folder / "photo.png")
    mask = Image.new("L", (96, 80))
    mask.paste(255, (24, 20, 72, 60))
    mask.save(folder / "mask.png")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS[:2]) + "\n")
    lines = [{"prompt": CAPTIONS[0]}, {"prompt": CAPTIONS[1], "negative_prompt": "blurred", "seed": 7}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def workplace(materials, tmp_path, monkeypatch):
    """A folder of a test's own, which is the current one of its Python blocks."""
    folder = tmp_path / "clone"
    shutil.copytree(materials, folder)
    monkeypatch.chdir(folder)
    return folder
