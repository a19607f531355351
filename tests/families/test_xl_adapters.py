"""Low-rank adapters of Stable Diffusion XL, in the layouts of diffusers and kohya, sample the images of diffusers."""

from __future__ import annotations

import json
import shutil

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


WIDTHS = {"clip_l": 32, "clip_g": 48}


def test_a_learned_word_of_the_other_family_is_refused(checkpoint, xl_checkpoint, tmp_path):
    file = tmp_path / "word.safetensors"
    save_file({"<my-cat>": torch.zeros(1, 32)}, file)
    words = r"a learned word of one set of vectors, .* Stable Diffusion XL, which .* \(keys clip_l and clip_g\)"
    with pytest.raises(SettingsError, match=words):
        StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=file)
    save_file({key: torch.zeros(1, width) for key, width in WIDTHS.items()}, file)
    words = r"a learned word for Stable Diffusion XL \(keys clip_g and clip_l\), .* Stable Diffusion 1.x and 2.x"
    with pytest.raises(SettingsError, match=words):
        StableDiffusionModule.from_pretrained(checkpoint, adapters=file)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 47)},
            r"shape \(1, 47\), .* takes 1 to 75 vectors of 48",
        ),
        ({"clip_l": torch.zeros(1, 32), "clip_h": torch.zeros(1, 48)}, "neither a low-rank adapter"),
        ({"clip_l": torch.zeros(1, 2, 32), "clip_g": torch.zeros(1, 48)}, r"shape \(1, 2, 32\)"),
    ],
)
def test_vectors_of_other_widths_are_refused(xl_checkpoint, tmp_path, tensors, words):
    save_file(tensors, tmp_path / "word.safetensors")
    with pytest.raises(SettingsError, match=words):
        StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=tmp_path / "word.safetensors")


@pytest.mark.parametrize("vectors", [1, 2])
def test_a_learned_word_is_named_by_its_file_and_gives_the_images_of_diffusers(xl_checkpoint, tmp_path, vectors):
    generator, file = torch.Generator().manual_seed(0), tmp_path / "mycat.safetensors"
    learned = {key: torch.randn(vectors, width, generator=generator) for key, width in WIDTHS.items()}
    save_file(learned, file)
    pipeline = xl_pipeline(xl_checkpoint)
    parts = {
        "clip_l": (pipeline.text_encoder, pipeline.tokenizer),
        "clip_g": (pipeline.text_encoder_2, pipeline.tokenizer_2),
    }
    for key, (encoder, tokenizer) in parts.items():
        given = {"text_encoder": encoder, "tokenizer": tokenizer}
        pipeline.load_textual_inversion({"mycat": learned[key]}, token="mycat", **given)
    prompt, seed = "a mycat on a red background", torch.Generator().manual_seed(1)
    wanted = pipeline(prompt, num_inference_steps=3, generator=seed, output_type="np").images
    module = StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=file)
    options = {"num_inference_steps": 3, "return_type": "numpy", "show_progress": False, "seed": 1}
    assert np.array_equal(module.infer(prompt, **options)["samples"], wanted)
    assert not np.array_equal(module.infer("a cat on a red background", **options)["samples"], wanted)


def test_the_pooled_prompt_is_the_end_token_beside_learned_words(xl_checkpoint, tmp_path):
    """Published checkpoints have ``eos_token_id: 2``, with which transformers pools the token of the largest id."""
    folder, pooled = shutil.copytree(xl_checkpoint, tmp_path / "model"), []
    file = tmp_path / "mycat.safetensors"
    save_file({key: torch.ones(1, width) for key, width in WIDTHS.items()}, file)
    for old in (False, True):
        config = folder / "text_encoder_2" / "config.json"
        if old:
            config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 2}))
        module = StableDiffusionModule.from_pretrained(folder, adapters=file)
        pooled.append(module.encode_captions(["a mycat"]).pooled)
    assert torch.equal(*pooled)
