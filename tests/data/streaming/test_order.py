"""The order of a streamed set: of seed and epoch alone, for any number of devices, with nothing lost on a resume."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from sdmodule.data.streaming.index import Samples, ShardIndex, hold_back, parse_index, select
from sdmodule.data.streaming.order import EpochOrder
from sdmodule.data.streaming.sampler import StreamSampler
from sdmodule.errors import SettingsError

BUCKETS = [[64, 64], [32, 96], [96, 32]]


def index(shards: int = 24) -> ShardIndex:
    """Shards of 3 to 9 samples, in three buckets."""
    rng = random.Random(1)
    records = [
        {"name": f"{k}.tar", "samples": rng.randint(3, 9), "bytes": 1000 + k, "bucket": BUCKETS[k % 3]}
        for k in range(shards)
    ]
    return ShardIndex.of(records, resolution=(64, 64))


def samples(buckets: bool) -> Samples:
    return select(index(), np.arange(24), buckets)


def global_batches(found: Samples, batch_size: int, devices: int, done: int = 0, state=None, epoch: int = 0):
    """The global batches that are left of an epoch, merged from the parts of the devices, and the sampler of one."""
    parts, numbers = [], set()
    for rank in range(devices):
        sampler = StreamSampler(range(len(found)), found, batch_size // devices, devices, rank, seed=5, window=2)
        numbers.add(sampler.resume(epoch, done, state))
        parts.append(list(sampler))
    own = batch_size // devices
    cut = [[part[k : k + own] for k in range(0, len(part), own)] for part in parts]
    [number] = numbers
    return [[x for places in zip(*one, strict=True) for x in places] for one in zip(*cut, strict=True)], number, sampler


@pytest.mark.parametrize("buckets", [False, True])
def test_the_batches_depend_on_seed_and_epoch_and_not_on_the_number_of_devices(buckets):
    found = samples(buckets)
    one, two, four = (global_batches(found, 4, devices)[0] for devices in (1, 2, 4))
    assert one == two == four
    other = global_batches(found, 4, 1, epoch=1)[0]
    assert other != one and len(other) == len(one)
    if buckets:  # all batches are full, and each is of one bucket
        sizes = [{tuple(index().buckets[found.locate(k)[0]]) for k in batch} for batch in one]
        assert {len(batch) for batch in one} == {4} and all(len(size) == 1 for size in sizes)
        assert {k for batch in one for k in batch} == set(range(len(found)))
        assert len(set(map(str, sizes[:6]))) > 1, "the buckets alternate"
    else:
        shown = [k for batch in one for k in batch]
        assert len(shown) == len(set(shown)) == len(found) // 4 * 4


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("sizes", [[(6, 1), (6, 2), (6, 3), (6, 1)], [(6, 1), (4, 2), (3, 3), (5, 1), (1, 1)]], ids=str)
def test_an_epoch_that_is_resumed_on_other_devices_shows_every_sample_once(buckets, sizes):
    found = samples(buckets)
    shown: list[int] = []
    done, state = 0, None
    for last, (batch_size, devices) in enumerate(sizes, start=1 - len(sizes)):
        batches, number, sampler = global_batches(found, batch_size, devices, done, state)
        seen = len(batches) if not last else 3
        shown += [k for batch in batches[:seen] for k in batch]
        done, state = number + seen, sampler.state()
    if (
        len({batch_size for batch_size, _ in sizes}) == 1
    ):  # as without a resume, which repeats or drops in its last batch
        assert shown == [k for batch in global_batches(found, 6, 1)[0] for k in batch]
    else:
        assert Counter(shown) == Counter(range(len(found)))
    assert done == sampler.batches, "the epoch ends where an epoch ends"


def test_any_batch_is_known_without_those_before_it_and_reads_few_shards():
    found = samples(buckets=True)
    order = EpochOrder(found, 0, 3, 2, 5)
    batches = [order.batch(k) for k in range(order.batches)]
    for k in range(order.batches):
        assert EpochOrder(found, 0, 3, 2, 5).batch(k) == batches[k]
        upcoming = {int(s) for group, window in order.upcoming(k) for s in order.groups[group].shards_of(window)}
        full = batches[k] if k + 1 < order.batches else []
        new = {found.position(one) for one in full} - upcoming
        assert not new or sum(order.shown(k + 1)) < sum(order.shown(k)) + 5, "only what fills up a last batch"


def test_the_buckets_alternate_evenly_over_a_long_epoch():
    counts = np.full(300, 1000)
    groups = (np.arange(200), np.arange(200, 290), np.arange(290, 300))
    order = EpochOrder(Samples(np.arange(300), np.zeros(300, int), counts, groups, True), 0, 0, 4, 10)
    assert order.batches == 30_000
    half = [shown / len(group) for shown, group in zip(order.shown(15_000), order.groups, strict=True)]
    assert half == pytest.approx([0.5] * 3, abs=0.02)


def test_a_share_is_held_back_for_validation_from_few_shards():
    found = samples(buckets=True)
    train, val = hold_back(index(), found, 0.1, "data.url=x")
    where = [{part.locate(k) for k in range(len(part))} for part in (train, val)]
    assert len(val) == round(0.1 * len(found)) and not where[0] & where[1]
    assert where[0] | where[1] == {found.locate(k) for k in range(len(found))} and len({s for s, _ in where[1]}) <= 4
    assert sum(len(train.counts[group]) for group in train.groups) == len(train.shards)
    with pytest.raises(SettingsError, match="a single sample"):
        hold_back(index(1), Samples(np.array([0]), np.array([0]), np.array([1]), (np.array([0]),)), 0.5, "data.url=x")


def test_an_index_is_read_as_it_was_written():
    read = parse_index(index().text(), "data.url=x")
    assert read.identity == index().identity and read.resolution == (64, 64)
    assert (read.buckets == index().buckets).all()
    for text in ("{}", "[1]", "nothing", index().text().replace("shards 1", "shards 2"), '{"format": null}'):
        with pytest.raises(SettingsError, match=r"data.url=x: is no index of this version"):
            parse_index(text, "data.url=x")
