"""Stable Diffusion XL is trained: sizes, caches, resumed trainings and exports."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionXLControlNetPipeline
from lightning import Callback
from PIL import Image
from safetensors.torch import load_file

from sdmodule.callbacks.checkpoint import TrainingCheckpoint
from sdmodule.callbacks.ema import EMA
from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.cli.preflight import check_compatible
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.loss import encode_moments, with_image_sizes
from tests.fitting import fit
from tests.xl_parts import xl_pipeline

pytestmark = pytest.mark.slow  # most train

CAPTIONS = ["a red circle", "", "a blue star on a green background, " * 12, "a heart", "a square"]
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several shapes, one with an empty and one with a long caption."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for k, caption in enumerate(CAPTIONS):
        pixels = generator.integers(0, 255, (40 + 3 * k, 60 - 5 * k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(caption)
    return folder


def data_of(folder, **settings):
    return ImageFolderDataModule(str(folder), 32, batch_size=2, val_fraction=0, random_flip=True, **settings)


def module_of(xl_checkpoint, tuning=None, **settings):
    return StableDiffusionModule(
        str(xl_checkpoint),
        tuning=tuning,
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-3),
        objective={"caption_dropout": 0.3},
        **settings,
    )


def trained(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters() if weight.requires_grad}


def assert_equal_weights(ours, theirs):
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def export_of(module, folder):
    module.save_pretrained(folder)
    return folder


def test_a_batch_without_sizes_was_neither_resized_nor_cropped(xl_checkpoint):
    parts = module_of(xl_checkpoint).parts
    text = module_of(xl_checkpoint).encode_captions(["a", "b"])
    for batch in ({"image": torch.zeros(2, 3, 24, 32)}, {"moments": torch.zeros(2, 8, 6, 8)}):
        assert with_image_sizes(text, batch, parts).time_ids.tolist() == [[24, 32, 0, 0, 24, 32]] * 2
    sizes = {"original_size": torch.tensor([[9, 8], [7, 6]]), "crop_top_left": torch.tensor([[1, 2], [3, 4]])}
    told = with_image_sizes(text, {"image": torch.zeros(2, 3, 24, 32), **sizes}, parts)
    assert told.time_ids.tolist() == [[9, 8, 1, 2, 24, 32], [7, 6, 3, 4, 24, 32]]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"original_size": torch.tensor([[9, 0], [7, 6]])}, r"original_size=\[\[9, 0\].*at least 1"),
        ({"crop_top_left": torch.tensor([[-1, 0], [7, 6]])}, r"crop_top_left=\[\[-1, 0\].*at least 0"),
        ({"original_size": torch.tensor([9, 7])}, r"original_size=\[9, 7\] for 2 images; give a tensor \[B, 2\]"),
    ],
)
def test_sizes_out_of_range_are_refused(xl_checkpoint, sizes, words):
    module = module_of(xl_checkpoint)
    batch = {"image": torch.zeros(2, 3, 32, 32), "caption": ["a", "b"], **sizes}
    with pytest.raises(SettingsError, match=words):
        module.training_step(batch, 0)


def test_a_second_text_encoder_is_refused_for_one(checkpoint):
    with pytest.raises(SettingsError, match=r"tuning.text_encoder_2=true: pretrained=.* has one text encoder"):
        StableDiffusionModule(str(checkpoint), tuning={"kind": "lora", "text_encoder_2": True})


class Losses(Callback):
    """The loss of each step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.of_steps = [*getattr(self, "of_steps", []), float(outputs["loss"])]


def test_cached_training_equals_training_without_a_cache(xl_checkpoint, folder, tmp_path):
    losses = []
    for what in (None, "latents", "all", "all"):
        cache = [LatentCache(tmp_path, what)] if what else []
        fit(module_of(xl_checkpoint), data_of(folder), 5, *cache, record := Losses())
        losses.append(record.of_steps)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == losses[3]


def test_text_encoders_in_training_are_not_cached(xl_checkpoint, folder, tmp_path):
    module = module_of(xl_checkpoint, {"kind": "lora", "text_encoder_2": True})
    with pytest.raises(SettingsError, match="cannot be cached while the text encoder is trained"):
        fit(module, data_of(folder), 1, LatentCache(tmp_path, "all"))


