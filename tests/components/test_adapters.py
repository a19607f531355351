"""Exported adapters give the trained images, here and in diffusers, in the layouts of diffusers and kohya."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from sdmodule.components.adapter_file import read_tensors
from sdmodule.components.adapter_layouts import to_adapter
from sdmodule.components.lora_layers import METHODS, extract_adapter
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule

pytestmark = pytest.mark.slow  # most tests train an adapter first


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


PROMPT = "a red circle on a blue background"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]  # linear layers and convolutions
DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"


def adapted(checkpoint: Path, method: str = "lora", seed: int = 0, **settings) -> StableDiffusionModule:
    """A model with random adapters, as if they had been trained."""
    tuning = {"kind": "lora", "method": method, "alpha": 2, "target_modules": LAYERS, "text_encoder": True, **settings}
    module = StableDiffusionModule(str(checkpoint), tuning=tuning).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        if weight.requires_grad:
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return module


def image(module: StableDiffusionModule, **settings) -> np.ndarray:
    settings = {"num_inference_steps": 2, "return_type": "numpy", "seed": 3, **settings}
    return module.infer(PROMPT, **settings)["samples"]


def with_adapters(checkpoint: Path, *adapters: dict, merge: bool = False) -> np.ndarray:
    settings = {"files": list(adapters), "merge": merge}
    return image(StableDiffusionModule.from_pretrained(str(checkpoint), adapters=settings))


@pytest.fixture(scope="module")
def plain(checkpoint) -> np.ndarray:
    """The image of the checkpoint alone."""
    return with_adapters(checkpoint)


@pytest.fixture
def export(checkpoint, tmp_path) -> Path:
    """An exported adapter of rank 4 and alpha 2."""
    adapted(checkpoint).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_an_exported_adapter_gives_the_trained_images(checkpoint, plain, tmp_path, method, merged):
    module = adapted(checkpoint, method)
    module.save_pretrained(tmp_path)
    trained = image(module)
    assert np.abs(trained - plain).max() > 5 / 255
    files = [DIFFUSERS, KOHYA] if method in ("lora", "dora") else [KOHYA]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(files)
    for file in files:
        again = with_adapters(checkpoint, {"path": str(tmp_path / file)}, merge=merged)
        np.testing.assert_allclose(again, trained, atol=1e-5 if merged else 0)


@pytest.mark.parametrize("method", METHODS)
def test_kohya_files_load_with_equal_weights(checkpoint, tmp_path, method):
    module = adapted(checkpoint, method, alpha=None)
    module.save_pretrained(tmp_path)
    ours = extract_adapter(module.parts, method)
    file = tmp_path / KOHYA
    theirs = to_adapter(*read_tensors(file), file, StableDiffusionModule(str(checkpoint)).parts)
    assert theirs.method == method and theirs.weights.keys() == ours.weights.keys() == {"unet", "text_encoder"}
    for part, weights in ours.weights.items():
        assert theirs.weights[part].keys() == weights.keys()
        assert all(torch.equal(theirs.weights[part][key], value) for key, value in weights.items())
    alphas = {part: found for part, found in ours.alphas.items() if found}  # full Kronecker products have none
    assert theirs.alphas == alphas


@pytest.mark.parametrize(("method", "file"), [("lora", DIFFUSERS), ("lora", KOHYA), ("dora", DIFFUSERS)])
def test_diffusers_loads_an_export_and_gives_equal_images(checkpoint, plain, tmp_path, method, file):
    adapted(checkpoint, method).save_pretrained(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path, weight_name=file)
    theirs = pipeline(
        PROMPT, num_inference_steps=2, guidance_scale=7.5, generator=torch.Generator().manual_seed(3), output_type="np"
    ).images
    ours = with_adapters(checkpoint, {"path": str(tmp_path / file)})
    assert np.array_equal(ours, theirs) and not np.array_equal(ours, plain)


def test_a_file_saved_by_diffusers_loads(checkpoint, tmp_path):
    """Without alpha in the header, updates are not scaled."""
    module = adapted(checkpoint, alpha=None)
    adapter = extract_adapter(module.parts, "lora")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=adapter.weights["unet"], text_encoder_lora_layers=adapter.weights["text_encoder"]
    )
    assert np.array_equal(with_adapters(checkpoint, {"path": str(tmp_path)}), image(module))


# ------------------------------------------------------------------------------------------ scales and combinations


def test_a_larger_scale_changes_the_image_more(checkpoint, plain, export):
    far = [np.abs(with_adapters(checkpoint, {"path": str(export), "scale": s}) - plain).mean() for s in (0, 0.3, 1.0)]
    assert far[0] == 0 < far[1] < far[2]
    inverted = with_adapters(checkpoint, {"path": str(export), "scale": -1.0})
    assert not np.array_equal(inverted, with_adapters(checkpoint, {"path": str(export)}))


def test_a_path_alone_means_the_file_at_full_scale(checkpoint, export, tmp_path):
    word = tmp_path / "word.safetensors"
    save_file({"<word>": torch.ones(32)}, word)
    named = [{"path": str(export), "scale": 1.0}, {"path": str(word), "scale": 1.0}]
    for given in (str(export), export, {"path": str(export)}, [str(export)], [export]):
        module = StableDiffusionModule.from_pretrained(str(checkpoint), adapters=given)
        assert module.adapters.plain() == {"files": named[:1], "merge": False}
    both = StableDiffusionModule.from_pretrained(str(checkpoint), adapters=[str(export), named[1]])
    assert both.adapters.metadata() == {"adapters": named, "merge_adapters": False}
    assert np.array_equal(image(both), with_adapters(checkpoint, *named))


def test_two_half_scaled_copies_equal_one_adapter(checkpoint, export):
    whole = with_adapters(checkpoint, {"path": str(export)})
    halves = [{"path": str(export / name), "scale": 0.5} for name in (DIFFUSERS, KOHYA)]
    np.testing.assert_allclose(with_adapters(checkpoint, *halves), whole, atol=1e-4)
    np.testing.assert_allclose(with_adapters(checkpoint, *halves, merge=True), whole, atol=1e-4)


def test_adapters_of_different_methods_work_together(checkpoint, export, tmp_path):
    adapted(checkpoint, "loha", seed=1).save_pretrained(tmp_path / "loha")
    both = [{"path": str(export)}, {"path": str(tmp_path / "loha")}]
    one = with_adapters(checkpoint, both[0], merge=True)
    together = with_adapters(checkpoint, *both, merge=True)
    assert not np.array_equal(together, one)
    np.testing.assert_allclose(with_adapters(checkpoint, *both), together, atol=1e-5)


def test_merged_adapters_are_part_of_the_exported_checkpoint(checkpoint, export, tmp_path):
    chosen = [{"path": str(export), "scale": 0.8}]
    unmerged, merged = (
        StableDiffusionModule.from_pretrained(str(checkpoint), adapters={"files": chosen, "merge": merge})
        for merge in (False, True)
    )
    with pytest.raises(SettingsError, match="merge_adapters=true"):
        unmerged.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged.save_pretrained(tmp_path / "out")
    np.testing.assert_allclose(with_adapters(tmp_path / "out"), image(unmerged), atol=1e-4)


# ------------------------------------------------------------------------------------------ errors


def changed(file: Path, change) -> Path:
    """A changed copy of an adapter file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file.with_name(f"changed-{file.name}"))
    return file.with_name(f"changed-{file.name}")


