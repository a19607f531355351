"""Kernels of a layer agree, and the fastest is measured once per machine."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdmodule.speed.cpu import autotune
from sdmodule.speed.cpu.autotune import TORCH, fastest, measure_fastest
from sdmodule.speed.cpu.kernels import fastest_linears
from sdmodule.speed.cpu.layers import LINEARS
from sdmodule.speed.cpu.padded_attention import padded_attention
from sdmodule.speed.cpu.prepacked import supports_prepacking


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """No choice is known yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "CHOSEN", {})
    autotune.autotune_cache_dir.cache_clear()
    yield
    autotune.autotune_cache_dir.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", LINEARS)
@pytest.mark.skipif(not supports_prepacking(torch.float32), reason="oneDNN is not in this build of torch")
@torch.no_grad()
def test_every_linear_kernel_matches_torch(kernel, bias):
    layer, tokens = nn.Linear(16, 24, bias=bias), torch.randn(2, 30, 16)
    with fastest_linears([layer]):
        for batch in (tokens, tokens[:1]):  # weights prepacked for two rows work for one
            torch.testing.assert_close(LINEARS[kernel](batch, layer), F.linear(batch, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [77, 80, 1])
@torch.no_grad()
def test_padding_keys_have_no_weight(dtype, count):
    query, key, value = (torch.randn(2, length, 4, 8, dtype=dtype).transpose(1, 2) for length in (30, count, count))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs, ours = (kernel(query, key, value) for kernel in (F.scaled_dot_product_attention, padded_attention))
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm() + 1e-6


def slow(values):
    time.sleep(0.02)
    return values + 1


def quick(values):
    return values + 1


def test_the_fastest_is_chosen_if_it_beats_torch_by_a_margin():
    assert measure_fastest({TORCH: slow, "quick": quick}, (torch.zeros(1),)) == "quick"
    assert measure_fastest({TORCH: quick, "slow": slow}, (torch.zeros(1),)) == TORCH
    assert measure_fastest({TORCH: slow, "alike": slow}, (torch.zeros(1),)) == TORCH


@pytest.mark.parametrize(("patience", "trials"), [(60.0, autotune.TRIALS), (0.0, autotune.MIN_TRIALS)])
def test_slow_kernels_get_fewer_trials(monkeypatch, patience, trials):
    monkeypatch.setattr(autotune, "PATIENCE", patience)
    calls: list[int] = []
    measure_fastest({TORCH: calls.append, "other": calls.append}, (1,))
    assert len(calls) == 2 * (1 + trials)


def test_later_processes_keep_the_choice(monkeypatch):
    assert fastest({TORCH: slow, "quick": quick}, ("addition", 1), torch.zeros(1)) == 1
    monkeypatch.setattr(autotune, "CHOSEN", {})  # another process, in which the other one is faster
    fastest({TORCH: quick, "quick": slow}, ("addition", 1), torch.zeros(1))
    assert {"addition": "quick"} == {shape[0]: name for shape, name in autotune.CHOSEN.items()}


def test_a_cached_choice_that_no_longer_exists_is_measured_again():
    fastest({TORCH: slow, "quick": quick}, ("addition", 1), torch.zeros(1))
    autotune.CHOSEN.clear()
    fastest({TORCH: slow, "brisk": quick}, ("addition", 1), torch.zeros(1))
    assert list(autotune.CHOSEN.values()) == ["brisk"]


def test_an_unwritable_cache_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "sdmodule").write_text("a file")
    assert fastest({TORCH: slow, "quick": quick}, ("addition", 1), torch.zeros(1)) == 1
    assert list(autotune.CHOSEN.values()) == ["quick"]