def test_text_encoders_stop_at_a_step_and_have_their_own_rate(xl_checkpoint, folder):
    tuning = {"kind": "full", "text_encoder": True, "text_encoder_stop": 1, "text_encoder_lr": 1e-2}
    once, twice = (module_of(xl_checkpoint, tuning) for _ in range(2))
    fit(once, data_of(folder), 1)
    fit(twice, data_of(folder), 2)
    first, second = trained(once), trained(twice)
    for name in first:
        if name.startswith("text_encoder"):
            assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["unet.conv_out.weight"], second["unet.conv_out.weight"])
    assert [len(group["params"]) > 0 for group in once.parameter_groups] == [True, True]


def pixels(pipeline):
    generator = torch.Generator().manual_seed(1)
    return pipeline(PROMPT, negative_prompt="blue", num_inference_steps=3, generator=generator, output_type="np").images


def infer(module):
    options = {"num_inference_steps": 3, "return_type": "numpy", "show_progress": False}
    return module.infer(PROMPT, negative_prompt="blue", seed=1, **options)["samples"]


@pytest.fixture(scope="module")
def plain(xl_checkpoint):
    """What the checkpoint samples before it is trained."""
    return infer(StableDiffusionModule.from_pretrained(xl_checkpoint))


def test_a_full_training_is_exported_as_a_folder(xl_checkpoint, plain, folder, tmp_path):
    module = module_of(xl_checkpoint, {"kind": "full", "text_encoder": True})
    fit(module, data_of(folder), 2)
    made, export = infer(module), export_of(module, tmp_path / "export")
    assert np.array_equal(pixels(xl_pipeline(export)), made)
    assert np.array_equal(infer(StableDiffusionModule.from_pretrained(export)), made)
    assert not np.array_equal(made, plain)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_an_adapter_of_all_networks_is_exported_and_read_again(xl_checkpoint, plain, folder, tmp_path, method):
    module = module_of(xl_checkpoint, {"kind": "lora", "method": method, "rank": 2, "text_encoder": True})
    fit(module, data_of(folder), 3)
    made, export = infer(module), export_of(module, tmp_path)
    assert np.abs(made - plain).max() > 1e-3
    again = infer(StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=export / "kohya.safetensors"))
    assert np.abs(again - made).max() < 1e-4
    keys = load_file(export / "kohya.safetensors").keys()
    for prefix in ("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_"):
        assert any(key.startswith(prefix) for key in keys)
    if method in ("loha", "lokr"):
        return
    keys = load_file(export / "pytorch_lora_weights.safetensors").keys()
    for prefix in ("unet.", "text_encoder.text_model.", "text_encoder_2.text_model."):
        assert any(key.startswith(prefix) for key in keys)
    pipeline = xl_pipeline(xl_checkpoint)
    pipeline.load_lora_weights(export)
    assert np.abs(pixels(pipeline) - made).max() < 1e-4


def test_images_are_encoded_in_float32_where_the_vae_would_overflow(xl_checkpoint):
    module, image = module_of(xl_checkpoint), torch.rand(1, 3, 32, 32) * 2 - 1
    expected = encode_moments(module.parts, image)
    with torch.autocast("cpu", torch.float16), module.frozen_weights.cast(torch.float16):
        assert module.unet.conv_in.weight.dtype == torch.float32  # it is trained
        assert module.text_encoder.encoder.layers[0].mlp.fc1.weight.dtype == torch.float16
        assert torch.equal(encode_moments(module.parts, image), expected)


def test_a_resumed_training_ends_equal_to_the_bit(xl_checkpoint, folder, tmp_path):
    tuning = {"kind": "lora", "rank": 2, "dropout": 0.2, "text_encoder": True, "text_encoder_stop": 4}
    straight, first, second = (module_of(xl_checkpoint, tuning) for _ in range(3))
    cropped = {"center_crop": False, "buckets": True}
    averages = [EMA(start_step=1) for _ in range(3)]
    fit(straight, data_of(folder, **cropped), 5, averages[0])
    saving = TrainingCheckpoint(tmp_path, save_last=True)
    fit(first, data_of(folder, **cropped), 3, averages[1], saving)
    fit(second, data_of(folder, **cropped), 5, averages[2], resume=tmp_path / "last.ckpt")
    assert_equal_weights(trained(second), trained(straight))
    assert_equal_weights(averages[2].average, averages[0].average)


