"""Networks sharded over processes with torch's FSDP2, gathered where one process needs all of them.

A sharded weight is a `DTensor`: each process holds some of its rows, with their gradients, their optimizer state and
their average. The whole weight is gathered, a block at a time, for the forward and the backward pass (Zhao et al.
2023, "PyTorch FSDP").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sdmodule.components.checkpoint import Components


def shard_networks(parts: Components, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Shard the denoiser, its ControlNet and the text encoders that are trained, block by block.

    The VAE and frozen text encoders stay whole: they are small, and to gather them in each step costs more time than
    their memory is worth. Networks that are sharded already are left alone. Frozen weights of the denoiser, which no
    export holds, are kept in the dtype that they are gathered in.

    Args:
        parts: the model.
        mesh: the processes; of two dimensions, the first holds copies and the second shards.
        compute_dtype: what weights are gathered in; gradients are summed in float32 all the same.
    """
    # autocast converts inputs, and recomputes them alike under activation checkpointing
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=compute_dtype and torch.float32, cast_forward_inputs=False
    )
    for network in _sharded_parts(parts):
        if isinstance(network, FSDPModule):
            continue
        if compute_dtype is not None and network is parts.unet:
            for weight in network.parameters():
                weight.data = weight.data if weight.requires_grad else weight.data.to(compute_dtype)
        kinds: Any = parts.family.sharded_blocks
        blocks = [one for one in network.modules() if isinstance(one, kinds)]
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        fully_shard(network, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def _sharded_parts(parts: Components) -> list[Any]:
    encoders = [encoder for _, encoder in parts.text_encoders]
    trained = [one for one in encoders if any(weight.requires_grad for weight in one.parameters())]
    return [parts.unet, *parts.controlnets, *trained]


def local(weight: Tensor) -> Tensor:
    """What this process holds of a weight, in the same memory: all of it unless it is sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def sharded_like(whole: Tensor, weight: Tensor) -> Tensor:
    """This process' share of a tensor that belongs to a weight, or all of it if the weight is not sharded."""
    if not isinstance(weight, DTensor) or isinstance(whole, DTensor) or whole.shape != weight.shape:
        return whole
    # every process has the whole tensor, so nothing is sent
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def shard_values(tree: Any, weights: Mapping[str, Tensor]) -> Any:
    """A tree of mappings and lists, with the tensors that are named and shaped as a sharded weight sharded like it."""
    if isinstance(tree, Mapping):
        return {
            name: sharded_like(value, weights[name])
            if isinstance(value, Tensor) and name in weights
            else shard_values(value, weights)
            for name, value in tree.items()
        }
    return [shard_values(value, weights) for value in tree] if isinstance(tree, list) else tree


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold the sharded networks of a module whole inside the block, so that each process can sample on its own.

    All processes must enter it together. Weights must not be changed in it.
    """
    sharded = [one for one in module.modules() if isinstance(one, FSDPModule)]
    for one in sharded:
        one.set_reshard_after_forward(False, recurse=False)
        one.unshard()
    try:
        yield
    finally:
        for one in sharded:
            one.set_reshard_after_forward(True, recurse=False)
            one.reshard()


@contextmanager
def whole_weights(module: nn.Module, here: bool) -> Iterator[None]:
    """Replace sharded weights by whole ones in CPU memory inside the block, in full precision, to be written.

    All processes must enter it together; networks cannot compute in it.

    Args:
        module: what has the networks.
        here: whether this process needs the weights; for the others nothing changes.
    """
    sharded: list[tuple[nn.Module, str, nn.Parameter]] = []
    classes: list[tuple[nn.Module, type]] = []
    for owner in module.modules():
        for name, weight in owner.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                whole = weight.detach().full_tensor()  # type: ignore[attr-defined]
                if here:
                    sharded.append((owner, name, weight))
                    owner._parameters[name] = nn.Parameter(whole.cpu(), requires_grad=weight.requires_grad)
        if here and isinstance(owner, FSDPModule):
            classes.append((owner, type(owner)))
            owner.__class__ = type(owner).__bases__[-1]  # whose name is written in configurations
    try:
        yield
    finally:
        for owner, name, weight in sharded:
            owner._parameters[name] = weight
        for one, kind in classes:
            one.__class__ = kind
