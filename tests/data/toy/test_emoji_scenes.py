"""Scenes of things: what a caption says is in the image, and what is held out is in no training image."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from PIL import Image

from sdmodule.data.toy.emoji_dataset import EmojiScenesDataModule, EmojiScenesDataset
from sdmodule.data.toy.emoji_scenes import (
    EmojiScene,
    Thing,
    emoji_caption,
    render_emoji,
    sample_thing,
    sample_things,
    with_article,
)
from sdmodule.data.toy.scenes import COLOURS, RELATIONS
from sdmodule.data.toy.sprites import Sprites
from sdmodule.errors import SettingsError

NAMES = [f"thing {letter}" for letter in "abcdefghijklmnopqrst"]


@pytest.fixture
def folder(tmp_path):
    """Twenty things in two styles: discs, grey in one and pink in the other."""
    for style, colour in {"noto": (128, 128, 128, 255), "flat": (255, 105, 180, 255)}.items():
        (tmp_path / style).mkdir()
        disc = np.zeros((32, 32, 4), dtype=np.uint8)
        rows, columns = np.mgrid[:32, :32]
        disc[(rows - 15.5) ** 2 + (columns - 15.5) ** 2 < 225] = colour
        for name in NAMES:
            Image.fromarray(disc).save(tmp_path / style / f"{name}.png")
    return tmp_path


def found(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Pixels of a colour."""
    return (np.abs(np.asarray(image).astype(int) - colour).sum(-1) < 12).nonzero()


@pytest.mark.parametrize(
    ("words", "expected"),
    {
        "fox": "a fox",
        "owl": "an owl",
        "unicorn": "a unicorn",
        "hourglass done": "an hourglass done",
        "grapes": "grapes",
        "octopus": "an octopus",
        "compass": "a compass",
        "tennis": "a tennis",
    }.items(),
)
def test_things_have_their_article(words, expected):
    assert with_article(words, words) == expected


def test_captions_say_size_place_relation_and_style():
    thing, other = Thing("owl", 0, 0, 1), Thing("fox", 0, 0, 1)
    one = EmojiScene("blue", "noto", (thing,), "small", "at the top")
    assert emoji_caption(one) == "a small owl at the top on a blue background"
    two = EmojiScene("orange", "3d", (thing, other), relation="above")
    assert emoji_caption(two) == "an owl above a fox on an orange background, 3d style"


def test_an_image_shows_what_its_caption_says(folder):
    sprites, rng = Sprites(folder, ["noto", "flat"]), random.Random(0)
    for _ in range(40):
        scene = sample_thing(rng, sprites, placed=1.0)
        image = render_emoji(scene, sprites)
        assert image.getpixel((0, 0)) == COLOURS[scene.background]
        rows, columns = found(image, (128, 128, 128) if scene.style == "noto" else (255, 105, 180))
        assert rows.size > 200
        left_top = {"on the left": columns, "at the top": rows}.get(scene.place)
        right_bottom = {"on the right": columns, "at the bottom": rows}.get(scene.place)
        assert left_top is None or left_top.mean() < 29
        assert right_bottom is None or right_bottom.mean() > 35
        assert (scene.size == "small") == (rows.max() - rows.min() < 27)


def test_two_things_stand_as_the_caption_says_and_do_not_touch_the_border(folder):
    sprites, rng = Sprites(folder, ["flat"]), random.Random(0)
    for _ in range(40):
        scene = sample_things(rng, sprites)
        first, second = scene.things
        dx, dy = RELATIONS[scene.relation]
        assert (first.x - second.x) * dx + (first.y - second.y) * dy > 20
        pixels = np.asarray(render_emoji(scene, sprites))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == COLOURS[scene.background]).all()


def test_training_shows_nothing_that_is_held_out(folder):
    sprites = Sprites(folder, ["noto", "flat"])
    trained, held_out = sprites.combinations(), sprites.combinations(held_out=True)
    assert held_out and len(trained) + len(held_out) == 40
    assert len({name for name, _ in held_out}) == len(held_out)  # no thing in both styles
    data = EmojiScenesDataset(sprites, 300, shapes=0.0)
    for caption in (data.caption(index) for index in range(300)):
        style = "flat" if caption.endswith("flat style") else "noto"
        names = re.findall(r"thing \w", caption)
        assert all((name, style) in trained for name in names), caption
        assert len(names) == 1 or not sprites.is_held_out_pair(*names), caption
    unseen = EmojiScenesDataset(sprites, 100, shapes=0.0, held_out=True)
    for caption in (unseen.caption(index) for index in range(100)):
        style = "flat" if caption.endswith("flat style") else "noto"
        names = re.findall(r"thing \w", caption)
        if len(names) == 2:
            assert sprites.is_held_out_pair(*names) and all((name, style) in trained for name in names), caption
        else:
            assert (names[0], style) in held_out, caption


def test_what_is_held_out_does_not_depend_on_what_is_chosen(folder):
    few = Sprites(folder, ["noto"], NAMES[:7])
    every = Sprites(folder, ["flat", "noto"])
    assert set(few.combinations(held_out=True)) <= set(every.combinations(held_out=True))


def test_shares_mix_things_shapes_and_collages(folder):
    captions = [
        example["caption"]
        for example in map(
            EmojiScenesDataModule(str(folder), size=16, shapes=0.3, collages=0.3).train_set.__getitem__, range(200)
        )
    ]
    things = sum("thing" in caption for caption in captions)
    assert 40 < captions.count("") < 80 and 50 < things < 110 and things + captions.count("") < 160
    content = {EmojiScenesDataset(Sprites(folder, [style]), 1).content(0) for style in ("noto", "flat")}
    assert len(content) == 2  # cached latents of one are not taken for the other


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sprites": "no/such"}, "data.sprites=no/such: not found"),
        ({"styles": []}, "data.styles=[]: is empty"),
        ({"styles": ["oil"]}, "has no sprites in oil; it has ['flat', 'noto']"),
        ({"things": ["fox"]}, "data.things: fox has no sprite"),
        ({"things": NAMES[:1]}, "data.two_objects=0.3: needs at least two things"),
        ({"shapes": 0.7, "collages": 0.7}, "together must be at most 1"),
        ({"placed": 1.5}, "data.placed=1.5"),
    ],
)
def test_a_wrong_setting_is_one_sentence(folder, settings, said):
    with pytest.raises(SettingsError, match=re.escape(said)):
        EmojiScenesDataModule(**{"sprites": str(folder), **settings})


def test_nothing_is_held_out_of_a_judge_of_all_things(sprites):
    held_out = {f"{name}, {style}" for name, style in Sprites(sprites, ["noto", "flat"]).combinations(True)}
    for hold_out in (True, False):
        data = EmojiScenesDataModule(
            str(sprites), ["noto", "flat"], train_length=600, placed=0, shapes=0, two_objects=0, hold_out=hold_out
        )
        captions = [data.train_set.caption(k) for k in range(600)]
        seen = {re.match(r"an? (.*) on", text)[1] + (", flat" if "flat" in text else ", noto") for text in captions}
        assert bool(seen & held_out) != hold_out
    with pytest.raises(SettingsError, match=r"data\.hold_out=1: must be true or false"):
        EmojiScenesDataModule(str(sprites), hold_out=1)
