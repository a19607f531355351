"""Several ways to compute a layer: they give the same, and the fastest is found once for a machine."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdmodule.speed.cpu import autotune as choices
from sdmodule.speed.cpu.autotune import TORCH, fastest, measure_fastest
from sdmodule.speed.cpu.kernels import LINEARS, PACKED_LINEARS, fastest_linears, padded_attention
from sdmodule.speed.cpu.prepacked import packs


@pytest.fixture(autouse=True)
def a_new_machine(monkeypatch, tmp_path):
    """Nothing is known of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "CHOSEN", {})
    choices.autotune_cache_dir.cache_clear()
    yield
    choices.autotune_cache_dir.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", PACKED_LINEARS if packs(torch.float32) else LINEARS)
@torch.no_grad()
def test_every_way_gives_what_a_linear_layer_gives(way, bias):
    layer, tokens = nn.Linear(16, 24, bias=bias), torch.randn(2, 30, 16)
    with fastest_linears([layer]):
        for some in (tokens, tokens[:1]):  # weights that were put in order for two rows serve one
            torch.testing.assert_close(PACKED_LINEARS[way](some, layer), F.linear(some, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [77, 80, 1])
@torch.no_grad()
def test_keys_that_are_added_count_for_nothing(dtype, count):
    query, key, value = (torch.randn(2, length, 4, 8, dtype=dtype).transpose(1, 2) for length in (30, count, count))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs, ours = (way(query, key, value) for way in (F.scaled_dot_product_attention, padded_attention))
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm() + 1e-6


def slow(values):
    time.sleep(0.02)
    return values + 1


def quick(values):
    return values + 1


def test_the_fastest_is_found_and_what_is_hardly_faster_is_left():
    assert measure_fastest({TORCH: slow, "quick": quick}, (torch.zeros(1),)) == "quick"
    assert measure_fastest({TORCH: quick, "slow": slow}, (torch.zeros(1),)) == TORCH
    assert measure_fastest({TORCH: slow, "alike": slow}, (torch.zeros(1),)) == TORCH


@pytest.mark.parametrize(("patience", "trials"), [(60.0, choices.TRIALS), (0.0, choices.FEWEST)])
def test_what_takes_long_is_tried_less_often(monkeypatch, patience, trials):
    monkeypatch.setattr(choices, "PATIENCE", patience)
    calls: list[int] = []
    measure_fastest({TORCH: calls.append, "other": calls.append}, (1,))
    assert len(calls) == 2 * (1 + trials)


def test_what_was_found_holds_for_later_processes(monkeypatch):
    assert fastest({TORCH: slow, "quick": quick}, ("addition", 1), torch.zeros(1)) == 1
    monkeypatch.setattr(choices, "CHOSEN", {})  # as in another process, where another would be faster now
    fastest({TORCH: quick, "quick": slow}, ("addition", 1), torch.zeros(1))
    assert {"addition": "quick"} == {shape[0]: name for shape, name in choices.CHOSEN.items()}


def test_what_was_written_by_another_version_is_measured_anew():
    fastest({TORCH: slow, "quick": quick}, ("addition", 1), torch.zeros(1))
    choices.CHOSEN.clear()
    fastest({TORCH: slow, "brisk": quick}, ("addition", 1), torch.zeros(1))
    assert list(choices.CHOSEN.values()) == ["brisk"]


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "sdmodule").write_text("a file")
    assert fastest({TORCH: slow, "quick": quick}, ("addition", 1), torch.zeros(1)) == 1
    assert list(choices.CHOSEN.values()) == ["quick"]
