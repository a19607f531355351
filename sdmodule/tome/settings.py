"""The settings of token merging, checked, and switched on for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tomesd
import torch

from sdmodule.errors import SettingsError

DOWNSAMPLES = (1, 2, 4, 8)


@dataclass(frozen=True)
class TokenMerging:
    """How tokens are merged, in tomesd's own terms.

    Args:
        ratio: share of the tokens that are merged into others, 0 to ``1 - 1 / (sx * sy)``; 0 is exactly off.
        max_downsample: merge in blocks whose latents are at most this much smaller than the input: 1, 2, 4 or 8.
        sx: one token of each ``sx`` by ``sy`` cell stays; its width.
        sy: its height.
        use_rand: draw which token of a cell stays; otherwise the first.
        merge_attn: merge for self-attention.
        merge_crossattn: merge for cross-attention.
        merge_mlp: merge for the feed-forward layer.
        engine: which implementation: ``tomesd``, the authors' package.

    Raises:
        SettingsError: for a value out of range, most of which tomesd takes without a word.
    """

    ratio: float = 0.0
    max_downsample: int = 1
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    engine: str = "tomesd"

    def __post_init__(self) -> None:
        for name in ("sx", "sy"):
            stride = getattr(self, name)
            if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
                raise SettingsError(f"tome.{name}={stride} is not allowed; give a whole number of at least 1.")
        most = 1 - 1 / (self.sx * self.sy)
        if not isinstance(self.ratio, (int, float)) or not 0 <= self.ratio <= most:
            raise SettingsError(
                f"tome.ratio={self.ratio} is not allowed; with tome.sx={self.sx} and tome.sy={self.sy} "
                f"give a number from 0 (off) to {most:g}."
            )
        if self.max_downsample not in DOWNSAMPLES:
            raise SettingsError(f"tome.max_downsample={self.max_downsample} is not allowed; give 1, 2, 4 or 8.")
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise SettingsError(
                "tome merges nothing with merge_attn, merge_crossattn and merge_mlp all false; "
                "set one to true, or tome.ratio=0."
            )
        if self.engine != "tomesd":
            raise SettingsError(f"tome.engine={self.engine} is not known; give tomesd.")

    @contextmanager
    def applied(self, unet: Any, seed: int) -> Iterator[None]:
        """Merge tokens inside the block; afterwards the UNet is as it was.

        tomesd draws its cells from a copy of torch's global generator, made at the first forward pass. It is seeded
        here, and given back untouched, so that a picture depends on its seed and not on what was drawn before.
        """
        if self.ratio == 0:
            yield
            return
        device = unet.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            tomesd.apply_patch(
                unet,
                ratio=self.ratio,
                max_downsample=self.max_downsample,
                sx=self.sx,
                sy=self.sy,
                use_rand=self.use_rand,
                merge_attn=self.merge_attn,
                merge_crossattn=self.merge_crossattn,
                merge_mlp=self.merge_mlp,
            )
            try:
                yield
            finally:
                tomesd.remove_patch(unet)
