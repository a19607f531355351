"""The means of sampling faster, each on its own switch, checked as soon as they are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from sdmodule.errors import SettingsError, choices
from sdmodule.ranges import check_flag, check_whole

if TYPE_CHECKING:
    import torch

COMPILE = ("none", "blocks", "whole", "auto")
KERNELS = ("torch", "fastest")
DECODE = ("whole", "sliced", "tiled")
ATTENTION = ("sdpa", "flash", "efficient", "cudnn", "math", "plain", "xformers")


@dataclass(frozen=True)
class SpeedSettings:
    """What is done to sample faster; as it stands, nothing that changes an image.

    Args:
        guidance_interval: the share of the timesteps, from 0 (an image) to 1 (noise), within which guidance is used;
            outside it the UNet is asked for the prompt alone, which is half of the work (Kynkäänniemi et al. 2024).
        cache_every: run the whole UNet at every so many steps; in between its deep layers are not run and what they
            gave last is used again (Ma et al. 2024, "DeepCache"). 1 runs all of it always.
        cache_layers: layers of full resolution, counted from the input and from the output, that run at every step.
        channels_last: keep the UNet and the autoencoder with their channels innermost, which convolutions in 16 bits
            are fastest in; ``auto`` does so for these, and in float32 where ``kernels=fastest`` takes effect.
        compile: ``none``; ``blocks``, the UNet's, each by itself; ``whole``; or ``auto``: blocks on a GPU, and none on
            CPU, where compiling takes longer than most runs.
        attention: what computes the UNet's attention: ``sdpa`` leaves the choice to torch, ``flash``, ``efficient``,
            ``cudnn`` and ``math`` are torch's own by name, ``plain`` is two products, ``xformers`` needs that package.
        kernels: ``torch``, or on CPU, where nothing is compiled, ``fastest``: of several ways to compute attention,
            linear layers and convolutions the one that was fastest when it was measured on this machine. In large
            blocks that merge tokens it is that in bfloat16 either way; see ``tome.apply.merged``.
        decode: what the autoencoder decodes at once: the ``whole`` batch, an image of it (``sliced``), or a tile of a
            image (``tiled``, whose seams are blended), each in less memory than the one before.
        keep_memory: on CPU, do not give freed memory back to the system between layers.
        effect: what a preset does to the image, in a line.

    Raises:
        SettingsError: for a value out of range.
    """

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache_every: int = 1
    cache_layers: int = 1
    channels_last: bool | str = False
    compile: str = "none"
    attention: str = "sdpa"
    kernels: str = "torch"
    decode: str = "whole"
    keep_memory: bool = False
    effect: str = ""

    def __post_init__(self) -> None:
        interval = self.guidance_interval
        if (
            not isinstance(interval, (list, tuple))
            or len(interval) != 2
            or any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in interval)
            or not 0 <= interval[0] < interval[1] <= 1
        ):
            raise SettingsError(
                f"speed.guidance_interval={interval} is not allowed; give two shares of the timesteps, from 0 "
                "(an image) to 1 (noise), such as [0.2,0.8]."
            )
        object.__setattr__(self, "guidance_interval", (float(interval[0]), float(interval[1])))
        for name in ("cache_every", "cache_layers"):
            check_whole(f"speed.{name}", getattr(self, name))
        check_flag("speed.keep_memory", self.keep_memory)
        if not isinstance(self.channels_last, bool) and self.channels_last != "auto":
            raise SettingsError(f"speed.channels_last={self.channels_last} is not allowed; give true, false or auto.")
        for name, allowed in (("compile", COMPILE), ("attention", ATTENTION), ("kernels", KERNELS), ("decode", DECODE)):
            if getattr(self, name) not in allowed:
                raise SettingsError(f"speed.{name}={getattr(self, name)} is not known; give one of {choices(allowed)}.")

    @property
    def always_guided(self) -> bool:
        """Whether no step is left without guidance."""
        return self.guidance_interval == (0.0, 1.0)

    def compile_on(self, device: str) -> str:
        """What is compiled on a kind of device."""
        if self.compile == "auto":
            return "blocks" if device == "cuda" else "none"
        return self.compile

    def fastest_on(self, device: str) -> bool:
        """Whether layers run the way that is the fastest, on a kind of device."""
        return self.kernels == "fastest" and device == "cpu" and self.compile_on(device) == "none"

    def channels_last_in(self, dtype: torch.dtype, device: str) -> bool:
        """Whether weights of a type are kept with their channels innermost, on a kind of device."""
        if isinstance(self.channels_last, str):
            return dtype.itemsize == 2 or self.fastest_on(device)
        return self.channels_last

    def metadata(self) -> dict[str, Any]:
        """What an image depends on, in plain types; nothing if it is made as plain diffusers makes it."""
        changed = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value != getattr(EXACT, name) and name not in ("keep_memory", "effect")
        }
        return changed


EXACT = SpeedSettings()
"""Nothing that changes an image."""


def choose_speed(settings: Mapping[str, Any] | None) -> SpeedSettings:
    """Read the settings; those left out change nothing.

    Raises:
        SettingsError: for anything but settings, and for one that is not known.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise SettingsError(f"speed={settings!r} is not allowed; give settings such as speed={{cache_every: 2}}.")
    known = {field.name for field in fields(SpeedSettings)}
    if unknown := set(settings or {}) - known:
        raise SettingsError(f"speed has no setting {choices(unknown)}; there are {choices(known)}.")
    return SpeedSettings(**(settings or {}))
