"""The order of training examples: drawn from seed and epoch, the same for any number of devices."""

from __future__ import annotations

import pytest

from sdmodule.data.sampler import ShuffleByEpoch

GROUPS = [list(range(7)), list(range(7, 20)), [20, 21]]


def batches(batch_size: int, devices: int, groups: list[list[int]] | None, count: int = 22, epoch: int = 0, skip=0):
    """The global batches of an epoch, merged from the parts of the devices."""
    parts = []
    for rank in range(devices):
        sampler = ShuffleByEpoch(range(count), batch_size, devices, rank, seed=5, groups=groups)
        sampler.set_epoch(epoch)
        sampler.skip = skip
        part = list(sampler)
        assert len(part) == len(sampler) - skip * batch_size, "every device has the same number"
        own = sampler.global_batch_size // devices
        parts.append([part[start : start + own] for start in range(0, len(part), own)])
    return [[index for places in zip(*batch, strict=True) for index in places] for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one group", "three groups"])
def test_the_batches_do_not_depend_on_the_number_of_devices(groups):
    assert batches(4, 1, groups) == batches(2, 2, groups) == batches(1, 4, groups)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one group", "three groups"])
def test_the_order_depends_on_seed_and_epoch_and_resumes_at_any_batch(groups):
    first, second = batches(2, 2, groups), batches(2, 2, groups, epoch=1)
    assert first == batches(2, 2, groups) != second and len(first) == len(second)
    for skip in range(len(first)):
        assert batches(2, 2, groups, skip=skip) == first[skip:]


def test_a_batch_has_one_group_and_no_example_is_lost():
    epoch = batches(2, 2, GROUPS)
    assert len(epoch) == 2 + 4 + 1 and {len(batch) for batch in epoch} == {4}
    assert all(any(set(batch) <= set(group) for group in GROUPS) for batch in epoch)
    shown = [index for batch in epoch for index in batch]
    assert set(shown) == set(range(22))
    assert max(shown.count(index) for index in range(20)) == 2 and shown.count(20) == shown.count(21) == 2
    assert {tuple(sorted(set(batch))) for batch in epoch} != {
        tuple(sorted(set(b))) for b in batches(2, 2, GROUPS, 22, 1)
    }


@pytest.mark.parametrize(("count", "devices", "sizes"), [(7, 1, [4]), (3, 1, [3]), (3, 2, [4]), (22, 2, [4] * 5)])
def test_a_single_group_drops_the_rest_and_too_few_examples_are_one_batch(count, devices, sizes):
    assert [len(batch) for batch in batches(4 // devices, devices, None, count)] == sizes


def test_the_largest_seed_lasts_for_any_number_of_epochs():
    sampler = ShuffleByEpoch(range(4), 2, seed=2**64 - 1)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == [0, 1, 2, 3]
