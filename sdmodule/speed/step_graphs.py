"""CUDA graphs of the denoising step: all kernels of a UNet call are launched at once, from a recording.

On a fast GPU, Python takes longer to launch the kernels of a step than they take to run. A recording repeats them at
the same addresses: what a step reads is copied into buffers that stay, and what it returns is copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sdmodule.speed.text_kv_cache import CachedProjection

Outputs = tuple[Tensor, Tensor | None]
"""A prediction ``[B, C, h, w]``, and the deep features that the step has cached, if it has."""


class Recorder(Protocol):
    """Makes recordings; that of CUDA, or one of a test."""

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record a function without running it: a function that runs the recording, and the tensors it fills."""
        ...


class CudaRecorder:
    """Recordings as CUDA graphs, which run one at a time and so share the memory of what they compute in between.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """See `Recorder`."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those that pin memory, may call CUDA meanwhile
        with torch.cuda.device(self.device), torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            outputs = run()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, outputs


class Slot(NamedTuple):
    """An attribute that holds a tensor from step to step, or for a whole batch."""

    owner: Any
    name: str


class StepGraphs:
    """Recordings of a UNet's call, one for each kind of step: guided or not, all layers or cached features, and shapes.

    The first step of a kind runs as it is, to warm up; the second is recorded. Recordings serve later batches too.

    Attributes:
        recorder: makes recordings.
        reason: why nothing is recorded any more; None while recordings are made.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.reason: str | None = None
        self._recorded: dict[Any, tuple[Callable[[], None], Outputs]] = {}
        self._warm: set[Any] = set()
        self._buffers: dict[Any, Tensor] = {}
        self._copied: dict[Any, ref[Tensor]] = {}

    def give_up(self, reason: str) -> None:
        """Record nothing any more, and say why."""
        if self.reason is None:
            rank_zero_warn(f"speed.cuda_graphs: {reason}; steps run without them.")
        self.reason = reason
        self._recorded.clear()

    def run(
        self, unet: Any, slots: Mapping[str, Slot], fresh: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """The prediction of a UNet, ``[B, C, h, w]``.

        Args:
            unet: the UNet.
            slots: from `held_tensors`.
            fresh: whether all layers run.
            args: of the call.
            kwargs: of the call.
        """
        if self.reason is not None:
            return unet(*args, **kwargs).sample
        leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
        read = {name: slot for name, slot in slots.items() if not (fresh and name == FEATURES)}
        held = {name: value for name, slot in read.items() if (value := getattr(*slot)) is not None}
        given = {f"input {k}": leaf for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)} | held
        constants = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        key = (fresh, tree, constants, tuple((name, _layout(one)) for name, one in given.items()))
        if key not in self._warm:
            self._warm.add(key)
            return unet(*args, **kwargs).sample

        static = {name: self._filled(name, one) for name, one in given.items()}
        for name in held:
            setattr(*slots[name], static[name])
        if key in self._recorded:
            _tell_hooks(unet, args, kwargs)
        else:
            inputs = [static.get(f"input {k}", leaf) for k, leaf in enumerate(leaves)]
            try:
                self._recorded[key] = self.recorder.record(lambda: _call(unet, tree_unflatten(inputs, tree), fresh))
            except Exception as error:  # of CUDA, of a compiler, of a layer that waits for the device
                self.give_up(f"a step could not be recorded ({' '.join(str(error).split())[:200]})")
                return unet(*args, **kwargs).sample
        replay, (prediction, features) = self._recorded[key]
        replay()
        if features is not None:  # the next recording may write where this one keeps them
            unet.deep.features = self._filled(FEATURES, features)
        return prediction.clone()

    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        """The buffer of a tensor, with its values; a text that is there already is not copied again."""
        layout = (name, _layout(tensor))
        if layout not in self._buffers:
            self._buffers[layout] = torch.empty_like(tensor)
        buffer = self._buffers[layout]
        copied = self._copied.get(layout)
        there = copied is not None and copied() is tensor and name not in CHANGING
        if buffer is not tensor and not there:
            buffer.copy_(tensor)
            self._copied[layout] = ref(tensor)
        return buffer


FEATURES = "deep features"
"""Slot of what a step caches for those after it."""

CHANGING = ("input 0", "input 1", FEATURES)
"""Names of latents, timestep and features: a callback may have changed their values in place."""


def held_tensors(unet: Any) -> dict[str, Slot]:
    """The tensors beside its arguments that a UNet's call reads and that change from step to step or batch to batch.

    Those are keys and values of the text, the draws of token merging, and deep features.
    """
    slots: dict[str, Slot] = {}
    for name, module in unet.named_modules():
        if isinstance(module, CachedProjection):
            slots[f"{name} value"] = Slot(module, "value")
        matching = getattr(getattr(module, "merging", None), "matching", None)
        found = [key for key, value in vars(matching).items() if isinstance(value, Tensor)] if matching else []
        slots |= {f"{name} {key}": Slot(matching, key) for key in found}
    if hasattr(unet, "deep"):
        slots[FEATURES] = Slot(unet.deep, "features")
    return slots


def _call(unet: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]], fresh: bool) -> Outputs:
    args, kwargs = arguments
    prediction = unet(*args, **kwargs).sample
    return prediction, unet.deep.features if fresh and hasattr(unet, "deep") else None


def _tell_hooks(unet: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run what counts a UNet's calls, since a recording calls nothing."""
    for key, hook in unet._forward_pre_hooks.items():
        hook(unet, tuple(args), dict(kwargs)) if key in unet._forward_pre_hooks_with_kwargs else hook(unet, tuple(args))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device)


_graphs: WeakKeyDictionary[nn.Module, StepGraphs] = WeakKeyDictionary()


@contextmanager
def recording_steps(unet: Any, recorder: Recorder | None = None) -> Iterator[StepGraphs]:
    """Record the calls of a UNet that `graphs_of` finds inside a ``with`` block; its weights must not move meanwhile.

    Args:
        unet: a ``UNet2DConditionModel``.
        recorder: makes recordings; CUDA's if None.
    """
    graphs = _graphs[unet] = StepGraphs(recorder or CudaRecorder(unet.device))
    try:
        yield graphs
    finally:
        del _graphs[unet]


def graphs_of(unet: nn.Module, obstacles: Mapping[str, bool]) -> StepGraphs | None:
    """The recordings of a UNet's calls; None if none are made.

    Args:
        unet: the UNet.
        obstacles: what cannot be recorded, by its name in a message, and whether it is there.
    """
    graphs = _graphs.get(unet)
    if graphs is None:
        return None
    for name, present in obstacles.items():
        if present:
            graphs.give_up(f"not with {name}")
    return graphs if graphs.reason is None else None
