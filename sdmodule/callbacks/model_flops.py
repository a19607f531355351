"""Floating-point operations of a model: those of each kind of call are counted once, on meta tensors.

Nothing is computed and nothing is slowed down: a run only notes which networks are called, with which shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

_COUNTED: WeakKeyDictionary[nn.Module, dict[Hashable, int]] = WeakKeyDictionary()
"""Operations of each kind of call, for the rest of the process."""


class CallRecorder:
    """Notes the calls of a module's networks inside a ``with`` block.

    Args:
        module: its children are the networks; of an autoencoder, encoder and decoder are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.networks = list(called_networks(module))
        self.calls: Counter[Hashable] = Counter()
        self._kinds: dict[Hashable, tuple[nn.Module, Any, Any, bool]] = {}

    def __enter__(self) -> CallRecorder:
        self._hooks = [one.register_forward_pre_hook(self._note, with_kwargs=True) for one in self.networks]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        grad = torch.is_grad_enabled()
        kind = id(network), grad, _shapes((args, kwargs))
        if kind not in self.calls:
            self._kinds[kind] = network, tree_map(_on_meta, args), tree_map(_on_meta, kwargs), grad
        self.calls[kind] += 1

    def flops(self) -> int:
        """Operations of all calls, with their backward where gradients were on."""
        return sum(times * self._once(kind) for kind, times in self.calls.items())

    def _once(self, kind: Hashable) -> int:
        network, args, kwargs, grad = self._kinds[kind]
        known = _COUNTED.setdefault(network, {})
        trained = tuple(parameter.requires_grad for parameter in network.parameters()) if grad else ()
        if (kind, trained) not in known:
            known[kind, trained] = count_flops(network, args, kwargs, grad)
        return known[kind, trained]


def called_networks(module: nn.Module) -> Iterator[nn.Module]:
    """The networks of a module that are called as a whole, in eager mode."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or hasattr(child, "encode"):
            yield from called_networks(child)
        elif child._compiled_call_impl is None:  # a hook would compile it anew
            yield child


def count_flops(network: nn.Module, args: Any, kwargs: Any, grad: bool) -> int:
    """Operations of one call of a network as it was built: in eager mode, with torch's kernels and attention.

    Args:
        network: on any device, which it does not leave.
        args: positional arguments, on the meta device.
        kwargs: keyword arguments, likewise.
        grad: count the backward too, for the weights that are trained.
    """
    counter = FlopCounter()
    # in inference mode the counter would see linear layers whole, for which there is no formula
    with plain_layers(network), torch.inference_mode(False), torch.set_grad_enabled(grad), counter:
        weights = {name: _on_meta(value) for name, value in [*network.named_parameters(), *network.named_buffers()]}
        made, _ = tree_flatten(_plain(functional_call(network, weights, args, kwargs)))
        learned = [one for one in made if isinstance(one, Tensor) and one.requires_grad]
        if learned:
            torch.autograd.backward([one.sum() for one in learned])
    return counter.total


class FlopCounter(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention by torch's own formulas.

    Torch's ``FlopCounterMode`` gives the same number, module by module, in several times the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=made) if formula else 0
        return made


@contextmanager
def plain_layers(network: nn.Module) -> Iterator[None]:
    """Take compilation and this package's own kernels off a network inside a ``with`` block; meta has none of them."""
    with ExitStack() as stack:
        for layer in network.modules():
            stack.callback(layer.__dict__.update, _compiled_call_impl=layer.__dict__.get("_compiled_call_impl"))
            layer._compiled_call_impl = None
            own = type(layer)
            plain = next(base for base in own.__mro__ if not base.__module__.startswith("sdmodule."))
            if plain is not own and plain not in (nn.Module, object):
                stack.callback(setattr, layer, "__class__", own)
                layer.__class__ = plain
            processor = getattr(layer, "processor", None)
            if isinstance(processor, (AttnProcessor2_0, XFormersAttnProcessor)):
                stack.callback(setattr, layer, "processor", processor)
                layer.processor = AttnProcessor2_0()
        yield


def _on_meta(value: Any) -> Any:
    """A tensor of the same shape without data; floating-point ones in float32, whatever mixture autocast would make."""
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    made = torch.empty(value.shape, dtype=dtype, device="meta")
    return made.requires_grad_(value.requires_grad) if value.is_floating_point() else made


def _shapes(tree: Any) -> Hashable:
    leaves, _ = tree_flatten(tree)
    return tuple(
        (tuple(one.shape), one.is_floating_point(), one.requires_grad) if isinstance(one, Tensor) else str(one)
        for one in leaves
    )


def _plain(output: Any) -> Any:
    """An output of diffusers or transformers as a tuple."""
    return output.to_tuple() if hasattr(output, "to_tuple") else output
