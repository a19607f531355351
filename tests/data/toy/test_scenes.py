"""The toy scenes: captions follow the grammar, and images show what their captions say."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from sdmodule.data.toy.scenes import (
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    PLACES,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    caption,
    render,
    render_collage,
    sample_double,
    sample_scene,
    sample_single,
)

COLOUR, SHAPE, PLACE, RELATION = ("|".join(filter(None, words)) for words in (COLOURS, SHAPES, PLACES, RELATIONS))
OBJECT = rf"(?P<colour{{0}}>{COLOUR}) (?P<shape{{0}}>{SHAPE})"
BACKGROUND = rf"on a (?P<background>{COLOUR}) background"
GRAMMAR = [
    re.compile(rf"a ((?P<size>small|large) )?{OBJECT.format(0)}( (?P<place>{PLACE}))? {BACKGROUND}"),
    re.compile(rf"a {OBJECT.format(0)} (?P<relation>{RELATION}) a {OBJECT.format(1)} {BACKGROUND}"),
]


def scenes(count: int, **settings) -> list[Scene]:
    rng = random.Random(0)
    return [sample_scene(rng, **settings) for _ in range(count)]


def pairs(scene: Scene) -> list[tuple[str, str]]:
    return [(item.colour, item.shape) for item in scene.objects]


def colour_at(scene: Scene, item: SceneObject) -> tuple[int, ...]:
    return render(scene).getpixel((round(item.x), round(item.y)))


def test_every_caption_follows_the_grammar_and_describes_its_scene():
    for scene in scenes(2000, held_out=None):
        words = GRAMMAR[len(scene.objects) - 1].fullmatch(caption(scene)).groupdict()
        assert [(words[f"colour{k}"], words[f"shape{k}"]) for k in range(len(scene.objects))] == pairs(scene)
        said = {"size": scene.size, "place": scene.place, "relation": scene.relation, "background": scene.background}
        assert {name: words.get(name) for name in said} == said


def test_held_out_pairs_never_occur_in_training():
    assert not {pair for scene in scenes(20_000) for pair in pairs(scene)} & HELD_OUT


def test_held_out_scenes_show_all_held_out_pairs_and_no_others():
    assert {pair for scene in scenes(20_000, held_out=True) for pair in pairs(scene)} == HELD_OUT


def test_none_means_every_pair():
    shown = {pair for scene in scenes(5000, held_out=None) for pair in pairs(scene)}
    assert len(shown) == len(COLOURS) * len(SHAPES)


def test_the_same_seed_gives_the_same_image():
    first, second = (render(sample_scene(random.Random(7))) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != render(sample_scene(random.Random(8))).tobytes()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_of_two_objects_is_as_requested(share):
    doubles = [len(scene.objects) == 2 for scene in scenes(2000, two_objects=share)]
    assert np.mean(doubles) == pytest.approx(share, abs=0.04)


def test_every_object_is_inside_the_image_in_its_colour():
    rng = random.Random(0)
    for draw in [sample_single, sample_double] * 150:
        scene = draw(rng, held_out=None)
        for item in scene.objects:
            assert all(item.radius < value < IMAGE_SIZE - item.radius for value in (item.x, item.y))
            assert colour_at(scene, item) == COLOURS[item.colour]
            assert item.colour != scene.background


def test_two_objects_differ_and_do_not_overlap():
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_double(rng, held_out=None)
        first, second = (Scene("black", (SceneObject("white", o.shape, o.x, o.y, o.radius),)) for o in scene.objects)
        assert not ((np.asarray(render(first)) > 18) & (np.asarray(render(second)) > 18)).any()
        assert pairs(scene)[0] != pairs(scene)[1]


def test_places_and_relations_are_where_the_words_say():
    middle = IMAGE_SIZE / 2
    for scene in scenes(2000):
        first = scene.objects[0]
        if len(scene.objects) == 2:
            second, (dx, dy) = scene.objects[1], RELATIONS[scene.relation]
            along, across = first.x - second.x, first.y - second.y
        else:
            (dx, dy), along, across = PLACES[scene.place], first.x - middle, first.y - middle
        assert along * dx + across * dy > 0 or dx == dy == 0
        assert abs(along * dy + across * dx) <= 5


def test_sizes_do_not_overlap():
    radii: dict[str | None, list[float]] = {"small": [], "large": [], None: []}
    for scene in scenes(2000, two_objects=0.0):
        radii[scene.size].append(scene.objects[0].radius)
    assert max(radii["small"]) < min(radii[None]) and max(radii["small"]) < min(radii["large"])


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_keep_their_proportions_at_any_size(shape):
    scene = Scene("black", (SceneObject("white", shape, 32.0, 32.0, 16.0),))
    images = [render(scene, size) for size in (32, 64, 256)]
    assert [image.size for image in images] == [(32, 32), (64, 64), (256, 256)]
    small, normal, large = (np.asarray(image).mean() for image in images)
    assert small == pytest.approx(large, rel=0.1) and normal == pytest.approx(large, rel=0.05)


def test_collages_differ_by_seed_and_are_reproducible():
    images = [render_collage(random.Random(k)) for k in (0, 0, 1)]
    assert images[0].tobytes() == images[1].tobytes() != images[2].tobytes()
    assert images[0].size == (IMAGE_SIZE, IMAGE_SIZE) and images[0].mode == "RGB"
