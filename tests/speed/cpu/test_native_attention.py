"""Attention in C++ is attention: of all sizes, by both kinds of processor, and there or not without a word."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock

from benchmarks.forked import output_of
from sdmodule.speed.cpu import kernels
from sdmodule.speed.cpu.kernels import attentions, fastest_blocks
from sdmodule.speed.cpu.native import attention as native
from sdmodule.speed.cpu.native.attention import SOURCE
from sdmodule.speed.cpu.native.jit_build import compiled, is_available
from tests.speed.cpu.print_attentions import print_attentions

NEEDS = "needs a processor with bfloat16 in AVX-512, and a GNU compiler"
here = pytest.mark.skipif(not is_available(SOURCE), reason=NEEDS)


@pytest.fixture(params=[(), ("-mno-amx-bf16",)], ids=["this processor", "without a matrix unit"], scope="module")
def attention(request, tmp_path_factory):
    """The function, as it is compiled here and as it is where there is nothing but AVX-512."""
    if not is_available(SOURCE):
        pytest.skip(NEEDS)
    made = ctypes.CDLL(str(compiled(SOURCE, tmp_path_factory.mktemp("made"), *request.param)))
    assert made.available()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda source: made)
        yield native.native_attention


def qkv(queries=70, keys=70, width=40, larger=1.0, images=2):
    """As a layer has them: heads inside tokens."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(images, count, 3, width, generator=generator) for count in (queries, keys, keys)]
    made[0] *= larger
    return [one.bfloat16().transpose(1, 2) for one in made]


def error(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("width", [2, 12, 40, 64, 80, 160])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 77), (70, 300), (256, 1024), (5, 128)])
def test_its_error_is_that_of_torch(attention, queries, keys, width):
    given = qkv(queries, keys, width)
    exact = F.scaled_dot_product_attention(*(one.double() for one in given))
    theirs = error(F.scaled_dot_product_attention(*given), exact)
    assert error(attention(*given), exact) <= 1.1 * theirs + 1e-4


@pytest.mark.parametrize("larger", [0.01, 4, 100, 1e6])
@pytest.mark.parametrize("shared", [0, 5])  # by the values of a head
def test_neither_large_scores_nor_alike_ones_harm_it(attention, larger, shared):
    query, key, value = qkv(100, 400, larger=larger)
    value = value + shared
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs = error(F.scaled_dot_product_attention(query, key, value), exact)
    assert error(attention(query, key, value), exact) <= 1.1 * theirs + 1e-4


def test_a_larger_score_may_come_at_the_end(attention):
    query, key, value = qkv(40, 500)
    key[:, :, -1] = 9 * query[:, :, 0]
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert error(attention(query, key, value), exact) < 3e-3


def test_it_gives_the_same_whatever_the_batch_and_the_threads(attention):
    given = qkv(200, 200, images=3)
    together = attention(*given)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one in range(3):
            assert torch.equal(attention(*(tensor[one : one + 1] for tensor in given)), together[one : one + 1])
    finally:
        torch.set_num_threads(threads)


def test_where_the_tensors_lie_does_not_matter(attention):
    query, key, value = qkv(50, 60)
    wanted = attention(query, key, value)
    assert torch.equal(attention(query.contiguous(), key.contiguous(), value.contiguous()), wanted)
    together = torch.cat([one.transpose(1, 2) for one in (key, value)], dim=-1).transpose(1, 2)
    assert torch.equal(attention(query, *together.chunk(2, dim=-1)), wanted)
    assert wanted.transpose(1, 2).is_contiguous()  # so that a layer joins the heads without a copy


def test_other_products_go_on_as_before(attention):
    """Matrix units keep how they are set up; oneDNN multiplies by them too."""
    left, right = torch.randn(2, 200, 300).bfloat16()
    wanted = left @ right.T
    attention(*qkv())
    assert torch.equal(left @ right.T, wanted)


@here
def test_a_block_takes_it_where_it_is_the_fastest(monkeypatch):
    monkeypatch.setattr(kernels, "fastest", lambda ways, shape, *given: ways.get("native", ways["torch"])(*given))
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16).bfloat16()
    tokens, text = torch.randn(2, 64, 16).bfloat16(), torch.randn(2, 77, 16).bfloat16()
    with torch.no_grad():
        wanted = block(tokens, encoder_hidden_states=text)
        with fastest_blocks([block]):
            torch.testing.assert_close(block(tokens, encoder_hidden_states=text), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("larger", [1e9, 1e18, 1e30])
def test_scores_beyond_all_reason_are_no_harm(attention, larger):
    query, key, value = qkv(64, 300, larger=larger)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert error(attention(query, key, value), exact) < 3e-3


def test_keys_of_no_weight_may_come_first(attention):
    query, key, value = qkv(40, 300)
    query[..., 0], key[:, :, :200, 0] = 1, -torch.inf
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert error(attention(query, key, value), exact) < 5e-3


@here
@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda *given: given, True),
        (lambda *given: [one.float() for one in given], False),
        (lambda query, key, value: (query, key[:1], value[:1]), False),
        (lambda query, key, value: (query, key, value[..., :8]), False),
        (lambda query, key, value: (query, key[:, :, :0], value[:, :, :0]), False),
        (lambda *given: [one[..., :39] for one in given], False),
        (lambda *given: [one[..., ::2] for one in given], False),
    ],
    ids=["as it is", "float32", "one for all", "other width", "no key", "odd width", "every other number"],
)
def test_what_it_cannot_compute_is_left_to_the_others(change, fits):
    assert ("native" in attentions(*change(*qkv()))) == fits


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true", 'g++ "'])
def test_without_a_compiler_there_are_the_others(tmp_path, compiler):
    told = run_program(tmp_path, CXX=compiler)
    assert told.startswith("['tiles', 'torch']")
    assert told.endswith("0")


@pytest.mark.slow
@here
def test_it_is_compiled_once_for_all_processes(tmp_path):
    first = run_program(tmp_path)
    assert first.startswith("['native', 'tiles', 'torch']")
    assert first.endswith("1")
    assert run_program(tmp_path, PATH="") == first


@pytest.mark.slow
@here
@pytest.mark.parametrize("left", [0, 100, 9000, 20000])
def test_one_that_is_damaged_is_compiled_anew(tmp_path, left):
    first = run_program(tmp_path)
    (kept,) = tmp_path.rglob("*.so")
    content = kept.read_bytes()
    kept.write_bytes(content[:left])
    assert run_program(tmp_path) == first
    assert kept.read_bytes() == content


@here
def test_one_that_others_may_write_is_not_loaded(tmp_path):
    run_program(tmp_path)
    (kept,) = tmp_path.rglob("*.so")
    kept.chmod(0o666)
    assert run_program(tmp_path, PATH="").startswith("['tiles', 'torch']")


@here
def test_a_home_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "sdmodule").write_text("a file")
    told = run_program(tmp_path)
    assert told.startswith("['native', 'tiles', 'torch']")
    assert told.endswith("0")


def run_program(cache, **environment):
    return output_of(print_attentions, cache / "log", {"XDG_CACHE_HOME": str(cache), **environment}).strip()
