"""The first thing to run (``make demo``): sample the embedded model, fine-tune it on a few emoji, sample it again.

Everything goes through ``predict.py`` and ``train.py``, as a user would run them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
IMAGES = HERE / "sdmodule" / "components" / "assets" / "emoji"
OUTPUT = HERE / "outputs" / "demo"
STEPS = 200

SHAPES = [
    "a red circle on a blue background",
    "a small green star at the top on a white background",
    "a large yellow heart on a purple background",
    "a blue square to the left of an orange triangle on a black background",
]

INPAINTED = [
    "a yellow star on a blue background",
    "a black heart on a blue background",
    "a white square on a blue background",
    "a red triangle on a blue background",
]
MASK = [14, 14, 50, 50]
"""The box that is inpainted: ``[x0, y0, x1, y1]`` in pixels."""


def main() -> None:
    """Sample, inpaint, fine-tune, sample again, and lay the images side by side."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    rows = [json.loads(line) for line in (IMAGES / "metadata.jsonl").read_text().splitlines()]
    captions = [row["text"] for row in rows[:8]]

    shapes = predict(SHAPES, "shapes")
    circle = circle_and_mask()
    inpainted = predict(INPAINTED, "inpainted", "model=inpaint", f"image={OUTPUT / 'circle.png'}", f"mask={MASK}")
    before = predict(captions, "before")
    command("train.py", f"data.root={IMAGES}", "experiment=demo", f"trainer.max_steps={STEPS}", "train")
    after = predict(captions, "after", f"pretrained={OUTPUT / 'train' / 'export'}")
    targets = [Image.open(IMAGES / row["file_name"]).convert("RGB") for row in rows[:8]]

    grid = OUTPUT / "grid.png"
    sheet(
        {
            "the embedded model follows its prompt": (shapes, SHAPES),
            "and inpaints the masked part of an image": ([*circle, *inpainted], ["a circle", "its mask", *INPAINTED]),
            "images to fine-tune on": (targets, captions),
            "before fine-tuning": (before, captions),
            f"after {STEPS} steps": (after, captions),
        }
    ).save(grid)
    print(f"\nLook at {grid.relative_to(HERE)}")


def circle_and_mask() -> list[Image.Image]:
    """Draw a circle and save it for inpainting; returns it without and with its mask, which is shown in grey."""
    circle = Image.new("RGB", (64, 64), (48, 88, 220))
    ImageDraw.Draw(circle).ellipse((18, 18, 45, 45), fill=(242, 140, 32))
    circle.save(OUTPUT / "circle.png")
    masked = circle.copy()
    masked.paste((127, 127, 127), (MASK[0], MASK[1], MASK[2], MASK[3]))
    return [circle, masked]


def command(script: str, *arguments: str) -> None:
    """Run ``predict.py`` or ``train.py``; the last argument is the name of its output folder."""
    *settings, name = arguments
    line = [sys.executable, str(HERE / script), *settings, f"output_dir={OUTPUT / name}"]
    subprocess.run(line, check=True, cwd=HERE)


def predict(prompts: list[str], name: str, *settings: str) -> list[Image.Image]:
    """Images of the prompts, in their order."""
    command("predict.py", f"prompt={json.dumps(prompts)}", "steps=25", "batch_size=8", *settings, name)
    return [Image.open(file) for file in sorted((OUTPUT / name / "images").iterdir())]


def sheet(rows: dict[str, tuple[list[Image.Image], list[str]]], tile: int = 128) -> Image.Image:
    """A contact sheet: rows of images with captions, each row under its title."""
    font = ImageFont.load_default(13)
    columns = max(len(images) for images, _ in rows.values())
    height = tile + 56
    page = Image.new("RGB", (columns * (tile + 8) + 8, len(rows) * height + 8), "white")
    draw = ImageDraw.Draw(page)
    for r, (title, (images, captions)) in enumerate(rows.items()):
        draw.text((8, 8 + r * height), title, fill="black", font=font)
        for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x, y = 8 + k * (tile + 8), 26 + r * height
            page.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
            short = caption if len(caption) <= 22 else caption[:21] + "…"
            draw.text((x, y + tile + 2), short, fill="gray", font=ImageFont.load_default(11))
    return page


if __name__ == "__main__":
    main()
