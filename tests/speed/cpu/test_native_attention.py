"""The C++ attention kernel: every size, with AMX and without, and machines that cannot build it."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock

from benchmarks.forked import output_of
from sdmodule.speed.cpu import layers
from sdmodule.speed.cpu.autotune import autotune_cache_dir
from sdmodule.speed.cpu.kernels import fastest_blocks
from sdmodule.speed.cpu.layers import attention_kernels
from sdmodule.speed.cpu.native import attention as native
from sdmodule.speed.cpu.native.attention import SOURCE
from sdmodule.speed.cpu.native.jit_build import compile_library, is_available, load_library

NEEDS = "needs a processor with bfloat16 in AVX-512, and a GNU compiler"
needs_native = pytest.mark.skipif(not is_available(SOURCE), reason=NEEDS)


@pytest.fixture(params=[(), ("-mno-amx-bf16",)], ids=["this processor", "without AMX"], scope="module")
def attention(request, tmp_path_factory):
    """The kernel compiled for this processor, and for one with AVX-512 only."""
    if not is_available(SOURCE):
        pytest.skip(NEEDS)
    library = ctypes.CDLL(str(compile_library(SOURCE, tmp_path_factory.mktemp("library"), *request.param)))
    assert library.available()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_library", lambda source: library)
        yield native.native_attention


def qkv(queries=70, keys=70, width=40, larger=1.0, images=2):
    """Query, key and value with the strides that a layer gives them: heads within tokens."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(images, count, 3, width, generator=generator) for count in (queries, keys, keys)]
    made[0] *= larger
    return [one.bfloat16().transpose(1, 2) for one in made]


def error(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("width", [2, 12, 40, 64, 80, 160])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 77), (70, 300), (256, 1024), (5, 128)])
def test_its_error_is_about_that_of_torch(attention, queries, keys, width):
    tensors = qkv(queries, keys, width)
    exact = F.scaled_dot_product_attention(*(one.double() for one in tensors))
    theirs = error(F.scaled_dot_product_attention(*tensors), exact)
    assert error(attention(*tensors), exact) <= 1.1 * theirs + 1e-4


@pytest.mark.parametrize("larger", [0.01, 4, 100, 1e6])
@pytest.mark.parametrize("shared", [0, 5])  # mean of a head's values
def test_large_scores_and_a_common_mean_keep_the_error(attention, larger, shared):
    query, key, value = qkv(100, 400, larger=larger)
    value = value + shared
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs = error(F.scaled_dot_product_attention(query, key, value), exact)
    assert error(attention(query, key, value), exact) <= 1.1 * theirs + 1e-4


def test_the_largest_score_may_come_last(attention):
    query, key, value = qkv(40, 500)
    key[:, :, -1] = 9 * query[:, :, 0]
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert error(attention(query, key, value), exact) < 3e-3


