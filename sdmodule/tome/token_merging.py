"""`TokenMerging`: the settings of token merging, checked when they are created."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdmodule.errors import SettingsError, build_settings, check_bool, check_choice, check_int, is_number
from sdmodule.tome.blocks import DOWNSAMPLES, Grid, blocks_to_merge, first_downsample
from sdmodule.tome.tomesd_limits import check_tomesd
from sdmodule.tome.window import tokens_merged

ENGINES = ("tomesd", "exact", "window")


@dataclass(frozen=True)
class TokenMerging:
    """How to merge tokens, in the terms of tomesd.

    Args:
        ratio: share of the tokens that are merged into others, 0 to ``1 - 1 / (sx * sy)``; 0 is exactly off.
        max_downsample: merge in blocks whose latents are downsampled at most this much: 1, 2, 4 or 8; None for where
            the UNet's transformer blocks begin, which is 1, and 2 for Stable Diffusion XL.
        sx: width of the cells; one token of each ``sx`` by ``sy`` cell is never merged.
        sy: height of the cells.
        use_rand: draw that token at random, for each image from its own seed; otherwise it is the first of its cell.
        merge_attn: merge for self-attention.
        merge_crossattn: merge for cross-attention.
        merge_mlp: merge for the feed-forward layer.
        engine: implementation: ``exact``, with tomesd's result; ``window``, which matches within small windows and is
            faster; or ``tomesd``, the authors' package.
        reuse_steps: match tokens at every n-th step, and reuse the match in between.

    Raises:
        SettingsError: for a value out of range, most of which tomesd silently accepts.
    """

    ratio: float = 0.5
    max_downsample: int | None = None
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    engine: str = "exact"
    reuse_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("sx", "sy", "reuse_steps"):
            check_int(f"tome.{name}", getattr(self, name))
        for name in ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"):
            check_bool(f"tome.{name}", getattr(self, name))
        most = 1 - 1 / (self.sx * self.sy)
        if not is_number(self.ratio) or not 0 <= self.ratio <= most:
            raise SettingsError(
                f"tome.ratio={self.ratio}: must be a number from 0 (off) to {most:g}, "
                f"with tome.sx={self.sx} and tome.sy={self.sy}."
            )
        if self.max_downsample is not None and self.max_downsample not in DOWNSAMPLES:
            raise SettingsError(f"tome.max_downsample={self.max_downsample}: must be 1, 2, 4 or 8.")
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise SettingsError(
                f"tome.ratio={self.ratio}: merges nothing with merge_attn, merge_crossattn and merge_mlp all false; "
                "set one of them to true, or tome.ratio=0."
            )
        check_choice("tome.engine", self.engine, ENGINES)
        if self.engine == "tomesd" and self.reuse_steps > 1:
            raise SettingsError(
                f"tome.reuse_steps={self.reuse_steps}: must be 1 with tome.engine=tomesd, which matches at every step; "
                "use tome.engine=exact for more."
            )
        if self.engine == "window":
            tokens_merged(self.ratio, 4 * self.sx * self.sy)

    @property
    def whole_block(self) -> bool:
        """Whether one merge and one unmerge serve a whole block: engine ``window`` with all three layers merged."""
        return self.engine == "window" and self.merge_attn and self.merge_crossattn and self.merge_mlp

    def for_unet(self, unet: Any) -> TokenMerging:
        """Settings that say where a UNet's blocks are merged."""
        if self.max_downsample is not None or self.ratio == 0:
            return self
        return replace(self, max_downsample=first_downsample(unet))

    def for_images(self, seeds: Sequence[int], guided: bool) -> tuple[TokenMerging, Sequence[int]]:
        """Settings and seeds with which no image depends on the rest of its batch.

        tomesd has one generator for the whole batch, and draws nothing for an odd number of rows. So with engine
        ``tomesd`` all images share their draws, and without guidance, which doubles the rows, there are none.

        Args:
            seeds: seeds of the images.
            guided: whether the UNet gets every image twice.

        Returns:
            The settings, and the seeds to draw from.
        """
        if self.engine != "tomesd":
            return self, seeds
        return replace(self, use_rand=self.use_rand and guided), [0]

    def check(self, unet: Any, size: Grid) -> None:
        """Check these settings against a UNet and the size of its latents.

        Args:
            unet: a ``UNet2DConditionModel``.
            size: height and width of the latents.

        Raises:
            SettingsError: if no block of this UNet is merged, a cell is larger than the grid of a block, or tomesd
                cannot handle the size.
        """
        if self.ratio == 0:
            return
        for placed in blocks_to_merge(unet, self.max_downsample):
            for name, stride, side in zip(("sy", "sx"), (self.sy, self.sx), placed.grid(size), strict=True):
                if stride > side:
                    raise SettingsError(
                        f"tome.{name}={stride}: must be from 1 to {side}, the tokens along a side of a block that "
                        f"tome.max_downsample={self.for_unet(unet).max_downsample} merges."
                    )
        if self.engine == "tomesd":
            check_tomesd(unet, size, self.for_unet(unet).max_downsample or 1)


OFF = TokenMerging(ratio=0.0)
"""No merging."""


def choose_merging(tome: Mapping[str, Any] | None) -> TokenMerging:
    """`TokenMerging` from a mapping; an empty one or None is off, and what it leaves out has its default.

    Raises:
        SettingsError: for anything but a mapping, or an unknown setting.
    """
    return build_settings(TokenMerging, "tome", tome) if tome else OFF
