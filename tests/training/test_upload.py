"""Tensors of the host on a device, in one copy."""

import torch

from sdmodule.training.objective import Noise
from sdmodule.training.upload import upload_together
from tests.fake_cuda import fake_cuda, values_of

TENSORS = (
    torch.arange(7),
    [Noise(torch.randn(2, 3), torch.randn(5)), None, "text", 3],
    {"empty": torch.empty(0, 4), "true": torch.tensor([True, False, True]), "one": torch.tensor(2.5).double()},
)


def leaves(tensors):
    whole, [noise, *others], named = tensors
    return [whole, *noise, *named.values()], others


def test_all_tensors_travel_in_one_copy_that_nobody_waits_for():
    with fake_cuda() as cuda:
        there = upload_together(TENSORS, torch.device("cuda", 0))
    assert [(one.kind, one.waits) for one in cuda.crossings] == [("to device", False)]
    found, others = leaves(there)
    assert isinstance(there[1][0], Noise) and others == [None, "text", 3]
    for ours, theirs in zip(leaves(TENSORS)[0], found, strict=True):
        assert theirs.device.type == "cuda" and theirs.dtype == ours.dtype
        assert torch.equal(values_of(theirs), ours)


def test_on_a_cpu_nothing_is_copied():
    there = upload_together(TENSORS, torch.device("cpu"))
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in zip(leaves(TENSORS)[0], leaves(there)[0]))
