"""Things, styles and backgrounds are read by a scorer: right where it is right, of two things each in its own half."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from benchmarks import thing_following
from benchmarks.thing_following import draw_scenes
from benchmarks.thing_reader import ThingReader, judge, thing_views
from sdmodule.data.toy.emoji_scenes import EmojiScene, Thing
from sdmodule.data.toy.sprites import Sprites
from sdmodule.errors import SettingsError
from sdmodule.evaluation.scorer import Scorer

THINGS = {"fox": (255, 0, 0), "owl": (0, 255, 0), "cat": (0, 0, 255)}
GROUNDS = {"white": (250, 250, 250), "black": (18, 18, 18)}
NAMES = list(THINGS)
STYLES = ["noto", "flat"]


class ByColour(Scorer):
    """Knows things by the colour of the middle, and backgrounds by the corner: one axis for each of their values."""

    name = "by colour"

    def image_features(self, images):
        rows = []
        for image in images:
            middle, corner = (image.getpixel(place) for place in ((image.width // 2, image.height // 2), (1, 1)))
            thing = [float(middle == colour) for colour in THINGS.values()]
            ground = [float(max(abs(a - b) for a, b in zip(corner, c)) < 9) for c in GROUNDS.values()]
            rows.append([*thing, *ground, 0.5, 0.0])
        return torch.tensor(rows)

    def text_features(self, texts):
        rows = []
        for text in texts:
            known = [float(f"{name} " in text) for name in (*THINGS, *GROUNDS)]
            rows.append([*known, *((0.0, 1.0) if "flat style" in text else (1.0, 0.0))])
        return torch.tensor(rows)


def scene(*names: str, background: str = "white", style: str = "noto", relation: str | None = None) -> EmojiScene:
    places = {None: [(32, 32)], "above": [(32, 16), (32, 48)], "to the right of": [(48, 32), (16, 32)]}[relation]
    things = tuple(Thing(name, x, y, 12.0) for name, (x, y) in zip(names, places))
    return EmojiScene(background, style, things, relation=relation)


def painted(scene: EmojiScene) -> Image.Image:
    image = Image.new("RGB", (64, 64), GROUNDS[scene.background])
    for thing in scene.things:
        box = [round(v) for v in (thing.x - 12, thing.y - 12, thing.x + 12, thing.y + 12)]
        image.paste(THINGS[thing.name], tuple(box))
    return image


@pytest.mark.parametrize("relation", ["above", "to the right of"])
def test_of_two_things_each_is_read_in_its_own_half(relation):
    asked = scene("fox", "owl", relation=relation)
    reader = ThingReader(ByColour(), NAMES, STYLES)
    [[first, second]] = reader.read_all([asked], [painted(asked)])
    assert (first.names[0], second.names[0]) == ("fox", "owl") and first.background == "white"
    assert judge(asked, [first, second])["all"]
    swapped = judge(asked, [second, first])
    assert not swapped["name"] and swapped["name in 5"] and swapped["background"]
    assert [view.size for view in thing_views(asked, Image.new("RGB", (128, 128)))] == [(64, 64)] * 2


def test_a_wrong_thing_style_or_background_is_found():
    reader = ThingReader(ByColour(), NAMES, STYLES)
    asked = [scene("fox"), scene("fox", background="black"), scene("fox", style="flat"), scene("owl")]
    shown = [painted(scene("fox"))] * 4
    verdicts = [judge(one, read) for one, read in zip(asked, reader.read_all(asked, shown))]
    assert [verdict["all"] for verdict in verdicts] == [True, False, False, False]
    assert [verdict["name"] for verdict in verdicts] == [True, True, True, False]
    assert [verdict["background"] for verdict in verdicts] == [True, False, True, True]
    assert [verdict["style"] for verdict in verdicts] == [True, True, False, True]


@pytest.mark.slow
def test_the_benchmark_checks_the_scorer_samples_and_reports(checkpoint, clip_folder, sprites, tmp_path, capsys):
    common = ["--quick", "--sprites", str(sprites), "--scorer", str(clip_folder), "--json", str(tmp_path / "r.json")]
    sampled = ["--pretrained", str(checkpoint), "--steps", "1", "--sheet", str(tmp_path / "sheet.png")]
    report = thing_following.run([*common, *sampled])
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == report["rows"]
    assert [row["scenes"] for row in report["rows"]] == ["centred", "placed", "held-out", "two things"]
    assert [row["images"] for row in report["rows"]] == [10] * 4
    assert all(row["images"] == 50 and 0 <= row["all"] <= row["name"] <= row["name in 5"] for row in report["reader"])
    assert Image.open(tmp_path / "sheet.png").width > 300
    assert report["names"] == 40 and "The scorer, on 200 rendered images, among 40 names" in capsys.readouterr().out

    alone = thing_following.run([*common, "--scorer-only", "--styles", "noto", "flat"])
    assert alone["rows"] == report["reader"]
    few, more = (draw_scenes(Sprites(sprites, ["noto"]), 0, count) for count in (2, 3))
    assert set(few) < set(more)
    assert "reader" not in alone


def test_wrong_arguments_end_in_a_sentence(sprites, tmp_path):
    cases = {
        ("--sprites", str(tmp_path / "none")): "not found; make it with python examples/embedded/make_sprites.py",
        ("--sprites", str(sprites), "--things", "none.txt"): "--things none.txt: not found",
        ("--sprites", str(sprites), "--steps", "0"): "--steps 0: must be at least 1",
        ("--sprites", str(sprites), "--scorer-only", "--sheet", "a.png"): "--sheet: is of samples",
        ("--sprites", str(sprites), "--styles", "oil"): "has no sprites in oil",
    }
    for arguments, message in cases.items():
        with pytest.raises(SettingsError, match=message):
            thing_following.run(arguments)
