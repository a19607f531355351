"""From the last step to files: images leave a GPU while the next batch is under way there (fake CUDA tensors)."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdmodule.callbacks.prediction_writer import PredictionWriter
from sdmodule.cli.trainer import make_trainer
from sdmodule.data.prompts import PromptDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.sampling.decode import Decoding
from sdmodule.sampling.stopwatch import Stopwatch
from sdmodule.speed.attention import check_kernels
from tests.fake_cuda import fake_cuda, values_of

ALLOWED = {
    "sampling/decode.py Decoding.result": "the images of a batch are written once the next one is under way",
    "sampling/stopwatch.py elapsed": "so are its seconds",
}
"""Where the host may wait while it samples several batches, and why."""


class MarkingWriter(PredictionWriter):
    """Notes how far the record of crossings is when each batch begins and ends."""

    marks: list[int]
    cuda = None

    def on_predict_batch_start(self, *_) -> None:
        self.marks.append(len(self.cuda.crossings))

    def on_predict_batch_end(self, *arguments) -> None:
        self.marks.append(len(self.cuda.crossings))
        super().on_predict_batch_end(*arguments)
        self.marks.append(len(self.cuda.crossings))


def predict(checkpoint: Path, folder: Path, accelerator: str, writer: PredictionWriter) -> list[np.ndarray]:
    module = StableDiffusionModule(str(checkpoint), sampling={"steps": 2, "scheduler": "euler_a"})
    data = PromptDataModule(prompt=["a red circle", "a star", "a heart"], batch_size=1)
    settings = {"precision": "32-true", "logger": False, "devices": 1, "inference_mode": False}
    trainer = make_trainer(accelerator, callbacks=[writer], **settings)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return [np.asarray(Image.open(file)) for file in sorted((folder / "images").glob("*.png"))]


def test_images_are_those_of_the_cpu_and_taken_while_the_next_batch_is_under_way(checkpoint, tmp_path):
    expected = predict(checkpoint, tmp_path / "cpu", "cpu", PredictionWriter(tmp_path / "cpu"))
    writer = MarkingWriter(tmp_path / "gpu")
    writer.marks = []
    with fake_cuda() as writer.cuda:
        sampled = predict(checkpoint, tmp_path / "gpu", "gpu", writer)
    assert len(sampled) == 3 and all(np.array_equal(*pair) for pair in zip(sampled, expected, strict=True))
    batches = [writer.marks[k : k + 3] for k in range(0, 9, 3)]
    waits = [[one.waits for one in writer.cuda.crossings[start:end]].count(True) for start, end, _ in batches]
    assert waits == [0, 0, 0]
    _, first_done, first_written = batches[0]
    assert first_done == first_written  # its images are taken after the second batch has been sampled
    writer.cuda.check(writer.cuda.crossings[batches[0][0] : batches[-1][-1]], ALLOWED)


def test_after_one_overflow_batches_are_decoded_once_and_in_float32(module, monkeypatch):
    with torch.no_grad():
        module.vae.post_quant_conv.weight *= 2.0**6
        module.vae.decoder.conv_in.weight *= 2.0**4
    module.vae.half()
    latents = 1000 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decode, dtypes = module.vae.decode, []
    monkeypatch.setattr(module.vae, "decode", lambda one: (dtypes.append(one.dtype), decode(one))[1])
    with fake_cuda(), torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        module.vae.to("cuda")
        batches = [Decoding(module.parts, latents.to("cuda"), as_bytes=True).result() for _ in range(3)]
    assert [str(one.message).count("again in float32") for one in caught] == [1]
    assert dtypes == [torch.float16, torch.float16, torch.float32, torch.float32, torch.float32]
    assert batches[0].dtype == torch.uint8 and torch.equal(values_of(batches[0]), values_of(batches[2]))


def test_events_are_those_of_the_model_device(monkeypatch):
    with fake_cuda(devices=2):
        current, asked = torch.cuda.current_stream, []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (asked.append(device), current(device))[1])
        watch = Stopwatch(torch.device("cuda:1"))
        with watch.stage("denoise"):
            watch.start()
            watch.mark()
        assert set(asked) == {torch.device("cuda:1")}
        assert dict(watch.seconds) == {"denoise": 3.0} and list(watch.steps()) == [1.0]


def test_a_kernel_that_the_gpu_lacks_is_named_before_the_first_step(module):
    """Torch without CUDA has none at all, as a GPU has none for heads too wide or a dtype."""
    check_kernels("flash", module.unet)
    with fake_cuda():
        module.to("cuda")
        with pytest.raises(
            SettingsError, match=r"speed\.attention=flash: this GPU has no such kernel for heads of 16 in"
        ):
            check_kernels("flash", module.unet)
        check_kernels("math", module.unet)
