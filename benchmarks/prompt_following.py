"""Measure how often an image shows what its prompt says.

The prompts are captions of seeded scenes: 200 of one object, 100 of one whose colour and shape no training image
paired, and 100 of two objects. A reader made of plain image analysis, itself checked first on rendered scenes, reads
each sample and judges every word of its prompt.

With ``task=inpaint`` 200 rendered scenes are repainted: the object is masked and the prompt asks for one of another
shape and colour in its place.

Example::

    python benchmarks/prompt_following.py steps=20 guidance_scale=5 --json prompt_following.json --sheet sheet.png
    python benchmarks/prompt_following.py task=inpaint
    python benchmarks/prompt_following.py tome.ratio=0.5
    python benchmarks/prompt_following.py speed=turbo speed.cache_every=3
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.repainted_scenes import Repaint, draw_repaint, judge_repaint
from benchmarks.report import Parser, print_table, report, write_json
from benchmarks.scene_reader import ATTRIBUTES, judge, read_scene
from sdmodule.data.toy.scenes import IMAGE_SIZE, Scene, caption, render, sample_double, sample_single
from sdmodule.errors import SettingsError, choices

if TYPE_CHECKING:
    from sdmodule import StableDiffusionModule

KINDS: dict[str, tuple[int, int, Callable[[random.Random], Scene]]] = {
    "single": (200, 500, lambda rng: sample_single(rng, held_out=False)),
    "held-out": (100, 250, lambda rng: sample_single(rng, held_out=True)),
    "two objects": (100, 250, lambda rng: sample_double(rng, held_out=False)),
}
"""For each row: how many prompts to sample, how many rendered images to check the reader on, how to draw a scene."""

REPAINTED = "repainted"
"""The row of ``task=inpaint``."""

REPAINTS = 200
"""Scenes that are repainted, and rendered ones that the reader is then checked on."""

MODELS = {"text2image": "tiny", "inpaint": "tiny-inpaint"}
"""Tasks, and the model that each is measured with if no other is given."""

MEASURES = (*ATTRIBUTES, "object", "kept")

KEYS = ("task", "pretrained", "steps", "guidance_scale", "seed", "batch_size", "scheduler", "speed")
"""Settings that may also be written ``key=value``; beside them those of two groups, ``tome.…`` and ``speed.…``."""

GROUPS = ("tome.", "speed.")

SHEET_SIDE = 8
"""Images along each side of the contact sheet."""

Verdict = dict[str, bool]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read options and ``key=value`` overrides; the latter win.

    Raises:
        SettingsError: a key is unknown or a value is out of range.
    """
    parser = Parser(description="Measure how often an image shows what its prompt says.", allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"any of: {', '.join(KEYS)}")
    parser.add_argument("--task", default="text2image", choices=MODELS, help="what is measured")
    parser.add_argument("--pretrained", help="name or folder of the model; the embedded one of the task if not given")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's default if not given")
    parser.add_argument("--guidance-scale", type=float, help="the model's default if not given")
    parser.add_argument("--scheduler", help="sampler; the model's default if not given")
    parser.add_argument("--speed", default="exact", help="a preset, which the settings given beside it change")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and of the first image's noise")
    parser.add_argument("--batch-size", type=int, default=50, help="images sampled at once")
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--sheet", type=Path, help="file for the first 64 images, wrong ones framed in red")
    settings = parser.parse_intermixed_args(arguments)

    pairs = [override.partition("=") for override in settings.overrides]
    for key, sign, _ in pairs:
        if not sign or not (key in KEYS or key.startswith(GROUPS)):
            raise SettingsError(
                f"'{key}{sign}' is no setting of this benchmark; write key=value with {choices(KEYS)}, tome.ratio or "
                "speed.cache_every."
            )
    overrides = [f"--{key.replace('_', '-')}={value}" for key, _, value in pairs if key in KEYS]
    settings = parser.parse_intermixed_args([*arguments, *overrides])
    settings.presets = [f"{key}={value}" for key, _, value in pairs if key not in KEYS]
    settings.pretrained = settings.pretrained or MODELS[settings.task]
    for key, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(settings, key)
        if value is not None and value < least:
            raise SettingsError(f"{key}={value} is too small; give {least} or more.")
    return settings


def draw_scenes(seed: int, checks: bool = False, share: int = 1) -> list[tuple[str, Scene]]:
    """Draw the seeded scenes of every kind.

    Args:
        seed: seed of every choice.
        checks: whether to draw as many as the reader is checked on, rather than as many as are sampled.
        share: divisor of the numbers.

    Returns:
        Pairs of a kind of :data:`KINDS` and a scene.
    """
    rng = random.Random(seed)
    return [
        (kind, draw(rng))
        for kind, (prompts, rendered, draw) in KINDS.items()
        for _ in range((rendered if checks else prompts) // share)
    ]


def sample(
    module: StableDiffusionModule,
    prompts: Sequence[str],
    settings: argparse.Namespace,
    masked: Sequence[tuple[Image.Image, Sequence[int]]] = (),
) -> list[Image.Image]:
    """Sample an image of each prompt; image k comes from seed + k whatever the size of a batch.

    Args:
        module: the model.
        prompts: one an image.
        settings: of `parse`.
        masked: for inpainting, the image and the box of each prompt.
    """
    named = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "scheduler": settings.scheduler,
    }
    options = {key: value for key, value in named.items() if value is not None}
    images: list[Image.Image] = []
    while len(images) < len(prompts):
        done = len(images)
        batch = list(prompts[done : done + settings.batch_size])
        if masked:
            images, boxes = zip(*masked[done : done + settings.batch_size], strict=True)
            options |= {"image": list(images), "mask": [list(box) for box in boxes]}
        options |= {"seed": settings.seed + done, "return_type": "image", "show_progress": sys.stderr.isatty()}
        images += module.infer(batch, **options)["samples"]
    return images


