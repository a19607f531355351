"""Fake CUDA tensors, and the dispatch mode that runs operations on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.fake_cuda.crossing import Crossing, find_place

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default: "its value is read",
    aten.equal.default: "compared on the host",
    aten.nonzero.default: "the host needs the number of places",
    aten.masked_select.default: "the host needs the number of places",
    aten._unique2.default: "the host needs the number of values",
    aten.unique_dim.default: "the host needs the number of values",
    aten.unique_consecutive.default: "the host needs the number of values",
    aten.bincount.default: "the host needs the largest value",
    aten.repeat_interleave.Tensor: "the host needs the sum of repeats",
    aten._linalg_check_errors.default: "the host needs to know whether a matrix was singular",
}
"""Operations that wait for the device, and why."""

INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations that take indices from the CPU, and copy them."""

TAKE_NUMBERS = (aten.where.self, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor)
"""Operations beside the pointwise ones that take tensors without axes from the CPU, as arguments of a kernel."""

COPIES = (aten.copy_.default, aten._foreach_copy_.default)
"""Operations on two devices."""


class FakeCudaTensor(Tensor):
    """A tensor on ``cuda:n`` whose values, in ``values``, are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, index: int = 0, requires_grad: bool = False) -> FakeCudaTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=torch.device("cuda", index),
            requires_grad=requires_grad,
        )

    def __init__(self, values: Tensor, index: int = 0, requires_grad: bool = False) -> None:
        self.values = values

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.values!r} on {self.device}"

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    @property
    def data(self) -> FakeCudaTensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.values = values_of(other)

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeCudaTensor:
        copy = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        copy.__dict__.update({name: value for name, value in self.__dict__.items() if name != "values"})
        return copy

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def storage(self) -> Any:
        return self.values.storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a fake CUDA tensor is used outside `fake_cuda()`.")


class FakeCuda(TorchDispatchMode):
    """Runs operations on fake CUDA tensors, and records what crosses between host and device.

    Attributes:
        crossings: in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[Crossing] = []
        self._pinned: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        flat, _ = tree_flatten((args, kwargs))
        tensors = [one for one in flat if isinstance(one, Tensor)]
        fakes = [one for one in tensors if isinstance(one, FakeCudaTensor)]
        to_cuda = target is not None and torch.device(target).type == "cuda"
        if not fakes and not to_cuda:
            return self._on_cpu(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func}: fake CUDA tensors keep their shape; write the form without underscore.")
        if func is aten._fused_sdp_choice.default:
            return 0  # the composite form, which needs no kernel of CUDA's
        self._check_devices(func, tensors, target, args, kwargs)
        index = device_index(target) if to_cuda else fakes[0].device.index
        if func is aten._to_copy.default:
            return self._convert(args[0], kwargs, target)
        if func in COPIES:
            return self._copy(func, args, kwargs)
        self._record_reads(func, args)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        owners = {id(one.values): one for one in fakes}
        made = func(*tree_map(values_of, args), **tree_map(values_of, kwargs))
        to_host = target is not None and not to_cuda  # new_empty(device="cpu")
        return made if to_host else tree_map(lambda one: self._wrapped(one, index, owners), made)

    @staticmethod
    def _wrapped(one: Any, index: int, owners: Mapping[int, FakeCudaTensor]) -> Any:
        if not isinstance(one, Tensor) or isinstance(one, FakeCudaTensor):
            return one
        return owners.get(id(one)) if id(one) in owners else FakeCudaTensor(one, index)

    def _on_cpu(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        pinned = kwargs.pop("pin_memory", None)
        made = func(*args, **kwargs)
        return self.pin(made) if pinned else made

    @staticmethod
    def _check_devices(func: Any, tensors: Sequence[Tensor], target: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Raise what torch raises for tensors of two devices.

        Numbers on the CPU (tensors without axes) are arguments of a kernel, where it works on single elements.
        """
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if func in COPIES or func is aten._to_copy.default:
            return
        if func in INDEXING:
            tensors = [args[0], *([args[2]] if len(args) > 2 and args[2].ndim else [])]
        elif torch.Tag.pointwise in func.tags or func in TAKE_NUMBERS:
            tensors = [one for one in tensors if one.ndim or isinstance(one, FakeCudaTensor)]
        FakeCuda.check_same_device(func, tensors)

    @staticmethod
    def check_same_device(func: Any, tensors: Sequence[Tensor]) -> None:
        """Raise where tensors are on two devices."""
        devices = sorted({str(one.device) for one in tensors})
        if len(devices) > 1:
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found {devices}.")

    def _record_reads(self, func: Any, args: Any) -> None:
        if func in READS and not (func is aten.repeat_interleave.Tensor and len(args) > 1):
            self.record("sync", f"{func.overloadpacket.__name__}, {READS[func]}")
        if func not in INDEXING:
            return
        for one in args[1]:
            if one is None:
                continue
            if not isinstance(one, FakeCudaTensor):
                self.record("to device", f"an index {list(one.shape)} from the CPU")
            fills = func is not aten.index.Tensor and args[2].numel() == 1  # torch makes it masked_fill
            if one.dtype in (torch.bool, torch.uint8) and not fills:
                self.record("sync", "a mask as an index, the host needs the number of places")

    def _convert(self, source: Tensor, kwargs: dict[str, Any], target: Any) -> Tensor:
        """``source.to(...)``, between devices or not."""
        non_blocking, _ = kwargs.pop("non_blocking", False), kwargs.pop("pin_memory", None)
        device = source.device if target is None else torch.device(target)
        kwargs.pop("device", None)
        made = aten._to_copy.default(values_of(source), **kwargs)
        if device.type == "cpu":
            self.record("to host", f"{list(source.shape)}", waits=not non_blocking)
            return self.pin(made) if non_blocking else made  # torch makes it in pinned memory
        if source.device.type == "cpu":
            self.record("to device", f"{list(source.shape)}", waits=not (non_blocking and self.is_pinned(source)))
        return FakeCudaTensor(made, device_index(device))

    def _copy(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """``target.copy_(source)``, or a list of them."""
        pairs = zip(*args[:2], strict=True) if func is aten._foreach_copy_.default else [args[:2]]
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        for target, source in pairs:
            onto, from_ = (isinstance(one, FakeCudaTensor) for one in (target, source))
            if onto != from_:
                pinned = self.is_pinned(source if onto else target)
                kind = "to device" if onto else "to host"
                self.record(kind, f"{list(source.shape)}", waits=not (non_blocking and pinned))
            values_of(target).copy_(values_of(source))
        return args[0] if func is aten.copy_.default else None

    def pin(self, tensor: Tensor) -> Tensor:
        """The tensor itself, now in pinned memory."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other takes its address
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor, or what it is a view of, is in pinned memory."""
        return not isinstance(tensor, FakeCudaTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def record(self, kind: str, what: str, waits: bool = True) -> None:
        """Note a copy or synchronisation, with the line that caused it."""
        place, line, caller = find_place()
        self.crossings.append(Crossing(kind, what, place, line, caller, waits))

    @staticmethod
    def check(crossings: Sequence[Crossing], allowed: Mapping[str, str] | None = None) -> None:
        """Fail where one makes the host wait and its `Crossing.place` is not among ``allowed``.

        Args:
            crossings: a range of `crossings`.
            allowed: places, each with the reason. One that no longer occurs fails too.
        """
        allowed = allowed or {}
        bad = [str(one) for one in crossings if one.waits and one.place not in allowed]
        assert not bad, "the host waits for the device:\n" + "\n".join(dict.fromkeys(bad))
        stale = set(allowed) - {one.place for one in crossings if one.waits}
        assert not stale, f"allowed, but no longer needed: {sorted(stale)}"


def values_of(tensor: Any) -> Any:
    """The values of a tensor on any device, without a crossing; anything else as it is."""
    return tensor.values if isinstance(tensor, FakeCudaTensor) else tensor


def device_index(device: Any) -> int:
    """Number of a CUDA device, 0 where none is given."""
    if device is None or isinstance(device, int):
        return device or 0
    return torch.device(device).index or 0
