"""The reader reads what the renderer drew, whatever a good model does to it, and nothing else."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from benchmarks.scene_defects import CHANGES, wrong_images
from benchmarks.scene_outlines import MIN_OVERLAP, draw, fit_outline, has_outline, sharpen
from benchmarks.scene_reader import UNCLEAR, Reading, judge, read_scene
from sdmodule.data.toy.scenes import Scene, SceneObject, render, sample_double, sample_single
from sdmodule.errors import SettingsError

RED_HEART = Scene("blue", (SceneObject("red", "heart", 14.0, 33.0, 8.0),), size="small", place="on the left")
PAIR = Scene(
    "white",
    (SceneObject("red", "circle", 16.0, 32.0, 10.0), SceneObject("green", "star", 48.0, 32.0, 10.0)),
    relation="to the left of",
)


def _scenes(count: int) -> list[Scene]:
    rng = random.Random(3)
    draws = [lambda: sample_single(rng), lambda: sample_single(rng, held_out=True), lambda: sample_double(rng)]
    return [draws[k % 3]() for k in range(count)]


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), dtype=float)
    noisy = blurred + rng.normal(0.0, 6.0, blurred.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def _compressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, subsampling=0)
    return Image.open(file)


def test_reader_reads_rendered_scenes() -> None:
    assert np.mean([judge(scene, read_scene(render(scene)))["all"] for scene in _scenes(30)]) >= 0.99


@pytest.mark.parametrize("spoil", [_noisy, _compressed])
def test_reader_reads_noisy_blurred_and_compressed_scenes(spoil: Callable[..., Image.Image]) -> None:
    rng = np.random.default_rng(0)
    assert np.mean([judge(scene, read_scene(spoil(render(scene), rng)))["all"] for scene in _scenes(30)]) >= 0.97


def test_reader_measures_the_object() -> None:
    reading = read_scene(render(RED_HEART))
    (found,), (painted,) = reading.objects, RED_HEART.objects
    assert (reading.background, found.colour, found.shape) == ("blue", "red", "heart")
    assert (found.x, found.y, found.radius) == pytest.approx((painted.x, painted.y, painted.radius), abs=0.25)


def test_a_blend_of_two_colours_is_no_object() -> None:
    scene = Scene("yellow", (SceneObject("red", "star", 32.0, 32.0, 16.0),))
    reading = read_scene(render(scene).filter(ImageFilter.GaussianBlur(1.0)))
    assert [item.colour for item in reading.objects] == ["red"]


@pytest.mark.parametrize(
    ("side", "x", "y", "wrong"), [(2, 50, 50, "clean"), (3, 13, 32, "clean"), (8, 50, 50, "count")]
)
def test_a_speck_is_seen_and_so_is_a_second_object(side: int, x: int, y: int, wrong: str) -> None:
    image = render(RED_HEART)
    ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), fill="white")
    verdict = judge(RED_HEART, read_scene(image))
    assert not verdict[wrong] and not verdict["all"]


def test_a_colour_that_is_none_of_the_palettes_is_unclear() -> None:
    pixels = np.asarray(render(RED_HEART), dtype=int)
    for shift, names in (((0, 20, 20), ("blue", "red")), ((0, 40, 40), (UNCLEAR, UNCLEAR))):
        image = Image.fromarray((pixels + shift).clip(0, 255).astype(np.uint8))
        reading = read_scene(image)
        assert (reading.background, reading.objects[0].colour) == names


def test_wrong_images_are_not_called_right() -> None:
    rng = random.Random(1)
    wrong = wrong_images(_scenes(60), 6, rng)
    assert list(wrong) == list(CHANGES)
    called_right = {
        change: [judge(scene, read_scene(image))["all"] for scene, image in wrong[change]] for change in wrong
    }
    assert all(len(verdicts) == 6 for verdicts in called_right.values())
    assert sum(sum(verdicts) for verdicts in called_right.values()) <= 0.05 * 6 * len(CHANGES)


def test_a_change_that_applies_to_no_scene_is_left_out() -> None:
    wrong = wrong_images([RED_HEART, RED_HEART], 5, random.Random(0))
    assert set(CHANGES) - set(wrong) == {"another relation", "rounded points", "circles with corners"}
    assert len(wrong["another size"]) == 2


def test_an_outline_that_overlaps_too_little_or_has_a_bump_is_not_the_shape() -> None:
    circle = draw("circle", 32.0, 32.0, 12.0)
    assert has_outline(sharpen(circle), fit_outline(sharpen(circle)))
    bump = np.maximum(circle, draw("circle", 43.0, 32.0, 3.0))
    outline = fit_outline(sharpen(bump))
    assert outline.shape == "circle" and outline.overlap > MIN_OVERLAP
    assert not has_outline(sharpen(bump), outline)
    ring = circle - draw("circle", 32.0, 32.0, 6.0)
    assert fit_outline(sharpen(ring)).overlap < MIN_OVERLAP


def test_patch_without_a_known_outline_has_no_shape() -> None:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((6, 28, 58, 34), fill="black")
    assert [item.shape for item in read_scene(image).objects] == [UNCLEAR]


def test_empty_image_has_only_a_background() -> None:
    reading = read_scene(Image.new("RGB", (64, 64), (48, 88, 220)))
    assert reading == Reading("blue", ())
    assert judge(RED_HEART, reading) == {
        "background": True,
        "count": False,
        "clean": True,
        "colour": False,
        "shape": False,
        "size": False,
        "place": False,
        "all": False,
    }


def test_judge_counts_only_what_the_caption_states() -> None:
    scene = Scene("blue", (SceneObject("red", "heart", 32.0, 32.0, 12.0),))
    assert set(judge(scene, read_scene(render(scene)))) == {"background", "count", "clean", "colour", "shape", "all"}


@pytest.mark.parametrize(
    ("painted", "attribute"),
    [
        (SceneObject("purple", "heart", 14.0, 33.0, 8.0), "colour"),
        (SceneObject("red", "circle", 14.0, 33.0, 8.0), "shape"),
        (SceneObject("red", "heart", 14.0, 33.0, 12.5), "size"),
        (SceneObject("red", "heart", 29.0, 33.0, 8.0), "place"),
    ],
)
def test_judge_names_the_one_word_that_is_wrong(painted: SceneObject, attribute: str) -> None:
    verdict = judge(RED_HEART, read_scene(render(Scene("blue", (painted,)))))
    assert [name for name, right in verdict.items() if not right] == [attribute, "all"]


def test_judge_sees_swapped_places_and_swapped_colours() -> None:
    circle, star = PAIR.objects
    places = (SceneObject("red", "circle", 48.0, 32.0, 10.0), SceneObject("green", "star", 16.0, 32.0, 10.0))
    above = (SceneObject("red", "circle", 31.0, 16.0, 10.0), SceneObject("green", "star", 33.0, 48.0, 10.0))
    colours = (
        SceneObject("green", "circle", circle.x, circle.y, 10.0),
        SceneObject("red", "star", star.x, star.y, 10.0),
    )
    for objects, wrong in ((places, {"relation"}), (above, {"relation"}), (colours, {"colour"})):
        verdict = judge(PAIR, Reading("white", objects))
        assert {name for name, right in verdict.items() if not right} == wrong | {"all"}
    assert judge(PAIR, Reading("white", (star, circle)))["all"]


def test_image_of_another_size_is_refused() -> None:
    with pytest.raises(SettingsError, match="512x512"):
        read_scene(Image.new("RGB", (512, 512)))