def judge_all(scenes: Iterable[tuple[str, Scene]], images: Iterable[Image.Image]) -> list[Verdict]:
    """Read and judge the image of each scene."""
    return [judge(scene, read_scene(image)) for (_, scene), image in zip(scenes, images, strict=True)]


def tally(scenes: Sequence[tuple[str, Scene]], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Count verdicts: a row for each kind of scene, and for each measure its ``right``, ``counted`` and ``rate``."""
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in scenes):
        of_kind = [verdict for (k, _), verdict in zip(scenes, verdicts, strict=True) if k == kind]
        counted = Counter(attribute for verdict in of_kind for attribute in verdict)
        right = Counter(attribute for verdict in of_kind for attribute, is_right in verdict.items() if is_right)
        row: dict[str, Any] = {"scenes": kind, "images": len(of_kind)}
        for attribute in MEASURES:
            if n := counted[attribute]:
                row[attribute] = {"right": right[attribute], "counted": n, "rate": round(right[attribute] / n, 4)}
        rows.append(row)
    return rows


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a tally; what does not apply to a row is left empty."""

    def cell(value: object) -> str:
        return f"{value['rate']:.1%} of {value['counted']}" if isinstance(value, dict) else str(value)

    print(f"\n{title}")
    counted = [measure for measure in MEASURES if any(measure in row for row in rows)]
    print_table([{key: cell(row.get(key, "")) for key in ("scenes", *counted)} for row in rows])


def contact_sheet(images: Sequence[Image.Image], verdicts: Sequence[Verdict]) -> Image.Image:
    """Arrange the first images in a square, wrong ones framed in red."""
    frame, tile = 3, IMAGE_SIZE + 8
    sheet = Image.new("RGB", (SHEET_SIDE * tile, SHEET_SIDE * tile), "grey")
    for k, (image, verdict) in enumerate(list(zip(images, verdicts, strict=True))[: SHEET_SIDE**2]):
        framed = ImageOps.expand(image.convert("RGB"), frame, "grey" if verdict["all"] else "red")
        sheet.paste(framed, (k % SHEET_SIDE * tile + 1, k // SHEET_SIDE * tile + 1))
    return sheet


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Check the reader, sample, judge, and report.

    Args:
        arguments: what was typed after the name of the program.

    Returns:
        The report: ``rows`` of the samples and ``reader``, the same rows of rendered images.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = parse(arguments)
    # Imported here, so that a wrong argument is told at once.
    from benchmarks.presets import dtype, preset
    from sdmodule import StableDiffusionModule

    share = 10 if settings.quick else 1
    chosen = preset(settings.speed, *settings.presets)
    if settings.speed == "exact":
        chosen.pop("sampling")  # the checkpoint's own scheduler
    module = StableDiffusionModule.from_pretrained(settings.pretrained, task=settings.task, **chosen)
    weights = dtype(settings.speed)
    if weights != torch.float32:
        module.to(weights)
    repaints: list[Repaint] = []
    if settings.task == "inpaint":
        rng = random.Random(settings.seed)
        repaints = [draw_repaint(rng) for _ in range(REPAINTS // share)]
        rendered = scenes = [(REPAINTED, repaint.wanted) for repaint in repaints]
    else:
        rendered = draw_scenes(settings.seed, checks=True, share=share)
        scenes = draw_scenes(settings.seed, share=share)

    reader = tally(rendered, judge_all(rendered, (render(scene) for _, scene in rendered)))
    show(f"The reader, on {len(rendered)} rendered images", reader)

    befores = [render(repaint.before) for repaint in repaints]
    masked = [(before, repaint.box) for before, repaint in zip(befores, repaints, strict=True)]
    images = sample(module, [caption(scene) for _, scene in scenes], settings, masked)
    if repaints:
        verdicts = [judge_repaint(*each) for each in zip(repaints, befores, images, strict=True)]
    else:
        verdicts = judge_all(scenes, images)
    rows = tally(scenes, verdicts)
    show(f"The model, on {len(scenes)} sampled images", rows)

    told = {"reader": reader, "dtype": str(weights).removeprefix("torch.")}
    result = report([__file__, *arguments], rows) | told
    if settings.json:
        write_json(settings.json, result)
    if settings.sheet:
        settings.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images, verdicts).save(settings.sheet)
    return result


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except SettingsError as error:
        sys.exit(str(error))
