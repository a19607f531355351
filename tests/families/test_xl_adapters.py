"""Low-rank adapters of Stable Diffusion XL, in the layouts of diffusers and kohya, sample the images of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdmodule.components.checkpoint import load_components
from sdmodule.components.original_names import unet_layer
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from tests.xl_parts import xl_pipeline

PROMPT = "a red circle on a blue background"
PARTS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
LAYOUTS = ("diffusers", "kohya", "original")


@pytest.fixture(scope="module")
def files(xl_checkpoint, tmp_path_factory):
    """One adapter of rank 2 and alpha 2 for all three networks, in each layout."""
    folder, parts = tmp_path_factory.mktemp("adapters"), load_components(str(xl_checkpoint))
    generator = torch.Generator().manual_seed(0)
    weights = {layout: {} for layout in LAYOUTS}
    for part, prefix in PARTS.items():
        network = getattr(parts, part)
        for name, layer in network.named_modules():
            if not isinstance(layer, nn.Linear) or not name.endswith(ADAPTED):
                continue
            down = 0.2 * torch.randn(2, layer.in_features, generator=generator)
            up = 0.2 * torch.randn(layer.out_features, 2, generator=generator)
            full = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            weights["diffusers"] |= {
                f"{part}.{full}.lora_A.weight": down,
                f"{part}.{full}.lora_B.weight": up,
            }
            original = unet_layer(name, network) if part == "unet" else full
            for layout, given in (("kohya", full), ("original", original)):
                flat = f"{prefix}_{given.replace('.', '_')}"
                weights[layout] |= {
                    f"{flat}.lora_down.weight": down,
                    f"{flat}.lora_up.weight": up,
                    f"{flat}.alpha": torch.tensor(2.0),
                }
    for layout, tensors in weights.items():
        save_file(tensors, folder / f"{layout}.safetensors")
    return {layout: folder / f"{layout}.safetensors" for layout in LAYOUTS}


def images(module):
    options = {"num_inference_steps": 3, "return_type": "numpy", "show_progress": False}
    return module.infer(PROMPT, negative_prompt="blue", seed=1, **options)["samples"]


def theirs(pipeline):
    generator = torch.Generator().manual_seed(1)
    return pipeline(PROMPT, negative_prompt="blue", num_inference_steps=3, generator=generator, output_type="np").images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_images_are_those_of_diffusers(xl_checkpoint, files, layout):
    pipeline = xl_pipeline(xl_checkpoint)
    plain = theirs(pipeline)
    pipeline.load_lora_weights(files[layout])
    ours = images(StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=files[layout]))
    assert np.abs(ours - theirs(pipeline)).max() < 1e-4
    assert np.abs(ours - plain).max() > 1e-2


def test_scales_and_merging(xl_checkpoint, files):
    half = [{"path": str(files["kohya"]), "scale": 0.5}]
    attached = StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=half)
    merged = StableDiffusionModule.from_pretrained(xl_checkpoint, adapters={"files": half, "merge": True})
    pipeline = xl_pipeline(xl_checkpoint)
    plain = theirs(pipeline)
    pipeline.load_lora_weights(files["kohya"], adapter_name="a")
    pipeline.set_adapters("a", 0.5)
    assert np.abs(images(attached) - theirs(pipeline)).max() < 1e-4
    assert np.abs(images(attached) - images(merged)).max() < 1e-4
    attached.set_adapters([0])
    assert np.array_equal(images(attached), plain)


def test_every_network_is_adapted(xl_checkpoint, files):
    module = StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=files["kohya"])
    for name in PARTS:
        assert any("lora_A" in key for key in module.parts.networks[name].state_dict()), name


ATTENTION = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"


@pytest.mark.parametrize(
    ("width", "title"),
    [
        (768, "Stable Diffusion 1.x"),
        (1024, "Stable Diffusion 2.x"),
        (2048, "Stable Diffusion XL"),
        (1280, "the refiner"),
    ],
)
def test_an_adapter_of_another_family_is_named(checkpoint, xl_checkpoint, tmp_path, width, title):
    for key in (ATTENTION, "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"):
        save_file({key: torch.zeros(4, width)}, tmp_path / "a.safetensors")
        for pretrained in (checkpoint, xl_checkpoint):
            with pytest.raises(SettingsError, match=rf"a\.safetensors: is for {title}"):
                StableDiffusionModule.from_pretrained(pretrained, adapters=tmp_path / "a.safetensors")


def test_an_adapter_of_a_second_text_encoder_is_refused_for_one(checkpoint, files):
    for layout, words in (("kohya", "no layer"), ("diffusers", "unknown key|adapts")):
        with pytest.raises(SettingsError, match=words):
            StableDiffusionModule.from_pretrained(checkpoint, adapters=files[layout])


def test_a_learned_word_of_one_encoder_is_refused(xl_checkpoint, tmp_path):
    save_file({"<my-cat>": torch.zeros(1, 32)}, tmp_path / "word.safetensors")
    with pytest.raises(SettingsError, match=r"a learned word: does not work with Stable Diffusion XL yet"):
        StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=tmp_path / "word.safetensors")
