"""What a run computes on, and in which precision, with torch's detection of devices replaced."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_module

from sdmodule.callbacks.cudnn_benchmark import CudnnBenchmark
from sdmodule.cli.console import echo_device
from sdmodule.cli.instantiate import build_trainer
from sdmodule.errors import SettingsError
from sdmodule.speed.apply import apply_training_speed
from sdmodule.speed.speed_settings import SpeedSettings
from sdmodule.speed.tf32 import uses_tf32

GIVEN = {"train": ["data.root=photos", "resolution=64"], "predict": ["prompt=a cat"]}


@pytest.fixture(params=[True, False], ids=["bfloat16", "no bfloat16"])
def gpu(request, monkeypatch) -> bool:
    """A machine with one GPU that computes in bfloat16, or does not; nothing can be computed on it."""
    from lightning.fabric.accelerators import cuda

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made Up 9000")
    monkeypatch.setattr(cuda, "num_cuda_devices", lambda: 1)
    return request.param


def trainer_of(command: str, *overrides: str):
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        cfg = compose(command, [*GIVEN[command], "output_dir=out", "logger=none", "callbacks=[]", *overrides])
    return build_trainer(cfg)


@pytest.mark.parametrize(
    ("command", "overrides", "precision"),
    [
        ("train", [], "auto"),
        ("train", ["trainer.precision=auto"], "auto"),
        ("train", ["trainer.precision=32-true"], "32-true"),
        ("predict", [], "32-true"),
        ("predict", ["speed=rounding"], "16-true"),
        ("predict", ["speed=turbo"], "16-true"),
        ("predict", ["precision=auto"], "auto"),
    ],
    ids=str,
)
def test_both_commands_take_the_gpu_where_there_is_one(gpu, capsys, command, overrides, precision):
    trainer = trainer_of(command, *overrides)
    assert trainer.strategy.root_device.type == "cuda"
    expected = ("bf16-mixed" if gpu else "16-mixed") if precision == "auto" else precision
    assert str(trainer.precision) == expected
    echo_device(trainer, tf32=True, attention="sdpa")
    assert capsys.readouterr().out == f"On cuda (Made Up 9000): precision {expected} with TF32, attention sdpa\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", GIVEN)
def test_both_commands_take_the_cpu_where_there_is_no_gpu(command):
    trainer = trainer_of(command)
    assert (trainer.strategy.root_device.type, str(trainer.precision)) == ("cpu", "32-true")
    with pytest.raises(SettingsError, match="torch finds no GPU on this machine"):
        trainer_of(command, "trainer=gpu")


def test_float32_is_multiplied_in_tf32_on_a_gpu_only_and_not_where_sampling_is_exact(gpu):
    assert uses_tf32("cuda") and uses_tf32("cuda", SpeedSettings(kernels="fastest"))
    assert not uses_tf32("cuda", SpeedSettings()) and not uses_tf32("cpu")
    before = torch.get_float32_matmul_precision()
    with apply_training_speed(None, "cuda", "bf16-mixed"):  # type: ignore[arg-type]
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("settings", "measured"),
    [([], True), (["+trainer.benchmark=false"], False), (["+trainer.deterministic=true"], False)],
)
def test_cudnn_measures_unless_the_trainer_says_otherwise(gpu, settings, measured):
    trainer = trainer_of("train", *settings)
    found = [callback for callback in trainer.callbacks if isinstance(callback, CudnnBenchmark)]
    assert bool(found) == measured
    for callback in found:
        before = torch.backends.cudnn.benchmark
        callback.on_fit_start(trainer, None)  # without data, so without buckets
        assert torch.backends.cudnn.benchmark
        callback.teardown(trainer, None, "fit")
        assert torch.backends.cudnn.benchmark == before
    torch.use_deterministic_algorithms(False)
