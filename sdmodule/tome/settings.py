"""The settings of token merging, checked as soon as they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

from sdmodule.errors import SettingsError, choices
from sdmodule.ranges import check_flag, check_whole
from sdmodule.tome.apply import StartStep, merged, merged_by_tomesd, noop_step
from sdmodule.tome.blocks import DOWNSAMPLES, Grid, blocks_to_merge
from sdmodule.tome.tomesd_limits import check_tomesd
from sdmodule.tome.window import tokens_merged

ENGINES = ("tomesd", "exact", "window")


@dataclass(frozen=True)
class TokenMerging:
    """How tokens are merged, in tomesd's own terms.

    Args:
        ratio: share of the tokens that are merged into others, 0 to ``1 - 1 / (sx * sy)``; 0 is exactly off.
        max_downsample: merge in blocks whose latents are at most this much smaller than the input: 1, 2, 4 or 8.
        sx: one token of each ``sx`` by ``sy`` cell stays; its width.
        sy: its height.
        use_rand: draw which token of a cell stays, for each image from its own seed; otherwise the first.
        merge_attn: merge for self-attention.
        merge_crossattn: merge for cross-attention.
        merge_mlp: merge for the feed-forward layer.
        engine: which implementation: ``exact``, with tomesd's result; ``window``, which matches in small windows and
            is faster; or ``tomesd``, the authors' package.
        reuse_steps: find out anew which tokens go together at every so many steps.

    Raises:
        SettingsError: for a value out of range, most of which tomesd takes without a word.
    """

    ratio: float = 0.5
    max_downsample: int = 1
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
            check_whole(f"tome.{name}", getattr(self, name))
        for name in ("use_rand", "merge_attn", "merge_crossattn", "merge_mlp"):
            check_flag(f"tome.{name}", getattr(self, name))
        most = 1 - 1 / (self.sx * self.sy)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 <= self.ratio <= most:
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
        if self.engine not in ENGINES:
            raise SettingsError(f"tome.engine={self.engine} is not known; give one of {choices(ENGINES)}.")
        if self.engine == "tomesd" and self.reuse_steps > 1:
            raise SettingsError(
                f"tome.reuse_steps={self.reuse_steps} is not allowed with tome.engine=tomesd, which plans at every "
                "step; give 1, or use tome.engine=exact."
            )
        if self.engine == "window":
            tokens_merged(self.ratio, 4 * self.sx * self.sy)

    @property
    def whole_block(self) -> bool:
        """Whether one merge and one unmerge serve a whole block: engine ``window`` with all three merges."""
        return self.engine == "window" and self.merge_attn and self.merge_crossattn and self.merge_mlp

    def for_images(self, seeds: Sequence[int], guided: bool) -> tuple[TokenMerging, Sequence[int]]:
        """What to apply to a batch of images, such that none depends on the batch that it is in.

        tomesd has one generator for the whole batch, and draws nothing where the batch has an odd number of rows. So
        its draws are the same for every image, and without guidance, which doubles the rows, there are none.

        Args:
            seeds: of the images.
            guided: whether the UNet sees every image twice.

        Returns:
            The settings that hold, and the seeds of the draws.
        """
        if self.engine != "tomesd":
            return self, seeds
        return replace(self, use_rand=self.use_rand and guided), [0]

    def check(self, unet: Any, size: Grid) -> None:
        """Check against a UNet, and latents of a height and width.

        Raises:
            SettingsError: for a ``max_downsample`` that merges nothing in this UNet, a cell larger than a block's
                image, or a size that tomesd fails at.
        """
        if self.ratio == 0:
            return
        for placed in blocks_to_merge(unet, self.max_downsample):
            for name, stride, side in zip(("sy", "sx"), (self.sy, self.sx), placed.grid(size), strict=True):
                if stride > side:
                    raise SettingsError(
                        f"tome.{name}={stride} is more than the {side} tokens of a block that "
                        f"tome.max_downsample={self.max_downsample} merges; give 1 to {side}."
                    )
        if self.engine == "tomesd":
            check_tomesd(unet, size, self.max_downsample)

    def applied(
        self, unet: Any, seeds: Sequence[int] = (0,), size: Grid | None = None, steps: int = 1
    ) -> AbstractContextManager[StartStep]:
        """Merge tokens inside a ``with`` block; afterwards the UNet is as it was, even if something was raised.

        The result depends on the seeds and on the step that was said to start, not on how many calls came before.

        Args:
            unet: a ``UNet2DConditionModel``.
            seeds: of the draws: one for each image of the batch, whose halves for guidance share it, or a single one
                for all. tomesd has one for all and takes the first.
            size: height and width of the latents; the UNet's own if None.
            steps: how many steps are drawn for.

        Returns:
            A context manager that gives a function, to be called with the number of each step before it.

        Raises:
            SettingsError: as ``check`` does.
        """
        if self.ratio == 0:
            return nullcontext(noop_step)
        own = unet.config.sample_size
        size = size or ((own, own) if isinstance(own, int) else tuple(own))
        self.check(unet, size)
        if self.engine == "tomesd":
            return merged_by_tomesd(unet, self, seeds[0])
        return merged(unet, self, seeds, size, steps)


OFF = TokenMerging(ratio=0.0)
"""No merging."""


def choose_merging(tome: Mapping[str, Any] | None, tomesd_cfg: Mapping[str, Any] | None = None) -> TokenMerging:
    """Read the settings under either of their names.

    Args:
        tome: the settings; those left out have the defaults of :class:`TokenMerging`, and none at all is off.
        tomesd_cfg: the same under the name that users of older toolkits know.

    Raises:
        SettingsError: if both are given, or one has an unknown key.
    """
    first, second = _read("tome", tome), _read("tomesd_cfg", tomesd_cfg)
    if tomesd_cfg and first != OFF:
        raise SettingsError(f"both tome and tomesd_cfg={dict(tomesd_cfg)} are given; give one of them.")
    return second if tomesd_cfg else first


def _read(name: str, settings: Mapping[str, Any] | None) -> TokenMerging:
    if settings is not None and not isinstance(settings, Mapping):
        raise SettingsError(f"{name}={settings!r} is not allowed; give settings such as {name}={{ratio: 0.5}}.")
    if not settings:
        return OFF
    known = {field.name for field in fields(TokenMerging)}
    if unknown := set(settings) - known:
        raise SettingsError(f"{name} has no setting {choices(unknown)}; there are {choices(known)}.")
    return TokenMerging(**settings)
