"""Measure how often an image follows its prompt.

The prompts are captions of seeded scenes: 200 with one object, 100 with one whose pair of colour and shape no training
image has, and 100 with two objects. A strict reader of plain image analysis reads each sample, and every word of the
prompt is judged. The reader is checked first: on rendered scenes, which are right; on the same through the model's
autoencoder, about the best that samples can be; and on renderings that are wrong in one thing.

With ``task=inpaint``, 200 rendered scenes are inpainted: the object is masked, and the prompt asks for one of another
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

from benchmarks.inpaint_scenes import InpaintScene, draw_inpaint_scene, judge_inpainting
from benchmarks.report import Parser, main, print_table, report, write_json
from benchmarks.scene_defects import wrong_images
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
"""For each row: number of prompts, number of rendered images to check the reader on, and how to draw a scene."""

INPAINTED = "inpainted"
"""The row of ``task=inpaint``."""

INPAINT_SCENES = 200
"""Scenes that are inpainted, and as many rendered ones to check the reader on."""

RECONSTRUCTED = 200
"""Rendered images that also go through the model's autoencoder."""

WRONG = 100
"""Images of each kind of wrong one; fewer where a kind applies to fewer scenes."""

MODELS = {"text2image": "tiny", "inpaint": "tiny-inpaint"}
"""The default model of each task."""

MEASURES = (*ATTRIBUTES, "object", "kept")

KEYS = ("task", "pretrained", "steps", "guidance_scale", "seed", "batch_size", "scheduler", "speed")
"""Settings that may also be given as ``key=value``, beside those of ``tome.…`` and ``speed.…``."""

GROUPS = ("tome.", "speed.")

SHEET_SIDE = 8
"""Images along each side of the contact sheet."""

Verdict = dict[str, bool]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read options and ``key=value`` overrides; the latter win.

    Raises:
        SettingsError: a key is unknown or a value is out of range.
    """
    parser = Parser("Measure how often an image follows its prompt.", quick="a tenth of the prompts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"any of: {', '.join(KEYS)}")
    parser.add_argument("--task", default="text2image", choices=MODELS, help="what to measure")
    parser.add_argument("--pretrained", help="name or folder of a model; by default the embedded one of the task")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the model's")
    parser.add_argument("--guidance-scale", type=float, help="by default the model's")
    parser.add_argument("--scheduler", help="by default the model's")
    parser.add_argument("--speed", default="exact", help="a preset; settings beside it win")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and of the first image's noise")
    parser.add_argument("--batch-size", type=int, default=50, help="images in a batch")
    parser.add_argument("--sheet", type=Path, help="PNG of the first 64 images, wrong ones framed in red")
    settings = parser.parse_intermixed_args(arguments)

    pairs = [override.partition("=") for override in settings.overrides]
    for key, sign, _ in pairs:
        if not sign or not (key in KEYS or key.startswith(GROUPS)):
            raise SettingsError(
                f"{key}{sign}: not a setting of this benchmark; write key=value, where key is one of {choices(KEYS)}, "
                "or of tome.… or speed.…, such as tome.ratio."
            )
    overrides = [f"--{key.replace('_', '-')}={value}" for key, _, value in pairs if key in KEYS]
    settings = parser.parse_intermixed_args([*arguments, *overrides])
    settings.presets = [f"{key}={value}" for key, _, value in pairs if key not in KEYS]
    settings.pretrained = settings.pretrained or MODELS[settings.task]
    for key, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(settings, key)
        if value is not None and value < least:
            raise SettingsError(f"{key}={value}: must be at least {least}.")
    return settings


def draw_scenes(seed: int, checks: bool = False, share: int = 1) -> list[tuple[str, Scene]]:
    """Draw the seeded scenes of every kind.

    Args:
        seed: seed of all draws.
        checks: draw as many as the reader is checked on, instead of as many as are sampled.
        share: divisor of these numbers.

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
    """Sample an image of each prompt; image k is drawn from seed + k, whatever the batch size.

    Args:
        module: the model.
        prompts: one for each image.
        settings: those of `parse`.
        masked: for inpainting, the image and the masked box for each prompt.
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
            befores, boxes = zip(*masked[done : done + settings.batch_size], strict=True)
            options |= {"image": list(befores), "mask": [list(box) for box in boxes]}
        options |= {"seed": settings.seed + done, "return_type": "image", "show_progress": sys.stderr.isatty()}
        images += module.infer(batch, **options)["samples"]
    return images


def judge_all(scenes: Iterable[tuple[str, Scene]], images: Iterable[Image.Image]) -> list[Verdict]:
    """Read and judge the image of each scene."""
    return [judge(scene, read_scene(image)) for (_, scene), image in zip(scenes, images, strict=True)]


def tally(scenes: Sequence[tuple[str, Scene]], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Rows of counted verdicts: for each kind of scene, ``right``, ``counted`` and ``rate`` of each measure."""
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


