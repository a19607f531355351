"""What is done for fake CUDA tensors above torch's dispatcher, where C++ asks for a real device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tests.fake_cuda.tensor import FakeCuda, FakeCudaTensor, device_index, values_of


class FakeCudaFunctions(TorchFunctionMode):
    """``cuda`` means ``cuda:0``, which torch without CUDA cannot look up; and what C++ refuses to subclasses works."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and isinstance(args[0], FakeCudaTensor):
            self.cuda.record("to host", f"{list(args[0].shape)}")
            return args[0].values.tolist()
        if func is scaled_dot_product_attention and isinstance(args[0], FakeCudaTensor) and not _learns(args):
            # the CPU's kernel, so that results equal the CPU's; with gradients torch's composite form
            FakeCuda.check_same_device(
                "attention", [one for one in [*args, *kwargs.values()] if isinstance(one, Tensor)]
            )
            index = args[0].device.index
            args, kwargs = tree_map(values_of, tuple(args)), tree_map(values_of, kwargs)
            return FakeCudaTensor(func(*args, **kwargs), index)
        if func is Tensor.backward and isinstance(args[0], FakeCudaTensor):
            return add_ones_to_gradients(args[0])
        if func is Tensor.cuda:
            return args[0].to(torch.device("cuda", device_index(args[1] if len(args) > 1 else kwargs.get("device"))))
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(_with_index(one) for one in args)
        kwargs = {name: _with_index(one) for name, one in kwargs.items()}
        return func(*args, **kwargs)


def add_ones_to_gradients(loss: Tensor) -> None:
    """Stand in for ``loss.backward()``: add ones to the gradient of each parameter that the loss depends on."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(one for one, _ in node.next_functions)
        parameter = getattr(node, "variable", None)
        if parameter is not None:
            ones = torch.ones_like(parameter)
            parameter.grad = ones if parameter.grad is None else parameter.grad + ones


def _learns(args: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in args)


def _with_index(one: Any) -> Any:
    if isinstance(one, str) and one == "cuda":
        return "cuda:0"
    bare = isinstance(one, torch.device) and one.type == "cuda" and one.index is None
    return torch.device("cuda", 0) if bare else one
