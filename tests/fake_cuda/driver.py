"""What a fake GPU answers where torch asks the driver: ``torch.cuda``, pinned memory and the device guard."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fake_cuda.tensor import FakeCuda


class FakeEvent:
    """A ``torch.cuda.Event`` of fake time: each is recorded a second after the one before."""

    cuda: FakeCuda
    now: Iterator[int]

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.time: int | None = None

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


class FakeStream:
    """A ``torch.cuda.Stream``, on which everything happens at once."""

    cuda: FakeCuda
    cuda_stream = 0

    def __init__(self, *args: Any, **settings: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = torch.cuda.Event() if event is None else event
        event.record()
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.cuda.record("sync", "a stream is waited for")


def replacements(
    cuda: FakeCuda, devices: int, capability: tuple[int, int], name: str
) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced in torch: where, which name, by what."""
    major, minor = capability
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, total_memory=80 * 2**30, multi_processor_count=132
    )
    event = type("Event", (FakeEvent,), {"cuda": cuda, "now": count()})
    stream = type("Stream", (FakeStream,), {"cuda": cuda})
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
        "Event": event,
        "Stream": stream,
        "stream": lambda of: nullcontext(),
        "current_stream": lambda device=None: stream(),
        "default_stream": lambda device=None: stream(),
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
    # a subclass has no version counter to leave out
    yield torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext()
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
        source = Path(__file__).with_name("device_guard.cpp")
        flags = ["-std=c++20", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        try:
            subprocess.run(["g++", *flags, str(source), "-lc10", "-o", str(library)], check=True)
        except FileNotFoundError:
            pytest.skip("needs g++")
        ctypes.CDLL(str(library))
