"""The reader reads what the renderer drew, and the benchmark counts what a model got right."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

import sdmodule
from benchmarks import prompt_following
from benchmarks.inpaint_scenes import draw_inpaint_scene, judge_inpainting
from benchmarks.presets import preset
from benchmarks.report import command_line
from benchmarks.scene_reader import UNCLEAR, Reading, judge, read_scene
from sdmodule.data.toy.scenes import Scene, SceneObject, caption, render, sample_double, sample_single
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


def _spoil(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), dtype=float)
    noisy = blurred + rng.normal(0.0, 6.0, blurred.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


def test_reader_reads_rendered_scenes() -> None:
    assert np.mean([judge(scene, read_scene(render(scene)))["all"] for scene in _scenes(30)]) >= 0.99


def test_reader_reads_noisy_and_blurred_scenes() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([judge(scene, read_scene(_spoil(render(scene), rng)))["all"] for scene in _scenes(30)]) >= 0.97


def test_reader_measures_the_object() -> None:
    reading = read_scene(render(RED_HEART))
    (found,), (painted,) = reading.objects, RED_HEART.objects
    assert (reading.background, found.colour, found.shape) == ("blue", "red", "heart")
    assert (found.x, found.y, found.radius) == pytest.approx((painted.x, painted.y, painted.radius), abs=0.25)


def test_a_blend_of_two_colours_is_no_object() -> None:
    scene = Scene("yellow", (SceneObject("red", "star", 32.0, 32.0, 16.0),))
    reading = read_scene(render(scene).filter(ImageFilter.GaussianBlur(1.0)))
    assert [item.colour for item in reading.objects] == ["red"]


def test_speck_is_ignored_and_a_second_object_is_an_error() -> None:
    for side, right in ((3, True), (8, False)):
        image = render(RED_HEART)
        ImageDraw.Draw(image).rectangle((50, 50, 50 + side, 50 + side), fill="white")
        verdict = judge(RED_HEART, read_scene(image))
        assert (verdict["count"], verdict["all"], verdict["shape"]) == (right, right, True)


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
        "colour": False,
        "shape": False,
        "size": False,
        "place": False,
        "all": False,
    }


def test_judge_counts_only_what_the_caption_states() -> None:
    scene = Scene("blue", (SceneObject("red", "heart", 32.0, 32.0, 12.0),))
    assert set(judge(scene, read_scene(render(scene)))) == {"background", "count", "colour", "shape", "all"}


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


class _Painter:
    """A stand-in for a model that draws every prompt right, except that hearts become circles."""

    def __init__(self) -> None:
        scenes = prompt_following.draw_scenes(seed=0, share=10)
        self.scenes = {caption(scene): scene for _, scene in scenes}
        self.calls: list[dict[str, Any]] = []

    @classmethod
    def from_pretrained(cls, name: str, **settings: object) -> _Painter:
        assert (name, settings["task"], settings["tome"]["ratio"]) == ("tiny", "text2image", 0.0)
        return cls()

    def infer(self, prompts: Sequence[str], **options: object) -> dict[str, list[Image.Image]]:
        self.calls.append(options | {"count": len(prompts)})
        return {"samples": [render(self._misread(self.scenes[prompt])) for prompt in prompts]}

    def _misread(self, scene: Scene) -> Scene:
        painted = [replace(item, shape=item.shape.replace("heart", "circle")) for item in scene.objects]
        return replace(scene, objects=tuple(painted))


def test_benchmark_counts_what_the_model_gets_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {kind: (prompts // 2, prompts // 2, draw) for kind, (prompts, _, draw) in prompt_following.KINDS.items()}
    monkeypatch.setattr(prompt_following, "KINDS", few)
    monkeypatch.setattr(sdmodule, "StableDiffusionModule", _Painter, raising=False)
    target, sheet = tmp_path / "new" / "result.json", tmp_path / "sheet.png"
    prompt_following.run(["--quick", "batch_size=7", "--json", str(target), "--sheet", str(sheet)])
    result = json.loads(target.read_text())
    assert result["command"] == (
        "python benchmarks/prompt_following.py --quick batch_size=7 --json result.json --sheet sheet.png"
    )
    assert {"cpu", "cores", "memory_gib", "gpu"} == set(result["hardware"])
    assert [row["all"]["rate"] for row in result["reader"]] == [1.0, 1.0, 1.0]

    drawn = prompt_following.draw_scenes(seed=0, share=10)
    for row in result["rows"]:
        scenes = [scene for kind, scene in drawn if kind == row["scenes"]]
        paintable = sum(all(item.shape != "heart" for item in scene.objects) for scene in scenes)
        assert row["images"] == len(scenes)
        assert row["shape"]["right"] == row["all"]["right"] == paintable
        assert row["colour"]["rate"] == 1.0
    assert result["rows"][0]["shape"]["rate"] == 0.8
    assert Image.open(sheet).size == (576, 576)
    assert "two objects" in capsys.readouterr().out


def test_an_images_seed_does_not_depend_on_the_batch() -> None:
    painter: Any = _Painter()
    prompts = list(painter.scenes)[:20]
    prompt_following.sample(painter, prompts, prompt_following.parse(["batch_size=8", "seed=5", "--steps", "3"]))
    assert [(call["seed"], call["count"]) for call in painter.calls] == [(5, 8), (13, 8), (21, 4)]
    assert all(call["num_inference_steps"] == 3 and "guidance_scale" not in call for call in painter.calls)


def test_overrides_and_options_mix() -> None:
    settings = prompt_following.parse(["steps=20", "--guidance-scale", "5", "scheduler=ddim", "--quick"])
    assert (settings.steps, settings.guidance_scale, settings.scheduler, settings.quick) == (20, 5.0, "ddim", True)
    assert settings.pretrained == "tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eta=1"], "guidance_scale, pretrained"),
        (["task=paint"], "invalid choice: 'paint'"),
        (["steps"], "write key=value"),
        (["steps=0"], "steps=0: must be at least 1"),
        (["steps=many"], "invalid int value: 'many'"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_a_bad_argument_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        prompt_following.parse(arguments)


def test_each_task_has_its_model_and_tome_takes_overrides() -> None:
    settings = prompt_following.parse(["task=inpaint", "tome.ratio=0.5", "tome.use_rand=false", "tome.engine=tomesd"])
    assert settings.pretrained == "tiny-inpaint"
    assert preset(settings.speed, *settings.presets)["tome"] == {
        **preset("exact")["tome"], "ratio": 0.5, "use_rand": False, "engine": "tomesd"
    }  # fmt: skip


def test_an_inpaint_scene_asks_for_another_object_within_its_box() -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = draw_inpaint_scene(rng)
        before, after = render(scene.before), render(scene.wanted)
        verdict = judge_inpainting(scene, before, after)
        assert all(verdict.values())
        (old,), (new,) = scene.before.objects, scene.wanted.objects
        assert old.colour != new.colour and old.shape != new.shape and new.colour != scene.before.background
        assert not judge_inpainting(scene, before, before)["object"]
        x0, y0, x1, _ = scene.box
        after.putpixel((x0 - 1 if x0 else x1, y0), (1, 2, 3))
        assert not judge_inpainting(scene, before, after)["kept"]


def test_recorded_command_has_no_absolute_path() -> None:
    command = ["/opt/run.py", "--json", "/home/me/a.json", "pretrained=/models/mine", "steps=20"]
    assert command_line(command) == "python run.py --json a.json pretrained=mine steps=20"


def test_inpainting_samples_in_batches() -> None:
    class Inpainter:
        def infer(self, prompts: Sequence[str], **options: Any) -> dict[str, list[Image.Image]]:
            assert len(prompts) == len(options["image"]) == len(options["mask"])
            return {"samples": options["image"]}

    rng = random.Random(0)
    scenes = [draw_inpaint_scene(rng) for _ in range(5)]
    befores = [render(scene.before) for scene in scenes]
    masked = [(before, scene.box) for before, scene in zip(befores, scenes, strict=True)]
    model: Any = Inpainter()
    images = prompt_following.sample(model, ["a star"] * 5, prompt_following.parse(["batch_size=2"]), masked)
    assert images == befores
