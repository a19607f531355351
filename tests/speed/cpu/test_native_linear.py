"""The C++ kernel of linear and GEGLU layers: every size, with AMX and without."""

from __future__ import annotations

import ctypes

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import nn

from sdmodule.speed.cpu import layers
from sdmodule.speed.cpu.kernels import fastest_linears
from sdmodule.speed.cpu.layers import FastestGEGLU, FastestLinear, geglu_kernels, linear_kernels
from sdmodule.speed.cpu.native import linear as native
from sdmodule.speed.cpu.native.jit_build import compile_library, is_available

NEEDS = "needs a processor with bfloat16 in AVX-512, and a GNU compiler"
needs_native = pytest.mark.skipif(not is_available(native.SOURCE), reason=NEEDS)
KERNELS = {FastestLinear: native.native_linear, FastestGEGLU: native.native_geglu}


@pytest.fixture(params=[(), ("-mno-amx-bf16",)], ids=["this processor", "without AMX"], scope="module")
def run(request, tmp_path_factory):
    """Runs a layer with the kernel compiled for this processor, and for one with AVX-512 only."""
    if not is_available(native.SOURCE):
        pytest.skip(NEEDS)
    library = ctypes.CDLL(str(compile_library(native.SOURCE, tmp_path_factory.mktemp("library"), *request.param)))
    assert library.available()

    def run(layer, tokens):
        with fastest_linears([layer]), torch.no_grad():
            return KERNELS[type(layer)](tokens, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_library", lambda source: library)
        yield run


def made(kind, inputs, outputs, bias=True):
    torch.manual_seed(0)
    return kind(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)


def error(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", [nn.Linear, GEGLU])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(32, 32, 32), (33, 64, 96), (77, 320, 64), (600, 1280, 32)])
def test_its_error_is_at_most_that_of_torch(run, kind, tokens, inputs, outputs, bias):
    layer = made(kind, inputs, outputs, bias)
    given = 3 * torch.randn(1, tokens, inputs).bfloat16()
    exact = made(kind, inputs, outputs, bias).double()(given.double())
    assert error(run(layer, given), exact) <= 1.01 * error(layer(given), exact)


def test_gates_are_exact_from_end_to_end(run):
    """The gates' function is an approximation of its own."""
    layer = made(GEGLU, 32, 32)
    layer.proj.weight.zero_()
    values, gates = layer.proj.bias.chunk(2)
    values.fill_(1)
    for start in range(-128, 128, 32):
        gates.copy_(torch.arange(start, start + 32) / 8)
        found = run(layer, torch.zeros(1, 32, 32).bfloat16())[0, 0]
        wanted = nn.functional.gelu(gates.double())
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=3e-6)


@pytest.mark.parametrize("kind", [nn.Linear, GEGLU])
def test_the_result_depends_on_neither_batch_nor_threads(run, kind):
    layer, tokens = made(kind, 64, 96), torch.randn(3, 77, 64).bfloat16()
    together, threads = run(layer, tokens), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for one in range(3):
            assert torch.equal(run(layer, tokens[one : one + 1]), together[one : one + 1])
    finally:
        torch.set_num_threads(threads)


def test_tokens_may_have_any_strides(run):
    layer, tokens = made(nn.Linear, 64, 32), torch.randn(2, 50, 128).bfloat16()
    strided = tokens[:, 1:, ::2]
    assert torch.equal(run(layer, strided), run(layer, strided.contiguous()))


def test_the_default_dtype_does_not_matter(run):
    """Lightning changes it in true half precision."""
    layer, tokens = made(GEGLU, 64, 96), torch.randn(1, 64, 64).bfloat16()
    wanted = run(layer, tokens)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(run(layer, tokens), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_native
def test_other_layers_and_tokens_are_left_to_other_kernels():
    layer, tokens = made(nn.Linear, 64, 96), torch.randn(1, 32, 64).bfloat16()
    assert "native" in linear_kernels(tokens, layer) and "native" in geglu_kernels(tokens, layer)
    assert "native" not in linear_kernels(torch.randn(2, 31, 64).bfloat16(), layer)  # in any batch
    assert "native" not in linear_kernels(tokens.float(), made(nn.Linear, 64, 96).float())
    for inputs, outputs in ((48, 96), (64, 80)):
        assert "native" not in linear_kernels(torch.randn(1, 32, inputs).bfloat16(), made(nn.Linear, inputs, outputs))


@needs_native
def test_layers_run_it_where_it_is_the_fastest(monkeypatch):
    chosen = []
    monkeypatch.setattr(layers, "fastest", lambda kernels, *_: chosen.append(set(kernels)) or kernels["native"](*_[1:]))
    for kind, shape in ((nn.Linear, (64, 96)), (GEGLU, (64, 96))):
        layer, tokens = made(kind, *shape), torch.randn(2, 50, 64).bfloat16()
        wanted = layer(tokens)
        with fastest_linears([layer]), torch.no_grad():
            torch.testing.assert_close(layer(tokens), wanted, rtol=0.02, atol=0.02)
    assert len(chosen) == 2
