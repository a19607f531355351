"""Fake CUDA tensors: the values of the CPU, the strictness of a GPU, and every crossing named."""

import pytest
import torch
from lightning import Callback, Trainer
from torch import nn

from sdmodule.data.toy.dataset import ShapesDataModule
from tests.fake_cuda import FakeCudaTensor, fake_cuda, values_of


def test_sampling_has_the_images_of_the_cpu_and_names_what_reads_a_value(module):
    settings = {"seed": 3, "num_inference_steps": 3, "return_type": "tensor", "show_progress": False}
    expected = module.infer("a red circle", **settings)["samples"]
    with fake_cuda() as cuda:
        module.to("cuda")
        assert isinstance(module.unet.conv_in.weight, FakeCudaTensor)
        marks = []

        def reads(step: int, latents: torch.Tensor) -> None:
            float(latents.abs().max())
            marks.append(len(cuda.crossings))

        sampled = module.infer("a red circle", callback_on_step_end=reads, **settings)["samples"]
        module.to("cpu")
    assert torch.equal(sampled, expected)
    inside = cuda.crossings[marks[0] : marks[-1]]
    read = [one for one in inside if one.caller.startswith("tests/test_fake_cuda.py")]
    assert [(one.kind, one.place) for one in read] == [("sync", "sampling/infer.py both.<locals>.on_step")] * 2
    with pytest.raises(AssertionError, match=r"its value is read at sampling/infer\.py"):
        cuda.check(read)
    cuda.check(read, {"sampling/infer.py both.<locals>.on_step": "a callback of the test"})
    with pytest.raises(AssertionError, match=r"no longer needed: \['somewhere.py'\]"):
        cuda.check([], {"somewhere.py": "never"})


CROSSINGS = {
    "item": (lambda x: x[0, 0].item(), ["sync"]),
    "bool": (lambda x: bool(x.any()), ["sync"]),
    "tolist": (lambda x: x.tolist(), ["to host"]),
    "cpu": (lambda x: x.cpu(), ["to host"]),
    "copy": (lambda x: x.copy_(torch.ones(3, 3)), ["to device"]),
    "from Python": (lambda x: torch.tensor([1.0, 2.0], device="cuda"), ["to device"]),
    "mask": (lambda x: x[x > 0], ["sync"]),
    "index of the CPU": (lambda x: x[torch.tensor([0, 1])], ["to device"]),
    "synchronize": (lambda x: torch.cuda.synchronize(), ["sync"]),
    "number": (lambda x: x * torch.tensor(2.0) + 1.0, []),
    "fill by a mask": (lambda x: x.__setitem__(x > 0, 0.0), []),
    "filled on the device": (lambda x: torch.arange(4, device="cuda").half(), []),
}


@pytest.mark.parametrize("operation", CROSSINGS)
def test_what_crosses_between_host_and_device(operation):
    run, kinds = CROSSINGS[operation]
    with fake_cuda() as cuda:
        tensor = torch.randn(3, 3, device="cuda")
        run(tensor)
    assert [one.kind for one in cuda.crossings] == kinds
    assert all(one.waits for one in cuda.crossings)


def test_copies_of_pinned_memory_do_not_wait():
    with fake_cuda() as cuda:
        pinned = torch.ones(4).pin_memory()
        pinned[1:].to("cuda", non_blocking=True)
        pinned.to("cuda")
        torch.ones(4).to("cuda", non_blocking=True)
        assert torch.ones(4, device="cuda").to("cpu", non_blocking=True).is_pinned()
    assert [one.waits for one in cuda.crossings] == [False, True, True, False]


def test_tensors_of_two_devices_do_not_mix():
    with fake_cuda(devices=2):
        for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
            with pytest.raises(RuntimeError, match="same device"):
                torch.ones(3, device="cuda") + other
            with pytest.raises(RuntimeError, match="same device"):
                torch.cat([torch.ones(3, device="cuda"), other])
        with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())


def test_a_training_runs_through_lightning(module, tmp_path):
    class Marks(Callback):
        def on_train_batch_start(self, *arguments):
            marks.append(len(cuda.crossings))

    marks = []
    before = module.unet.conv_in.weight.detach().clone()
    with fake_cuda() as cuda:
        trainer = Trainer(
            accelerator="gpu",
            devices=1,
            max_steps=3,
            limit_val_batches=0,
            callbacks=[Marks()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, ShapesDataModule(batch_size=2, train_length=6, val_length=2, size=32))
    assert len(marks) == 3
    assert "training/upload.py _copied" in {one.place for one in cuda.crossings[marks[1] : marks[2]]}
    assert not torch.equal(module.unet.conv_in.weight, before)


def test_an_optimizer_steps_as_on_the_cpu():
    layers = [nn.Linear(3, 3)]
    with fake_cuda() as cuda:
        layers.append(nn.Linear(3, 3).to("cuda"))
        layers[1].load_state_dict(layers[0].state_dict())
        start = len(cuda.crossings)
        for layer in layers:
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
            torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
        assert cuda.crossings[start:] == []
        with torch.autocast("cuda", torch.float16):
            assert layers[1](torch.ones(2, 3, device="cuda")).dtype == torch.float16
    assert torch.equal(*(values_of(layer.weight) for layer in layers))
    assert not torch.cuda.is_available()
