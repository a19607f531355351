"""Attention by tiles is attention, whatever the size of its scores, and of each picture by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sdmodule.speed import tiled_attention as tiles
from sdmodule.speed.tiled_attention import scores_are_small, tiled_attention


def qkv(tokens=300, keys=300, dtype=torch.float32, larger=1.0):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, tokens, 40, generator=generator) * larger
    key, value = torch.randn(2, 2, 3, keys, 40, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def scaled(query, key):
    return (query * 40**-0.5).flatten(0, 1), key.flatten(0, 1).transpose(1, 2)


@pytest.mark.parametrize("scores", [2**21, 200_000, 1000, 1])
@pytest.mark.parametrize(("tokens", "keys"), [(300, 300), (256, 77), (16, 77), (1, 1)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_by_tiles_is_attention(monkeypatch, tokens, keys, dtype, close, scores):
    monkeypatch.setattr(tiles, "SCORES", scores)
    query, key, value = qkv(tokens, keys, dtype)
    assert scores_are_small(*scaled(query, key)).all()
    wanted = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert (tiled_attention(query, key, value).float() - wanted).abs().max() < close


@pytest.mark.parametrize("larger", [10, 1e4, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_whose_exponentials_overflow_are_no_harm(dtype, larger):
    query, key, value = qkv(64, 64, dtype, larger)
    assert not scores_are_small(*scaled(query, key)).any()
    wanted = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    seen = tiled_attention(query, key, value)
    assert torch.isfinite(seen).all()
    if larger == 10:  # beyond, the largest score alone decides, and rounding decides which that is
        assert (seen.double() - wanted).norm() / wanted.norm() < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_float16_has_no_room_for_sums_of_exponentials():
    query, key, value = qkv(4096, 4096, torch.float16)
    query, key = query.fill_(1), key.fill_(0.8)  # scores of 5, whose 4,096 exponentials are 608,000 in all
    torch.testing.assert_close(tiled_attention(query, key, value)[0, 0, 0], value[0, 0].mean(dim=0), atol=2e-3, rtol=0)


@pytest.mark.parametrize("scores", [2**21, 300 * 300])
def test_a_picture_does_not_depend_on_its_neighbour(monkeypatch, scores):
    monkeypatch.setattr(tiles, "SCORES", scores)
    query, key, value = qkv()
    alone = tiled_attention(query, key, value)[:1]
    query[1] *= 1e6
    assert torch.equal(tiled_attention(query, key, value)[:1], alone)


def test_what_is_no_number_comes_out_as_none():
    query, key, value = qkv(8, 8)
    query[0, 0, 0, 0] = torch.nan
    seen = tiled_attention(query, key, value)
    assert torch.isnan(seen[0, 0, 0]).all() and torch.isfinite(seen[1]).all()