def test_the_result_depends_on_neither_batch_nor_threads(attention):
    tensors = qkv(200, 200, images=3)
    together = attention(*tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one in range(3):
            assert torch.equal(attention(*(tensor[one : one + 1] for tensor in tensors)), together[one : one + 1])
    finally:
        torch.set_num_threads(threads)


def test_the_result_does_not_depend_on_strides(attention):
    query, key, value = qkv(50, 60)
    wanted = attention(query, key, value)
    assert torch.equal(attention(query.contiguous(), key.contiguous(), value.contiguous()), wanted)
    together = torch.cat([one.transpose(1, 2) for one in (key, value)], dim=-1).transpose(1, 2)
    assert torch.equal(attention(query, *together.chunk(2, dim=-1)), wanted)
    assert wanted.transpose(1, 2).is_contiguous()  # so that joining the heads needs no copy


def test_the_amx_configuration_is_restored(attention):
    """oneDNN uses AMX too."""
    left, right = torch.randn(2, 200, 300).bfloat16()
    wanted = left @ right.T
    attention(*qkv())
    assert torch.equal(left @ right.T, wanted)


@needs_native
def test_a_block_runs_it_where_it_is_the_fastest(monkeypatch):
    monkeypatch.setattr(layers, "fastest", lambda kernels, shape, *qkv: kernels.get("native", kernels["torch"])(*qkv))
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16).bfloat16()
    tokens, text = torch.randn(2, 64, 16).bfloat16(), torch.randn(2, 77, 16).bfloat16()
    with torch.no_grad():
        wanted = block(tokens, encoder_hidden_states=text)
        with fastest_blocks([block]):
            torch.testing.assert_close(block(tokens, encoder_hidden_states=text), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("larger", [1e9, 1e18, 1e30])
def test_huge_scores_are_no_problem(attention, larger):
    query, key, value = qkv(64, 300, larger=larger)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert error(attention(query, key, value), exact) < 3e-3


def test_the_first_keys_may_have_no_weight(attention):
    query, key, value = qkv(40, 300)
    query[..., 0], key[:, :, :200, 0] = 1, -torch.inf
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert error(attention(query, key, value), exact) < 5e-3


@needs_native
@pytest.mark.parametrize(
    ("change", "supported"),
    [
        (lambda *tensors: tensors, True),
        (lambda *tensors: [one.float() for one in tensors], False),
        (lambda query, key, value: (query, key[:1], value[:1]), False),
        (lambda query, key, value: (query, key, value[..., :8]), False),
        (lambda query, key, value: (query, key[:, :, :0], value[:, :, :0]), False),
        (lambda *tensors: [one[..., :39] for one in tensors], False),
        (lambda *tensors: [one[..., ::2] for one in tensors], False),
    ],
    ids=["as it is", "float32", "broadcast", "other width", "no key", "odd width", "stride 2"],
)
def test_unsupported_tensors_are_left_to_other_kernels(change, supported):
    assert ("native" in attention_kernels(*change(*qkv()))) == supported


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A cache folder without a library, for functions that remember nothing."""
    remembering = (autotune_cache_dir, load_library, is_available)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in remembering:
        function.cache_clear()
    yield tmp_path
    for function in remembering:
        function.cache_clear()


def kernel_names():
    return sorted(attention_kernels(*qkv(keys=64)))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true", 'g++ "'])
def test_without_a_compiler_the_other_kernels_remain(empty_cache, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert kernel_names() == ["tiles", "torch"]
    assert not list(empty_cache.rglob("*.so"))


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("left", [0, 9000])
def test_a_damaged_library_is_compiled_again(empty_cache, left):
    load_library(SOURCE)
    (cached,) = empty_cache.rglob("*.so")
    content = cached.read_bytes()
    cached.write_bytes(content[:left])
    load_library.cache_clear()
    load_library(SOURCE)
    assert cached.read_bytes() == content


@needs_native
def test_a_library_that_others_may_write_is_not_loaded(empty_cache, monkeypatch):
    load_library(SOURCE)
    (cached,) = empty_cache.rglob("*.so")
    monkeypatch.setenv("PATH", "")
    for mode, names in ((0o600, ["native", "tiles", "torch"]), (0o666, ["tiles", "torch"])):
        cached.chmod(mode)
        load_library.cache_clear()
        is_available.cache_clear()
        assert kernel_names() == names


@needs_native
def test_an_unwritable_cache_is_no_error(empty_cache):
    (empty_cache / "sdmodule").write_text("a file")
    assert kernel_names() == ["native", "tiles", "torch"]
    assert not list(empty_cache.rglob("*.so"))


def print_kernels():
    for remembering in (autotune_cache_dir, load_library, is_available):  # what the forked process has found elsewhere
        remembering.cache_clear()
    query = torch.ones(1, 2, 32, 8).bfloat16()
    kernels = attention_kernels(query, query, query)
    print(sorted(kernels), [round(float(kernel(query, query, query).float().norm()), 1) for kernel in kernels.values()])
    print(len(list(autotune_cache_dir().glob("*.so"))))


@pytest.mark.slow
@needs_native
def test_it_is_compiled_once_for_all_processes(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = output_of(print_kernels, tmp_path / "log", cache).strip()
    assert first.startswith("['native', 'tiles', 'torch']")
    assert first.endswith("1")
    assert output_of(print_kernels, tmp_path / "log", {**cache, "PATH": ""}).strip() == first
