"""Weights that wait in the host's memory and are on the GPU only while they are computed with.

Nothing is copied back, since sampling changes no weight: a parameter is pointed to its copy on the GPU and later to the
original again. So parameters stay the same objects, for optimizers, compiled code and classes that are swapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError

UNITS = 32
"""Share of a network's weights, as 1 / UNITS, above which ``sequential`` divides a layer into the layers in it."""


class Card:
    """A device that holds the weights of one unit at a time.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._unit: Sequence[nn.Parameter] | None = None
        self._hosts: list[Tensor] = []

    def bring(self, unit: Sequence[nn.Parameter]) -> None:
        """Put the weights of a unit on the device, in the place of those of another."""
        if unit is self._unit:
            return
        self.clear()
        self._unit, self._hosts = unit, [weight.data for weight in unit]
        for weight in unit:
            point(weight, weight.data.to(self.device, non_blocking=True, copy=True))

    def clear(self) -> None:
        """Leave no weights on the device."""
        for weight, host in zip(self._unit or (), self._hosts, strict=True):
            same = host.dtype == weight.dtype  # a VAE may have been cast meanwhile
            point(weight, host if same else weight.data.to(host.device))
        self._unit, self._hosts = None, []


class BringHook:
    """A hook of a network that brings its unit; ``AutoencoderKL`` calls it for ``encode`` and ``decode`` too.

    Args:
        card: the device.
        unit: the weights that the network needs.
    """

    def __init__(self, card: Card, unit: Sequence[nn.Parameter]) -> None:
        self.card, self.unit = card, unit

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Bring the unit; the name is that of accelerate's hooks."""
        self.card.bring(self.unit)


@contextmanager
def offloaded(groups: Sequence[Sequence[nn.Module]], device: torch.device, how: str = "model") -> Iterator[Card]:
    """Keep the weights of networks in the host's memory inside a ``with`` block, and on the device when needed.

    The first weight of each network stays on the device, as do buffers: a network's ``device`` is that of its first
    weight.

    Args:
        groups: networks that compute in turns, those of one group together.
        device: where they compute.
        how: ``model``, a whole group at a time; or ``sequential``, a part of a network at a time.

    Yields:
        The card, which can be cleared in between.
    """
    card, homes = Card(device), [(one, one.device) for group in groups for net in group for one in _tensors(net)]
    with ExitStack() as stack:
        stack.callback(_move, homes)
        for group in groups:
            stack.enter_context(_hooked(group, card, how))
        stack.callback(card.clear)
        yield card


@contextmanager
def _hooked(group: Sequence[nn.Module], card: Card, how: str) -> Iterator[None]:
    staying = {id(next(network.parameters())) for network in group}
    for network in group:
        for tensor in _tensors(network):
            stays = id(tensor) in staying or not isinstance(tensor, nn.Parameter)
            point(tensor, tensor.data.to(card.device) if stays else _on_host(tensor.data, card.device))
    units = [list(group)] if how == "model" else [[layer] for network in group for layer in parts_of(network)]
    with ExitStack() as stack:
        for unit in units:
            weights = {id(weight): weight for root in unit for weight in root.parameters()}
            hook = BringHook(card, [weight for key, weight in weights.items() if key not in staying])
            # a layer may be called without those around it, as by the cache of the text's keys and values
            layers = unit if how == "model" else [layer for root in unit for layer in root.modules()]
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(hook.pre_forward).remove)
                stack.enter_context(_named_hook(layer, hook))
        yield


@contextmanager
def _named_hook(layer: Any, hook: BringHook) -> Iterator[None]:
    """Where ``AutoencoderKL.encode`` and ``decode`` look for a hook, since they are no ``forward``."""
    before = layer.__dict__.get("_hf_hook")
    layer._hf_hook = hook
    try:
        yield
    finally:
        layer._hf_hook = before
        if before is None:
            del layer._hf_hook


def parts_of(network: nn.Module) -> list[nn.Module]:
    """Layers that are brought one after the other: each has a small share of the weights, or holds some itself."""
    most = sum(weight.numel() for weight in network.parameters()) / UNITS

    def divide(layer: nn.Module) -> Iterator[nn.Module]:
        size = sum(weight.numel() for weight in layer.parameters())
        if size <= most or next(layer.parameters(recurse=False), None) is not None:
            yield layer
            return
        for child in layer.children():
            yield from divide(child)

    return [layer for layer in divide(network) if next(layer.parameters(), None) is not None]


def point(weight: Tensor, values: Tensor) -> None:
    """Let a parameter or buffer have other values, maybe on another device."""
    weight.data = values


def bring(network: nn.Module) -> None:
    """Bring the weights of a network whose layers are about to be called without the network itself."""
    hook = getattr(network, "_hf_hook", None)
    if isinstance(hook, BringHook):
        hook.pre_forward(network)


@contextmanager
def kept_on_host(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Leave networks where they are inside a ``with`` block, even if a module that contains them is moved."""

    def staying(network: Any) -> Any:
        return lambda change, recurse=True: type(network)._apply(
            network, lambda tensor: change(tensor).to(tensor.device), recurse
        )

    for network in networks:
        network._apply = staying(network)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for network in networks:
            del network._apply


def groups_of(parts: Components) -> list[list[nn.Module]]:
    """The networks of a model that compute in turns: text encoders, denoisers, VAE and others."""
    found: list[list[nn.Module]] = []
    for one in (parts, parts.refiner) if parts.refiner is not None else (parts,):
        found += [[encoder] for _, encoder in one.text_encoders]
        found += [[one.unet, *one.controlnets], [one.vae]]
    if parts.image_prompts is not None:
        found.append([parts.image_prompts.encoder])
    every = [id(network) for group in found for network in group]
    firsts = {key: every.index(key) for key in every}  # a refiner may share networks
    numbered = iter(range(len(every)))
    return [kept for group in found if (kept := [net for net in group if firsts[id(net)] == next(numbered)])]


def check_offload(how: str, device: str | None = None) -> None:
    """Check that there is a GPU whose memory can be saved.

    Args:
        how: ``none``, ``model`` or ``sequential``.
        device: type of the device; the GPU where there is one if None.

    Raises:
        SettingsError: if there is none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if how != "none" and device != "cuda":
        raise SettingsError(
            f"speed.offload={how}: saves the memory of a CUDA GPU, and this runs on {device}; leave it out."
        )


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _on_host(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.cpu().pin_memory() if device.type == "cuda" else tensor.cpu()


def _move(homes: Sequence[tuple[Tensor, torch.device]]) -> None:
    for tensor, home in homes:
        point(tensor, tensor.data.to(home))
