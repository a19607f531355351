"""Operations of a model, counted without computing anything."""

import json

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from sdmodule.callbacks.model_flops import CallRecorder
from sdmodule.callbacks.peak_flops import peak_flops
from sdmodule.callbacks.timing import TimingLogger
from sdmodule.data.prompts import PromptDataModule
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.attention import plain_attention
from tests.fake_cuda import fake_cuda


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


BATCH = {"image": torch.rand(2, 3, 32, 32), "caption": ["a red circle", "a star"]}


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_counts_are_those_of_a_step_that_is_computed(checkpoint, tuning):
    module = StableDiffusionModule(str(checkpoint), tuning={"kind": tuning})
    # torch counts no operations of its fused attention on a CPU
    with plain_attention([module.text_encoder], module.unet, module.vae), FlopCounterMode(display=False) as computed:
        module.training_step(BATCH, 0).backward()
    with CallRecorder(module) as recorder:
        module.training_step(BATCH, 0)
        module.training_step(BATCH, 1)
    assert recorder.flops() == pytest.approx(2 * computed.get_total_flops(), rel=1e-3)
    assert module.unet.conv_in.weight.device.type == "cpu"


class Modes(Callback):
    """The dispatch modes under which each batch is sampled or trained."""

    def __init__(self) -> None:
        self.seen = []

    def on_predict_batch_start(self, *arguments):
        self.seen.append([type(mode).__name__ for mode in _get_current_dispatch_mode_stack()])

    on_train_batch_start = on_predict_batch_start


def test_a_gpu_whose_peak_is_known_shows_its_utilization_and_no_batch_runs_under_a_counter(checkpoint, tmp_path):
    module = StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 1})
    modes = Modes()
    silent = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_steps": 2}
    silent |= {"limit_val_batches": 0, "enable_model_summary": False}
    with fake_cuda():
        trainer = Trainer(
            accelerator="gpu", devices=1, callbacks=[TimingLogger(tmp_path, warmup_steps=1), modes], **silent
        )
        trainer.predict(module, PromptDataModule(["a", "b"], batch_size=1), return_predictions=False)
        sampling = json.loads((tmp_path / "timings.json").read_text())
        data = ShapesDataModule(batch_size=2, train_length=4, val_length=2, size=32)
        trainer.fit(module, data)
        training = json.loads((tmp_path / "timings.json").read_text())
    assert sampling["flops_per_image"] > 0 and sampling["mfu"] > 0 and training["mfu"] > 0
    assert modes.seen == [["FakeCuda"]] * 4


CARDS = {
    "NVIDIA H100 80GB HBM3": (989.4e12, 494.7e12, 66.9e12),
    "NVIDIA H100 PCIe": (756e12, 378e12, 51.2e12),
    "NVIDIA H200": (989.4e12, 494.7e12, 67e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 156e12, 19.5e12),
    "NVIDIA L40S": (362e12, 183e12, 91.6e12),
    "NVIDIA GeForce RTX 4090": (165.2e12, 82.6e12, 82.6e12),
    "NVIDIA GeForce RTX 3090": (71.2e12, 35.6e12, 35.6e12),
    "Tesla T4": (65e12, 8.1e12, 8.1e12),
}


@pytest.mark.parametrize("name", CARDS)
def test_peaks_are_of_dense_matrices_by_card_and_precision(name):
    before = torch.get_float32_matmul_precision()
    capability = (7, 5) if "T4" in name else (8, 0)
    with fake_cuda(name=name, capability=capability):
        device = torch.device("cuda", 0)
        peaks = [peak_flops(device, "16-true")]
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            peaks.append(peak_flops(device, "32-true"))
        assert peaks == [pytest.approx(one) for one in CARDS[name]]
        torch.set_float32_matmul_precision(before)
        assert peak_flops(device, "bf16-mixed") == (None if "T4" in name else peaks[0])


def test_other_cards_of_a_family_are_not_taken_for_it():
    with fake_cuda(name="NVIDIA GeForce RTX 3090 Ti", capability=(8, 6)):
        assert peak_flops(torch.device("cuda", 0), "16-true") == 40e12  # Lightning's
