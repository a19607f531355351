"""A single file in the original layout loads with the weights that it was written from."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdmodule.components import single_file
from sdmodule.components.shipped_configs import CONFIGS
from sdmodule.components.single_file import load_single_file, open_single_file
from sdmodule.errors import SettingsError
from sdmodule.families.stable_diffusion import StableDiffusion
from tests.original_layout import MODELS, original_layout, tiny_parts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny 1.x model: its parts, configuration folder, weights in the original layout, and their file."""
    folder = tmp_path_factory.mktemp("tiny")
    parts = tiny_parts(folder)
    weights = original_layout(parts)
    save_file(weights, folder / "tiny.safetensors")
    return SimpleNamespace(parts=parts, folder=folder, weights=weights, file=folder / "tiny.safetensors")


def _assert_equal_weights(loaded: dict[str, Any], parts: dict[str, Any]) -> None:
    for name in MODELS:
        expected = parts[name].state_dict()
        assert loaded[name].state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[key]) for key, weight in loaded[name].state_dict().items()), name
        assert not loaded[name].training


@pytest.mark.parametrize(
    ("in_channels", "open_clip", "pad_id"), [(4, False, 49407), (9, False, 49407), (4, True, 0), (9, True, 0)]
)
def test_every_architecture_loads_unchanged(tmp_path: Path, in_channels: int, open_clip: bool, pad_id: int) -> None:
    """4 and 9 channels, CLIP and OpenCLIP."""
    parts = tiny_parts(tmp_path, in_channels, open_clip)
    save_file(original_layout(parts), tmp_path / "model.safetensors")
    loaded = load_single_file(tmp_path / "model.safetensors", config=tmp_path, prediction_type="v_prediction")
    _assert_equal_weights(loaded, parts)
    assert loaded["tokenizer"].pad_token_id == pad_id
    assert loaded["scheduler"].config.prediction_type == "v_prediction"


def test_a_text_encoder_without_prefix_loads(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Transformers 5 names the text encoder without `text_model.`."""
    save_file(original_layout(tiny.parts, text_prefix=""), tmp_path / "model.safetensors")
    _assert_equal_weights(load_single_file(tmp_path / "model.safetensors", config=tiny.folder), tiny.parts)


def test_weights_load_in_the_requested_dtype(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Whatever dtype the file holds."""
    save_file({key: weight.half() for key, weight in tiny.weights.items()}, tmp_path / "half.safetensors")
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        loaded = load_single_file(tmp_path / "half.safetensors", dtype, config=tiny.folder)
        assert {weight.dtype for name in MODELS for weight in loaded[name].parameters()} == {expected}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_with_the_callback_state_of_old_trainers_loads(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """The first public checkpoints use a callback class as a key beside their weights."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        module = ModuleType(name)
        module.ModelCheckpoint = callback  # type: ignore[attr-defined]
        patch.setitem(sys.modules, name, module)
        saved = {"state_dict": tiny.weights, "global_step": 7, "callbacks": {callback: {"best_model_path": ""}}}
        torch.save(saved, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    _assert_equal_weights(load_single_file(tmp_path / "model.ckpt", config=tiny.folder), tiny.parts)


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    """The function that it would call is not called."""
    target, plain, zipped = tmp_path / "executed", tmp_path / "plain.ckpt", tmp_path / "zipped.ckpt"
    plain.write_bytes(pickle.dumps({"state_dict": _Hostile(target)}, protocol=2))
    torch.save({"state_dict": _Hostile(target)}, zipped)
    for file in (plain, zipped):
        with pytest.raises(SettingsError, match="refused"):
            load_single_file(file)
    assert not target.exists()


def test_corrupt_files_are_reported(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Truncated, empty and random files end with one sentence."""
    content = tiny.file.read_bytes()
    for name, data in {
        "cut.safetensors": content[: len(content) // 2],
        "empty.safetensors": b"",
        "noise.safetensors": b"\xff" * 100,
        "noise.ckpt": b"\xff" * 100,
        "empty.ckpt": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SettingsError, match="corrupt"):
            load_single_file(tmp_path / name, config=tiny.folder)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(SettingsError, match="holds a list"):
        load_single_file(tmp_path / "list.ckpt")


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "a LoRA"),
        (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"], "Stable Diffusion XL"),
        (["down_blocks.0.resnets.0.conv1.weight"], "diffusers layout"),
        (["first_stage_model.decoder.conv_in.weight"], "without unet and text_encoder"),
        (["something.else"], r"unknown kind of file \(something.else\)"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, keys: list[str], found: str) -> None:
    """The error says what the file is instead."""
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(SettingsError, match=found):
        load_single_file(tmp_path / "other.safetensors")


def test_an_argument_that_does_not_fit_is_named(tiny: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    weights = load_file(tiny.file)
    del weights["model.diffusion_model.out.2.bias"]
    save_file(weights, tmp_path / "partial.safetensors")
    for match, file, arguments in [
        ("not found", tmp_path / "absent.ckpt", {}),
        (r"unknown suffix \.onnx", tmp_path / "model.onnx", {}),
        ("choose one of epsilon, v_prediction", tiny.file, {"prediction_type": "noise"}),
        ("4 input channels and text width 12", tiny.file, {}),
        ("has no scheduler, text_encoder, unet, vae", tiny.file, {"config": tmp_path}),
        ("does not fit .*sd1", tiny.file, {"config": CONFIGS / "sd1"}),
        (
            "does not fit .*unet.*1 missing weight: conv_out.bias",
            tmp_path / "partial.safetensors",
            {"config": tiny.folder},
        ),
    ]:
        with pytest.raises(SettingsError, match=match):
            load_single_file(file, **arguments)


def test_the_prediction_type_of_2x_is_measured(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights do not return their input, so they count as v-prediction."""
    monkeypatch.setattr(StableDiffusion, "original_configs", {(4, 12): "sd2"})
    monkeypatch.setattr(single_file, "CONFIGS", tiny.folder)
    (tiny.folder / "sd2").symlink_to(tiny.folder)
    assert single_file._shipped_config(open_single_file(tiny.file), None) == tiny.folder / "sd2_v"
