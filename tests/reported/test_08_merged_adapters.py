"""Row 8: adapters merged equal those beside the weights, for any order, method and scale; scale 0 changes nothing."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from safetensors.torch import save_file

from sdmodule.components.checkpoint import load_components
from sdmodule.module import StableDiffusionModule
from tests.reported.test_07_adapter_layouts import CONV, LYCORIS, OUT, SQUARE, WIDE, Drawn, lycoris

pytestmark = pytest.mark.slow

KINDS = ("lora", "dora", "loha", "lokr", "dora by inputs")


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """An adapter of each method on overlapping layers, and the whole weights with each alone."""
    folder, drawn = tmp_path_factory.mktemp("adapters"), Drawn(load_components(str(checkpoint)))
    made = {}
    for name in (*KINDS, "dora again"):
        kind, settings = LYCORIS[name.removesuffix(" again")]
        tensors, weights = {}, {}
        for layer in (SQUARE, WIDE, CONV, OUT):
            state, weights[layer] = lycoris(kind, drawn, layer, 2.0, **settings)
            tensors |= state
        file = folder / f"{name}.safetensors"
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, file)
        made[name] = file, weights
    return made


def sampled(checkpoint, chosen: list[dict], merge: bool):
    adapters = {"files": chosen, "merge": merge}
    module = StableDiffusionModule.from_pretrained(str(checkpoint), adapters=adapters)
    options = {"num_inference_steps": 2, "seed": 3, "return_type": "tensor", "show_progress": False}
    return module.infer("a red circle", **options)["samples"]


PAIRS = [("lora", "dora"), ("dora", "lora"), ("dora", "dora again"), ("loha", "lokr"), ("dora by inputs", "dora")]


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.6, -0.8)])
@pytest.mark.parametrize("pair", PAIRS)
def test_merged_equals_beside(checkpoint, files, pair, scales):
    chosen = [{"path": str(files[name][0]), "scale": scale} for name, scale in zip(pair, scales, strict=True)]
    beside, merged = (sampled(checkpoint, chosen, merge) for merge in (False, True))
    torch.testing.assert_close(merged, beside, rtol=0, atol=2e-5)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_scale_0_changes_nothing(checkpoint, files, name, merge):
    plain = sampled(checkpoint, [], False)
    assert torch.equal(sampled(checkpoint, [{"path": str(files[name][0]), "scale": 0.0}], merge), plain)


@pytest.mark.parametrize("scale", [0.5, -1.0])
@pytest.mark.parametrize("name", KINDS)
def test_a_scale_is_a_share_of_the_way(checkpoint, files, name, scale):
    """``W + s (W' - W)``, where ``W'`` is the weight at scale 1."""
    file, weights = files[name]
    module = StableDiffusionModule.from_pretrained(
        str(checkpoint), adapters={"files": [{"path": str(file), "scale": scale}], "merge": True}
    )
    base = load_components(str(checkpoint)).unet
    for layer, whole in weights.items():
        own = base.get_submodule(layer).weight
        found = module.unet.get_submodule(layer).weight
        torch.testing.assert_close(found, own + scale * (whole - own), rtol=1e-5, atol=2e-6)


def test_the_order_of_adapters_does_not_matter(checkpoint, files):
    chosen = [{"path": str(files[name][0]), "scale": 0.7} for name in ("lora", "dora", "lokr")]
    images = [sampled(checkpoint, list(order), True) for order in permutations(chosen)]
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=0, atol=2e-5)
