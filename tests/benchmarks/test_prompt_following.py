"""The benchmark of prompt following checks its reader, and counts what a model got right."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sdmodule
from benchmarks import prompt_following
from benchmarks.inpaint_scenes import draw_inpaint_scene, judge_inpainting
from benchmarks.presets import preset
from benchmarks.report import command_line
from benchmarks.scene_defects import CHANGES
from sdmodule.data.toy.scenes import Scene, caption, render
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule


class _Painter:
    """A stand-in for a model that draws every prompt right, except that hearts become circles; it has a real VAE."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        scenes = prompt_following.draw_scenes(seed=0, share=10)
        self.scenes = {caption(scene): scene for _, scene in scenes}
        self.calls: list[dict[str, Any]] = []
        self.parts: Any = None

    @classmethod
    def from_pretrained(cls, name: str, **settings: object) -> _Painter:
        assert (name, settings["task"], settings["tome"]["ratio"]) == ("tiny", "text2image", 0.0)
        painter = cls()
        painter.parts = StableDiffusionModule.from_pretrained(name).parts
        return painter

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
    monkeypatch.setattr(prompt_following, "WRONG", 20)
    monkeypatch.setattr(sdmodule, "StableDiffusionModule", _Painter, raising=False)
    target, sheet = tmp_path / "new" / "result.json", tmp_path / "sheet.png"
    prompt_following.run(["--quick", "batch_size=7", "--json", str(target), "--sheet", str(sheet)])
    result = json.loads(target.read_text())
    assert result["command"] == (
        "python benchmarks/prompt_following.py --quick batch_size=7 --json result.json --sheet sheet.png"
    )
    assert {"cpu", "cores", "memory_gib", "gpu"} == set(result["hardware"])
    assert [row["all"]["rate"] for row in result["reader"]] == [1.0, 1.0, 1.0]
    assert [row["scenes"] for row in result["reconstructed"]] == list(few)
    assert {row["change"] for row in result["wrong"]} == set(CHANGES)
    assert sum(row["called right"]["right"] for row in result["wrong"]) <= 0.05 * sum(
        r["images"] for r in result["wrong"]
    )

    drawn = prompt_following.draw_scenes(seed=0, share=10)
    for row in result["rows"]:
        scenes = [scene for kind, scene in drawn if kind == row["scenes"]]
        paintable = sum(all(item.shape != "heart" for item in scene.objects) for scene in scenes)
        assert row["images"] == len(scenes)
        assert row["shape"]["right"] == row["all"]["right"] == paintable
        assert row["colour"]["rate"] == 1.0
    assert result["rows"][0]["shape"]["rate"] == 0.8
    assert Image.open(sheet).size == (576, 576)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("two objects", "circles with corners", "through the autoencoder"))


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
    for _ in range(20):
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
