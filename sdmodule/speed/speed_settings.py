"""`SpeedSettings`: the options for faster sampling, checked when they are created."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sdmodule.errors import SettingsError, check_bool, check_choice, check_int, is_number
from sdmodule.speed.compile import PAYS

COMPILE = ("none", "blocks", "autotuned", "whole", "auto")
KERNELS = ("torch", "fastest")
DECODE = ("whole", "sliced", "tiled")
ATTENTION = ("sdpa", "flash", "efficient", "cudnn", "math", "plain", "xformers")
OFFLOAD = ("none", "model", "sequential")
QUANTIZE = ("none", "int8", "fp8")
CHOICES = {
    "compile": COMPILE,
    "attention": ATTENTION,
    "kernels": KERNELS,
    "decode": DECODE,
    "offload": OFFLOAD,
    "quantize": QUANTIZE,
}


@dataclass(frozen=True)
class SpeedSettings:
    """Options for faster sampling; with the defaults an image is the one of plain diffusers, to the bit.

    Args:
        guidance_interval: interval of timesteps with guidance, as shares of the schedule from 0 (an image) to 1
            (noise); outside it the UNet sees the prompt alone, which halves the work (Kynkäänniemi et al. 2024).
        cache_every: run the whole UNet at every n-th step; the steps between run the outer layers only, on cached deep
            features (Ma et al. 2024, "DeepCache"). 1 caches nothing.
        cache_layers: layers that run at every step, counted from the input and from the output.
        channels_last: keep UNet and VAE in channels_last, the fastest layout for convolutions in 16 bits; ``auto`` does
            so in 16 bits, and in float32 where ``kernels=fastest`` takes effect.
        compile: ``none``; ``blocks``, the UNet's blocks one by one; ``autotuned``, these with every
            matrix product and convolution timed in several forms; ``whole``, the UNet as one graph; or ``auto``:
            ``blocks`` for many images on a GPU, see `compile.PAYS`, and else ``none``.
        attention: attention backend: ``sdpa`` lets torch choose; ``flash``, ``efficient``, ``cudnn`` and ``math`` are
            torch's own by name; ``plain`` is two matrix products; ``xformers`` needs that package.
        kernels: ``torch``, or ``fastest``: on a GPU, TF32 for what is in float32; on CPU, where nothing is compiled,
            the kernel of ``speed.cpu`` that was fastest on this machine. In bfloat16, large blocks that merge tokens do
            so either way; see ``tome.apply.apply_merging``.
        decode: what the VAE decodes at once: the ``whole`` batch, one image (``sliced``), or one tile of an image
            (``tiled``, with blended seams); each needs less memory than the one before.
        quantize: type in which linear layers of the UNet's transformer blocks multiply: ``none``, their own; ``int8``;
            or ``fp8``, on GPUs from compute capability 8.9 on. Needs torchao. On CPU it sets ``kernels=torch``.
        cuda_graphs: on a GPU, record the kernels of a step once and launch them together, which changes no bit.
        offload: what waits in the host's memory until it is needed, to save that of a GPU: ``none``; ``model``, the
            networks that are not in use; or ``sequential``, all but a few layers, which takes many times as long.
        keep_memory: on CPU, do not return freed memory to the system between layers.
        effect: one line for the user on what a preset does to images.

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
    quantize: str = "none"
    cuda_graphs: bool = False
    offload: str = "none"
    keep_memory: bool = False
    effect: str = ""

    def __post_init__(self) -> None:
        interval = self.guidance_interval
        if (
            not isinstance(interval, (list, tuple))
            or len(interval) != 2
            or not all(is_number(end) for end in interval)
            or not 0 <= interval[0] < interval[1] <= 1
        ):
            raise SettingsError(
                f"speed.guidance_interval={interval}: must be two increasing shares of the timesteps from 0 (an image) "
                "to 1 (noise), such as [0.2,0.8]."
            )
        object.__setattr__(self, "guidance_interval", (float(interval[0]), float(interval[1])))
        for name in ("cache_every", "cache_layers"):
            check_int(f"speed.{name}", getattr(self, name))
        check_bool("speed.keep_memory", self.keep_memory)
        check_bool("speed.cuda_graphs", self.cuda_graphs)
        if not isinstance(self.channels_last, bool) and self.channels_last != "auto":
            raise SettingsError(f"speed.channels_last={self.channels_last}: must be true, false or auto.")
        for name, allowed in CHOICES.items():
            check_choice(f"speed.{name}", getattr(self, name), allowed)
        if self.quantize != "none" and self.offload != "none":
            raise SettingsError(
                f"speed.quantize={self.quantize}, speed.offload={self.offload}: exclude each other; give one of them."
            )
        compiles = {"model": ("whole",), "sequential": ("whole", "blocks", "autotuned")}.get(self.offload, ())
        if self.compile in compiles:
            raise SettingsError(
                f"speed.offload={self.offload}, speed.compile={self.compile}: compiled code cannot fetch weights; set "
                "speed.compile=none."
            )

    def compile_on(self, device: str, work: float = math.inf) -> str:
        """What to compile on a type of device: ``none``, ``blocks``, ``autotuned`` or ``whole``.

        Args:
            device: ``cpu`` or ``cuda``.
            work: denoising steps of images of 512 pixels that are ahead.
        """
        if self.compile == "auto":
            work = 0.0 if self.offload == "sequential" else work
            return "blocks" if device == "cuda" and work >= PAYS else "none"
        return self.compile

    def fastest_on(self, device: str) -> bool:
        """Whether the kernels of ``speed.cpu`` are used on a type of device."""
        plain = self.quantize == "none" and self.compile_on(device) == "none"
        return self.kernels == "fastest" and device == "cpu" and plain

    def channels_last_in(self, dtype: torch.dtype, device: str) -> bool:
        """Whether weights of a dtype are kept in channels_last on a type of device."""
        if isinstance(self.channels_last, str):
            return dtype.itemsize == 2 or self.fastest_on(device)
        return self.channels_last

    def metadata(self) -> dict[str, Any]:
        """The options that change an image, in plain types; empty with the defaults."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value != getattr(EXACT, name) and name not in ("keep_memory", "offload", "cuda_graphs", "effect")
        }


EXACT = SpeedSettings()
"""The defaults: nothing that changes an image."""
