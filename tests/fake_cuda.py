"""CUDA tensors on a machine without a GPU, and a record of all that passes between host and device.

A tensor on the fake ``cuda:0`` computes on the CPU and has values. So what is sampled or trained equals the CPU's, and
no value has to be made up where a program reads one (``.item()``, a boolean mask), as ``FakeTensorMode`` would want.
Everything else is as strict as on a GPU: an operation on tensors of two devices raises.

Example:
    The copies and synchronisations of a denoising loop after its first step::

        with fake_cuda() as cuda:
            module.to("cuda")
            marks = []
            module.infer("a star", callback_on_step_end=lambda step, latents: marks.append(len(cuda.crossings)))
            cuda.check(cuda.crossings[marks[0]:marks[-1]], allowed={"sampling/pipeline.py denoise_batch": "the reason"})

What it cannot do: run backward, which wants a real device (`fill_gradients` stands in for it), compile, capture a CUDA
graph, or choose an attention kernel. Kernels of CUDA alone, and their rounding, are not seen.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import sdmodule

aten = torch.ops.aten
PACKAGE = Path(sdmodule.__file__).parent

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
}
"""Operations that wait for the device, and why."""

INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations that take indices from the CPU, and copy them."""

TAKE_NUMBERS = (aten.where.self, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor)
"""Operations beside the pointwise ones that take tensors without axes from the CPU, as arguments of a kernel."""

COPIES = (aten.copy_.default, aten._foreach_copy_.default)
"""Operations on two devices."""


@dataclass(frozen=True)
class Crossing:
    """One copy or synchronisation.

    Attributes:
        kind: ``to device``, ``to host`` or ``sync``.
        what: the operation, with the shape that is copied.
        place: innermost file of ``sdmodule`` on the stack, and its function: ``speed/apply.py apply_speed``; the test's
            if there is none.
        line: in that file.
        caller: file and line that called torch: in ``sdmodule`` or a library that it uses.
        waits: whether the host waits, which it does but for ``non_blocking`` copies from or to pinned memory.
    """

    kind: str
    what: str
    place: str
    line: int
    caller: str
    waits: bool

    def __str__(self) -> str:
        return (
            f"{self.kind}{'' if self.waits else ' (pinned)'}: {self.what} at {self.place}:{self.line} ({self.caller})"
        )


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
    def data(self, other: FakeCudaTensor) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.values = _values(other)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values.detach().__reduce_ex__(protocol)  # files hold the values

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeCudaTensor:
        copy = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        copy.__dict__.update({name: value for name, value in self.__dict__.items() if name != "values"})
        return copy

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
        index = _index(target) if to_cuda else fakes[0].device.index
        if func is aten._to_copy.default:
            return self._convert(args[0], kwargs, target)
        if func in COPIES:
            return self._copy(func, args, kwargs)
        self._record_reads(func, args)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        owners = {id(one.values): one for one in fakes}
        made = func(*tree_map(_values, args), **tree_map(_values, kwargs))
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
        made = aten._to_copy.default(_values(source), **kwargs)
        if device.type == "cpu":
            self.record("to host", f"{list(source.shape)}", waits=not non_blocking)
            return self.pin(made) if non_blocking else made  # torch makes it in pinned memory
        if source.device.type == "cpu":
            self.record("to device", f"{list(source.shape)}", waits=not (non_blocking and self.is_pinned(source)))
        return FakeCudaTensor(made, _index(device))

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
            _values(target).copy_(_values(source))
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
        place, line, caller = _place()
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


class _Indexed(TorchFunctionMode):
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
            args, kwargs = tree_map(_values, tuple(args)), tree_map(_values, kwargs)
            return FakeCudaTensor(func(*args, **kwargs), index)
        if func is Tensor.cuda:
            return args[0].to(torch.device("cuda", _index(args[1] if len(args) > 1 else kwargs.get("device"))))
        if func is torch.device and len(args) == 2:
            return func(*args)
        args = tuple(_with_index(one) for one in args)
        kwargs = {name: _with_index(one) for name, one in kwargs.items()}
        return func(*args, **kwargs)