def test_parts_may_start_from_random_weights(xl_checkpoint):
    tuning, training = {"kind": "full", "text_encoder_2": True}, {"scratch": ["text_encoder_2"]}
    before = module_of(xl_checkpoint).text_encoder_2
    after = module_of(xl_checkpoint, tuning, training=training).text_encoder_2
    assert not torch.equal(after.text_projection.weight, before.text_projection.weight)
    with pytest.raises(SettingsError, match="scratch=text_encoder_2: would stay random"):
        module_of(xl_checkpoint, training=training)


def test_a_word_is_learned_in_both_text_encoders(xl_checkpoint, folder, tmp_path):
    tuning = {"kind": "textual_inversion", "placeholder": "<my-cat>", "initializer": "star", "vectors": 2}
    module = module_of(xl_checkpoint, tuning)
    assert [name for name in trained(module) if "learned" not in name] == [] and len(trained(module)) == 2
    before = trained(module)
    fit(module, data_of(folder, prompt="a <my-cat>"), 3)
    assert all(not torch.equal(weight, before[name]) for name, weight in trained(module).items())
    file = export_of(module, tmp_path) / "learned_embeds.safetensors"
    assert {key: tuple(vectors.shape) for key, vectors in load_file(file).items()} == {
        "clip_l": (2, 32),
        "clip_g": (2, 48),
    }
    again = StableDiffusionModule.from_pretrained(xl_checkpoint, adapters=tmp_path)
    options = {"num_inference_steps": 2, "return_type": "numpy", "show_progress": False}
    ours, theirs = (one.infer("a <my-cat> on a star", **options)["samples"] for one in (again, module))
    assert np.array_equal(ours, theirs)


def test_a_unet_learns_to_inpaint(xl_checkpoint, folder, tmp_path):
    training = {"inpaint": {"convert": True}}
    module = module_of(xl_checkpoint, task="inpaint", training=training)
    trainer = fit(module, data_of(folder, val_root=str(folder)), 2)
    assert module.unet.config.in_channels == 9
    assert {"val/loss_masked_area", "val/loss_unmasked_area"} <= trainer.callback_metrics.keys()
    export = export_of(module, tmp_path / "export")
    index = json.loads((export / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"
    again = StableDiffusionModule.from_pretrained(export, task="inpaint")
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), module.unet.parameters(), strict=True))
    assert DiffusionPipeline.from_pretrained(export).unet.config.in_channels == 9


def test_a_controlnet_is_trained_and_exported(xl_checkpoint, plain, folder, tmp_path):
    module = module_of(xl_checkpoint, {"kind": "controlnet"})
    fit(module, data_of(folder, conditioning="canny"), 2)
    assert all(name.startswith("controlnet.") for name in trained(module))
    controlnet = ControlNetModel.from_pretrained(export_of(module, tmp_path / "export"))
    assert controlnet.config.addition_embed_type == "text_time"
    for name, weight in controlnet.named_parameters():
        weight.data += 0.05 if "controlnet_" in name else 0  # after two steps it adds next to nothing
    module.controlnet.load_state_dict(controlnet.state_dict())
    control = Image.open(folder / "0.png").resize((32, 32))
    pipeline = StableDiffusionXLControlNetPipeline(**xl_pipeline(xl_checkpoint).components, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    options = {"negative_prompt": "blue", "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(1)
    theirs = pipeline(
        PROMPT, image=control, generator=generator, output_type="np", height=32, width=32, **options
    ).images
    options |= {"return_type": "numpy", "show_progress": False, "seed": 1}
    ours = module.infer(PROMPT, control=control, **options)["samples"]
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(ours - plain).max() > 1e-2


@pytest.mark.parametrize(("size", "warns"), [((1024, 1024), False), ((832, 1216), False), ((512, 512), True)])
def test_a_size_of_no_bucket_is_trained_with_a_warning(xl_checkpoint, size, warns):
    module, data = module_of(xl_checkpoint), SimpleNamespace(size=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_compatible(module, data, [])
        assert not caught  # the tiny checkpoint is of another size
        module.unet.register_to_config(sample_size=1024 // module.parts.pixels_per_latent)
        check_compatible(module, data, [])
    assert [str(one.message).split(":")[0] for one in caught] == ["resolution=512x512 (height x width)"] * warns