def drop_one(tensors: dict) -> None:
    tensors.pop(next(key for key in tensors if "to_q" in key and ("lora_B" in key or "lora_up" in key)))


def add_one(tensors: dict) -> None:
    tensors["surprise"] = torch.zeros(1)


def add_layer(tensors: dict) -> None:
    for key in [key for key in tensors if "to_q" in key]:
        tensors[key.replace("down_blocks.0", "down_blocks.7").replace("down_blocks_0", "down_blocks_7")] = tensors[
            key
        ].clone()


def widen(tensors: dict) -> None:
    for key, value in tensors.items():
        if "lora_A" in key or "lora_down" in key:
            tensors[key] = torch.zeros(value.shape[0], 5, *value.shape[2:])


@pytest.mark.parametrize("file", [DIFFUSERS, KOHYA])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, "1 missing keys"),
        (add_one, "surprise"),
        (add_layer, "down_blocks.7"),
        (widen, "shape"),
        (dict.clear, "neither a low-rank adapter"),
    ],
    ids=["missing key", "unknown key", "unknown layer", "other shape", "empty"],
)
def test_a_file_that_does_not_fit_is_refused(checkpoint, export, file, change, message):
    path = changed(export / file, change)
    with pytest.raises(SettingsError, match=message) as error:
        with_adapters(checkpoint, {"path": str(path)})
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([{"path": "nowhere.safetensors"}], "adapters=nowhere.safetensors: not found"),
        ([{"path": "pickle.pt"}], "may run code"),
        ([{"path": "broken.safetensors"}], "cannot be read"),
        ([{"path": "."}], "holds none of"),
        ([{"path": "broken.safetensors", "scale": "much"}], "scale=much"),
        ([{"path": "broken.safetensors", "weight": 1}], "weight"),
        (["broken.safetensors"], "adapters=broken.safetensors: cannot be read"),
        ("broken.safetensors", "adapters=broken.safetensors: cannot be read"),
        ([3], "each entry must"),
        (3, "must be a path, or a list"),
    ],
)
def test_a_wrong_adapter_setting_is_refused(checkpoint, tmp_path, monkeypatch, adapters, message):
    monkeypatch.chdir(tmp_path)
    for name in ("pickle.pt", "broken.safetensors"):
        Path(name).write_bytes(b"not an adapter")
    with pytest.raises(SettingsError, match=message):
        StableDiffusionModule(str(checkpoint), adapters=adapters)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"kind": "magic"}, "choose one of controlnet, full"),
        ({"kind": "lora", "rank": 0}, "rank=0"),
        ({"kind": "lora", "method": "lorra"}, "choose one of dora"),
        ({"kind": "lora", "alpha": -1}, "alpha=-1"),
        ({"kind": "lora", "dropout": 1}, "dropout=1"),
        ({"kind": "lora", "target_modules": ["to_x"]}, "target_modules=to_x: no layer"),
        ({"kind": "lora", "target_modules": ["norm1"]}, "target_modules"),
        ({"kind": "lora", "placeholder": "x"}, "tuning=lora has alpha"),
        ({"kind": "full", "text_encoder_lr": 1e-6}, "tuning.text_encoder=true"),
        ({"kind": "full", "text_encoder": True, "text_encoder_stop": 0}, "text_encoder_stop=0"),
    ],
)
def test_a_wrong_tuning_setting_is_refused(checkpoint, tuning, message):
    with pytest.raises(SettingsError, match=message):
        StableDiffusionModule(str(checkpoint), tuning=tuning)


def test_only_adapter_weights_are_trained(checkpoint):
    module = adapted(checkpoint)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert isinstance(module.unet.conv_in, nn.Conv2d)
