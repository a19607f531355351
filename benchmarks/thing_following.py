"""Measure how often an image shows the thing that its prompt names.

The prompts are captions of seeded scenes: 100 of one thing in the middle, 100 of one whose size and place are named,
100 of a thing in a style in which no training image shows it, and 100 of two things. A scorer reads each sample among
the names of all sprites, and its style and background; see `thing_reader`. It is checked on renderings of these
and of others first. Two things are right if both are.

Needs the sprites that ``examples/embedded/make_sprites.py`` makes.

Example::

    python benchmarks/thing_following.py --sprites outputs/sprites --styles noto flat --json things.json --sheet t.png
    python benchmarks/thing_following.py --sprites outputs/sprites --scorer-only
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.prompt_following import contact_sheet, sample
from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from benchmarks.thing_reader import MEASURES, ThingReader, Verdict, judge
from sdmodule.data.toy.emoji_scenes import EmojiScene, emoji_caption, render_emoji, sample_thing, sample_things
from sdmodule.data.toy.scenes import IMAGE_SIZE
from sdmodule.data.toy.sprites import Sprites
from sdmodule.errors import SettingsError

KINDS: dict[str, Callable[[random.Random, Sprites], EmojiScene]] = {
    "centred": lambda rng, sprites: sample_thing(rng, sprites, placed=0.0),
    "placed": lambda rng, sprites: sample_thing(rng, sprites, placed=1.0),
    "held-out": lambda rng, sprites: sample_thing(rng, sprites, placed=0.5, held_out=True),
    "two things": sample_things,
}
"""For each row, how to draw a scene."""

PROMPTS, RENDERED = 100, 500
"""Scenes of each kind that are sampled, and rendered ones that the scorer is checked on: the same ones, and more."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: one is unknown or out of range.
    """
    parser = Parser("Measure how often an image shows the thing that its prompt names.", quick="a tenth of the prompts")
    parser.add_argument("--sprites", type=Path, required=True, help="folder of STYLE/NAME.png")
    parser.add_argument("--styles", nargs="+", default=["noto", "flat"], help="styles that the model has learned")
    parser.add_argument("--things", type=Path, help="file with the names that it has learned, one a line; or all")
    parser.add_argument("--scorer", default="tiny-clip", help="a CLIP-like model: a name, a folder or a hub id")
    parser.add_argument("--scorer-only", action="store_true", help="check the scorer on renderings, and sample nothing")
    parser.add_argument("--pretrained", default="tiny", help="name or folder of the model")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the model's")
    parser.add_argument("--guidance-scale", type=float, help="by default the model's")
    parser.add_argument("--scheduler", help="by default the model's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and of the first image's noise")
    parser.add_argument("--batch-size", type=int, default=50, help="images in a batch")
    parser.add_argument("--sheet", type=Path, help="PNG of the first images of each kind, wrong ones framed in red")
    settings = parser.parse_args(arguments)
    check_counts(settings, "batch_size", *(["steps"] if settings.steps is not None else []))
    if settings.things and not settings.things.is_file():
        raise SettingsError(f"--things {settings.things}: not found; give a file with one name a line.")
    if settings.scorer_only and settings.sheet:
        raise SettingsError("--sheet: is of samples, and --scorer-only makes none; leave one of them out.")
    return settings


def draw_scenes(sprites: Sprites, seed: int, count: int) -> list[tuple[str, EmojiScene]]:
    """Draw ``count`` scenes of each kind of :data:`KINDS`; more of them begin with the same ones."""
    generators = {kind: random.Random(f"{seed} {kind}") for kind in KINDS}
    return [(kind, draw(generators[kind], sprites)) for kind, draw in KINDS.items() for _ in range(count)]


def judge_all(
    scenes: Sequence[tuple[str, EmojiScene]], images: Sequence[Image.Image], reader: ThingReader
) -> list[Verdict]:
    """Read and judge the image of each scene."""
    readings = reader.read_all((scene for _, scene in scenes), images)
    return [judge(scene, read) for (_, scene), read in zip(scenes, readings, strict=True)]


def tally(scenes: Sequence[tuple[str, EmojiScene]], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Rows of counted verdicts: for each kind of scene, the share of images in which each measure is right."""
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in scenes):
        own = [verdict for (k, _), verdict in zip(scenes, verdicts, strict=True) if k == kind]
        right = Counter(measure for verdict in own for measure, is_right in verdict.items() if is_right)
        rows.append(
            {"scenes": kind, "images": len(own)} | {name: round(right[name] / len(own), 4) for name in MEASURES}
        )
    return rows


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a tally."""
    print(f"\n{title}")
    print_table([{key: f"{cell:.1%}" if key in MEASURES else str(cell) for key, cell in row.items()} for row in rows])


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Check the scorer, sample, judge, and report.

    Args:
        arguments: what was typed after the name of the program.

    Returns:
        The report: ``rows`` of the samples, and in ``reader`` the same rows of rendered images; with
        ``--scorer-only`` the latter as ``rows``.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = parse(arguments)
    names = settings.things.read_text().splitlines() if settings.things else None
    sprites = Sprites(settings.sprites, settings.styles, names)
    every = Sprites(settings.sprites, sorted({file.parent.name for file in settings.sprites.glob("*/*.png")}))
    # slow imports, after wrong arguments have been reported
    from sdmodule import StableDiffusionModule
    from sdmodule.evaluation import TransformersScorer

    scorer = TransformersScorer(settings.scorer)
    share = 10 if settings.quick else 1
    rendered = draw_scenes(sprites, settings.seed, RENDERED // share)
    scorer.check_words(emoji_caption(scene) for _, scene in rendered)
    module = None if settings.scorer_only else StableDiffusionModule.from_pretrained(settings.pretrained)

    reader = ThingReader(scorer, every.names, every.styles)
    checked = tally(rendered, judge_all(rendered, [render_emoji(scene, sprites) for _, scene in rendered], reader))
    show(f"The scorer, on {len(rendered)} rendered images, among {len(every.names)} names", checked)
    rows = checked
    if module is not None:
        scenes = draw_scenes(sprites, settings.seed, PROMPTS // share)
        images = sample(module, [emoji_caption(scene) for _, scene in scenes], settings)
        verdicts = judge_all(scenes, images, reader)
        rows = tally(scenes, verdicts)
        show(f"The model, on {len(scenes)} sampled images", rows)
        if settings.sheet:
            settings.sheet.parent.mkdir(parents=True, exist_ok=True)
            _sheet(images, verdicts).save(settings.sheet)

    result = report([__file__, *arguments], rows) | {"names": len(every.names), "scorer": scorer.name}
    if module is not None:
        result["reader"] = checked
    if settings.json:
        write_json(settings.json, result)
    return result


def _sheet(images: Sequence[Image.Image], verdicts: Sequence[Verdict]) -> Image.Image:
    """The first 16 images of each kind, two rows for each; wrong names are framed in red."""
    count = len(images) // len(KINDS)
    chosen = [kind * count + k for kind in range(len(KINDS)) for k in range(min(16, count))]
    small = [images[k].resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS) for k in chosen]
    return contact_sheet(small, [{"all": verdicts[k]["name"]} for k in chosen])


if __name__ == "__main__":
    main(run)