@dataclass
class FakeEvent:
    """A ``torch.cuda.Event`` of fake time: a second after the one before."""

    cuda: FakeCuda
    now: Iterator[int]
    time: int | None = field(default=None)

    def record(self, stream: Any = None) -> None:
        self.time = next(self.now)

    def wait(self, stream: Any = None) -> None:
        """No wait of the host."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.cuda.record("sync", "an event is waited for")

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.time is not None and end.time is not None, "an event that was not recorded has no time"
        return 1000.0 * (end.time - self.time)


@contextmanager
def fake_cuda(
    devices: int = 1, capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100 80GB HBM3"
) -> Iterator[Any]:
    """A machine with fake GPUs, inside a ``with`` block.

    Args:
        devices: how many.
        capability: compute capability that they claim.
        name: of the card.

    Yields:
        The `FakeCuda` that records.
    """
    load_device_guard()
    cuda = FakeCuda()
    with ExitStack() as stack:
        for owner, attribute, value in _replacements(cuda, devices, capability, name):
            stack.enter_context(patch.object(owner, attribute, value))
        before = torch._C._only_lift_cpu_tensors()
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy that is seen here
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(_Indexed(cuda))
        stack.enter_context(cuda)
        yield cuda


def _replacements(
    cuda: FakeCuda, devices: int, capability: tuple[int, int], name: str
) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced in torch: where, which name, by what."""
    clock = iter(range(1_000_000_000))
    major, minor = capability
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, total_memory=80 * 2**30, multi_processor_count=132
    )
    stream = SimpleNamespace(
        wait_stream=lambda other: None,
        wait_event=lambda event: None,
        record_event=lambda event=None: event,
        synchronize=lambda: cuda.record("sync", "a stream is waited for"),
        cuda_stream=0,
        query=lambda: True,
    )
    of_cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: devices > 0,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: major >= 8,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: name,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: cuda.record("sync", "torch.cuda.synchronize"),
        "empty_cache": lambda: cuda.record("sync", "torch.cuda.empty_cache"),
        "Event": lambda *args, **kwargs: FakeEvent(cuda, clock),
        "Stream": lambda *args, **kwargs: stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
    }
    yield from ((torch.cuda, attribute, value) for attribute, value in of_cuda.items())
    # threads of data loaders pin memory too, where no mode is active
    yield Tensor, "pin_memory", lambda self, device=None: self if cuda.is_pinned(self) else cuda.pin(self.clone())
    yield Tensor, "is_pinned", lambda self, device=None: cuda.is_pinned(self)


@cache
def load_device_guard() -> None:
    """Give torch without CUDA what it lacks to hold tensors of CUDA, for the rest of the process; skips the test where
    there is no compiler."""
    torch_folder = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        source = Path(__file__).with_suffix(".cpp")
        flags = ["-std=c++20", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        try:
            subprocess.run(["g++", *flags, str(source), "-lc10", "-o", str(library)], check=True)
        except FileNotFoundError:
            pytest.skip("needs g++")
        ctypes.CDLL(str(library))


def fill_gradients(module: torch.nn.Module) -> None:
    """Give each trainable parameter a gradient of ones, as a backward would leave one."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)


def values_of(tensor: Tensor) -> Tensor:
    """The values of a tensor on any device, without a crossing."""
    return tensor.values if isinstance(tensor, FakeCudaTensor) else tensor


def _values(one: Any) -> Any:
    return one.values if isinstance(one, FakeCudaTensor) else one


def _learns(args: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in args)


def _index(device: Any) -> int:
    if device is None or isinstance(device, int):
        return device or 0
    return torch.device(device).index or 0


def _with_index(one: Any) -> Any:
    if isinstance(one, str) and one == "cuda":
        return "cuda:0"
    bare = isinstance(one, torch.device) and one.type == "cuda" and one.index is None
    return torch.device("cuda", 0) if bare else one


def _place() -> tuple[str, int, str]:
    """Innermost file and function of ``sdmodule``, its line, and the file and line that called torch."""
    frame: Any = sys._getframe(2)
    caller = ours = None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ours is None and path.is_relative_to(PACKAGE):
            ours = f"{path.relative_to(PACKAGE).as_posix()} {frame.f_code.co_qualname}", frame.f_lineno
        outside = path.is_absolute() and path != Path(__file__) and "torch" not in path.parts
        if caller is None and outside:
            caller = (
                f"{'/'.join(path.parts[-2:])}:{frame.f_lineno}",
                f"{path.name} {frame.f_code.co_qualname}",
                frame.f_lineno,
            )
        if ours and caller:
            break
        frame = frame.f_back
    assert caller is not None
    return (*(ours or caller[1:]), caller[0])
