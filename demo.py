"""The first thing to run (``make demo``): teach the embedded model one fox, from six images.

Everything goes through ``predict.py`` and ``train.py``, as a user would run them.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdmodule.io.images import wrap_text

HERE = Path(os.path.relpath(Path(__file__).parent))
FOX = HERE / "sdmodule" / "components" / "assets" / "fox"
OUTPUT = HERE / "outputs" / "demo"
STEPS = 400

SHAPES = [
    "a red circle on a blue background",
    "a small green star at the top on a white background",
    "a large yellow heart on a purple background",
    "a white circle on the left on a red background",
    "a blue square to the left of an orange triangle on a black background",
    "a white star above a green heart on a red background",
]

INPAINTED = [
    "a yellow star on a blue background",
    "a black heart on a blue background",
    "a white square on a blue background",
    "a red triangle on a blue background",
]
MASK = [14, 14, 50, 50]
"""The box that is inpainted: ``[x0, y0, x1, y1]`` in pixels."""

UNSEEN = ["a zxq fox on a red background", "a zxq fox on an orange background"]
"""Prompts whose backgrounds are not among the images that are trained on; ``zxq`` is a word without a meaning."""
SEEDS = 3


def main() -> None:
    """Sample, inpaint, fine-tune, sample again, and lay the images side by side."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    shapes = predict(SHAPES, "shapes")
    circle = circle_and_mask()
    inpainted = predict(INPAINTED, "inpainted", "model=inpaint", f"image={OUTPUT / 'circle.png'}", f"mask={MASK}")
    before = predict(UNSEEN, "before", f"num_images_per_prompt={SEEDS}")
    validated = [f"data.val_root={FOX / 'val'}", "validate_first=true"]
    command("train.py", "experiment=demo", *validated, f"trainer.max_steps={STEPS}", "train")
    after = predict(UNSEEN, "after", f"num_images_per_prompt={SEEDS}", f"pretrained={OUTPUT / 'train' / 'export'}")

    rows = [json.loads(line) for line in (FOX / "train" / "metadata.jsonl").read_text().splitlines()]
    foxes = [Image.open(FOX / "train" / row["file_name"]) for row in rows]
    prompts = [prompt for prompt in UNSEEN for _ in range(SEEDS)]
    page = sheet(
        {
            "The embedded model follows its prompt": (shapes, SHAPES),
            "and inpaints the masked part of an image.": ([*circle, *inpainted], ["a circle", "its mask", *INPAINTED]),
            "It learns a fox from six images.": (foxes, [row["text"] for row in rows]),
            "Before, on backgrounds that are not among the six:": (before, prompts),
            f"After {STEPS} steps, from the same noise:": (after, prompts),
        }
    )
    page.save(OUTPUT / "grid.png", optimize=True)
    print("\n".join(["", *summary()]))


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
    line = [*typed(script), *settings, f"output_dir={OUTPUT / name}"]
    subprocess.run(line, executable=sys.executable, check=True)


def typed(script: str) -> list[str]:
    """The interpreter as it was typed, and a script."""
    return [sys.orig_argv[0], str(HERE / script)]


def predict(prompts: list[str], name: str, *settings: str) -> list[Image.Image]:
    """Images of the prompts, in their order."""
    command("predict.py", f"prompt={json.dumps(prompts)}", "steps=25", "batch_size=8", *settings, name)
    return [Image.open(file) for file in sorted((OUTPUT / name / "images").iterdir())]


def sheet(rows: dict[str, tuple[list[Image.Image], list[str]]], tile: int = 128) -> Image.Image:
    """A contact sheet: rows of images with captions, each row under its title; few colours make its file small."""
    title_font, font = ImageFont.load_default(14), ImageFont.load_default(11)
    columns = max(len(images) for images, _ in rows.values())
    height = tile + 78
    page = Image.new("RGB", (columns * (tile + 8) + 8, len(rows) * height + 4), "white")
    draw = ImageDraw.Draw(page)
    for r, (title, (images, captions)) in enumerate(rows.items()):
        draw.text((8, 8 + r * height), title, fill="black", font=title_font)
        for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x, y = 8 + k * (tile + 8), 30 + r * height
            page.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
            draw.text((x, y + tile + 2), "\n".join(wrap_text(caption, font, tile)), fill="gray", font=font)
    return page.quantize(256, dither=Image.Dither.NONE)


def summary() -> list[str]:
    """What was made, how much better it got, and what to type next."""
    with (OUTPUT / "train" / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    lines = "\n".join(f"  {line}" for line in next_commands())
    return [
        f"Made {OUTPUT / 'grid.png'}: a fox that the model learned from six images, before and after.",
        f"On backgrounds that were not among the six, val/loss fell from {losses[0]:.3f} to {losses[-1]:.3f}.",
        f"Next, sample the fox, compare settings on one page, or train a LoRA on 24 emoji:\n{lines}",
    ]


def next_commands() -> list[str]:
    """Three commands that one would type next, which work as printed in the shell that runs this."""
    fox = f"pretrained={OUTPUT / 'train' / 'export'}"
    commands = [
        ["predict.py", fox, "prompt=a zxq fox on a green background"],
        ["predict.py", "-m", fox, "prompt=a zxq fox on a red background", "guidance_scale=1,2,4"],
        ["train.py", "experiment=lora", "trainer.max_steps=200"],
    ]
    return [shlex.join([*typed(script), *settings]) for script, *settings in commands]


if __name__ == "__main__":
    main()