def tally_wrong(scenes: Sequence[Scene], per_change: int, seed: int) -> list[dict[str, Any]]:
    """Rows of wrong images: for each kind of change, how many of them the reader calls right."""
    rows = []
    for change, wrong in wrong_images(scenes, per_change, random.Random(seed)).items():
        right = sum(judge(scene, read_scene(image))["all"] for scene, image in wrong)
        share = {"right": right, "counted": len(wrong), "rate": round(right / len(wrong), 4)}
        rows.append({"change": change, "images": len(wrong), "called right": share})
    return rows


@torch.no_grad()
def reconstruct(module: StableDiffusionModule, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images through the model's autoencoder, from the means of their latents."""
    from sdmodule.io.images import image_to_tensor, to_images
    from sdmodule.sampling.decode import decode
    from sdmodule.training.loss import encode_moments

    found: list[Image.Image] = []
    for one in images:
        mean, _ = encode_moments(module.parts, image_to_tensor(one)[None].to(module.device)).chunk(2, dim=1)
        found += to_images(decode(module.parts, mean * module.parts.vae.config.scaling_factor).cpu())
    return found


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a tally; measures that do not apply to a row are left empty."""

    def cell(value: object) -> str:
        return f"{value['rate']:.1%} of {value['counted']}" if isinstance(value, dict) else str(value)

    print(f"\n{title}")
    counted = [key for key in (*MEASURES, "called right") if any(key in row for row in rows)]
    print_table([{key: cell(row[key]) for key in ("scenes", "change", *counted) if key in row} for row in rows])


def contact_sheet(images: Sequence[Image.Image], verdicts: Sequence[Verdict]) -> Image.Image:
    """The first images in a square, wrong ones framed in red."""
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
        The report: ``rows`` of the samples; the same of rendered images in ``reader``, and of those through the
        model's autoencoder in ``reconstructed``; in ``wrong`` the share of wrong images that the reader calls right.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = parse(arguments)
    # slow imports, after wrong arguments have been reported
    from benchmarks.presets import dtype, preset
    from sdmodule import StableDiffusionModule

    share = 10 if settings.quick else 1
    chosen = preset(settings.speed, *settings.presets)
    if settings.speed == "exact":
        chosen.pop("sampling")  # keep the checkpoint's own scheduler
    module = StableDiffusionModule.from_pretrained(settings.pretrained, task=settings.task, **chosen)
    weights = dtype(settings.speed)
    if weights != torch.float32:
        module.to(weights)
    inpaint_scenes: list[InpaintScene] = []
    if settings.task == "inpaint":
        rng = random.Random(settings.seed)
        inpaint_scenes = [draw_inpaint_scene(rng) for _ in range(INPAINT_SCENES // share)]
        rendered = scenes = [(INPAINTED, scene.wanted) for scene in inpaint_scenes]
    else:
        rendered = draw_scenes(settings.seed, checks=True, share=share)
        scenes = draw_scenes(settings.seed, share=share)

    reader = tally(rendered, judge_all(rendered, (render(scene) for _, scene in rendered)))
    show(f"The reader, on {len(rendered)} rendered images", reader)
    wrong = tally_wrong([scene for _, scene in rendered], WRONG // share, settings.seed)
    show(f"The reader, on {sum(row['images'] for row in wrong)} wrong images", wrong)
    some = rendered[:: max(len(rendered) * share // RECONSTRUCTED, 1)]
    reconstructed = tally(some, judge_all(some, reconstruct(module, [render(scene) for _, scene in some])))
    show(f"The reader, on {len(some)} rendered images through the autoencoder", reconstructed)

    befores = [render(scene.before) for scene in inpaint_scenes]
    masked = [(before, scene.box) for before, scene in zip(befores, inpaint_scenes, strict=True)]
    images = sample(module, [caption(scene) for _, scene in scenes], settings, masked)
    if inpaint_scenes:
        verdicts = [judge_inpainting(*each) for each in zip(inpaint_scenes, befores, images, strict=True)]
    else:
        verdicts = judge_all(scenes, images)
    rows = tally(scenes, verdicts)
    show(f"The model, on {len(scenes)} sampled images", rows)

    result = report([__file__, *arguments], rows)
    result |= {"reader": reader, "wrong": wrong, "reconstructed": reconstructed}
    result |= {"dtype": str(weights).removeprefix("torch.")}
    if settings.json:
        write_json(settings.json, result)
    if settings.sheet:
        settings.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images, verdicts).save(settings.sheet)
    return result


if __name__ == "__main__":
    main(run)
