"""Tiled attention matches torch for scores of any size, and treats each image independently."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from sdmodule.speed.cpu import tiled_attention as tiles
from sdmodule.speed.cpu.tiled_attention import largest_score, tiled_attention


def qkv(tokens=300, keys=300, dtype=torch.float32, larger=1.0):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, tokens, 40, generator=generator) * larger
    key, value = torch.randn(2, 2, 3, keys, 40, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.mark.parametrize("scores", [2**21, 200_000, 1000, 1])
@pytest.mark.parametrize(("tokens", "keys"), [(300, 300), (256, 77), (16, 77), (1, 1)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("larger", [0.3, 1.5, 8])  # scores: small in both dtypes, in one, in none
def test_tiled_attention_matches_torch(monkeypatch, tokens, keys, dtype, close, scores, larger):
    monkeypatch.setattr(tiles, "SCORES", scores)
    query, key, value = qkv(tokens, keys, dtype, larger)
    wanted = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert (tiled_attention(query, key, value).float() - wanted).abs().max() < close


def test_no_score_exceeds_its_bound():
    query, key, _ = qkv(larger=3)
    scores = query @ key.transpose(2, 3)
    for index, image in enumerate(scores * 40**-0.5):
        assert image.abs().max() <= largest_score(query[index], key[index]) * (1 + 1e-6)


@pytest.mark.parametrize("larger", [1e4, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_whose_exponentials_overflow_are_no_problem(dtype, larger):
    query, key, value = qkv(64, 64, dtype, larger)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert (tiled_attention(query, key, value).double() - exact).norm() < 0.05 * exact.norm()


def test_float64_stays_exact():
    query, key, value = qkv(dtype=torch.float64)
    exact = F.scaled_dot_product_attention(query, key, value)
    assert (tiled_attention(query, key, value) - exact).norm() < 1e-14 * exact.norm()


@pytest.mark.parametrize("larger", [0.05, 0.2, 0.4, 0.6, 1, 3, 60])
@pytest.mark.parametrize("keys", [77, 1024])
@pytest.mark.parametrize("shared", [0, 2])  # mean of a head's values
def test_in_bfloat16_the_error_is_about_that_of_torch(larger, keys, shared):
    query, key, value = qkv(256, keys, torch.bfloat16, larger)
    value = value + shared
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs = (F.scaled_dot_product_attention(query, key, value).double() - exact).norm()
    assert (tiled_attention(query, key, value).double() - exact).norm() < 1.4 * theirs


@pytest.mark.parametrize("outlier", [3, 5, 10, 20, 50, 200])
@pytest.mark.parametrize("spread", [1, 2])
def test_an_outlier_of_little_weight_keeps_the_error(outlier, spread):
    query, key, value = qkv(256, 80, torch.bfloat16, 0.1)
    query[..., 0], key[..., 0, 0], value[..., 0, :] = 4 * spread, -6, outlier
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs = (F.scaled_dot_product_attention(query, key, value).double() - exact).norm()
    assert (tiled_attention(query, key, value).double() - exact).norm() < 2 * theirs


@pytest.mark.parametrize("larger", [600, 6000])
def test_with_huge_scores_near_ties_dominate_the_error(larger):
    query, key, value = qkv(256, 1024, torch.bfloat16, larger)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs = (F.scaled_dot_product_attention(query, key, value).double() - exact).norm()
    assert (tiled_attention(query, key, value).double() - exact).norm() < 1.5 * theirs


def test_the_precision_of_float32_products_is_restored():
    before = torch.get_float32_matmul_precision()
    a, b = torch.randn(2, 64, 64)
    product = a @ b
    given = qkv(dtype=torch.bfloat16)
    with ThreadPoolExecutor(4) as threads:  # the switch is of the whole process
        list(threads.map(lambda _: tiled_attention(*given), range(40)))
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(a @ b, product)


@pytest.mark.parametrize("scores", [2**21, 300 * 300])
def test_an_image_does_not_depend_on_its_neighbour(monkeypatch, scores):
    monkeypatch.setattr(tiles, "SCORES", scores)
    query, key, value = qkv()
    alone = tiled_attention(query, key, value)[:1]
    query[1] *= 1e6
    assert torch.equal(tiled_attention(query, key, value)[:1], alone)


def test_a_nan_stays_with_its_query():
    query, key, value = qkv(8, 8)
    query[0, 0, 0, 0] = torch.nan
    seen = tiled_attention(query, key, value)
    assert torch.isnan(seen[0, 0, 0]).all() and torch.isfinite(seen[1]).all()
