"""A transformer block that works on merged tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from sdmodule.errors import SettingsError
from sdmodule.tome.plan import Plan

if TYPE_CHECKING:
    from sdmodule.tome.exact import ExactMatching
    from sdmodule.tome.window import WindowMatching


@dataclass
class BlockMerging:
    """What a merged block needs to know.

    Attributes:
        matching: what finds out which tokens go together.
        attention: merge for self-attention.
        cross_attention: merge for cross-attention.
        mlp: merge for the feed-forward layer.
        whole: merge once and unmerge once for all three.
        keeps: keep the plan, for later steps or for the blocks that follow.
        fresh: make a plan at the next call, even if one was kept, unless a leader has made one.
        leader: the first block of this part of the UNet, if its plan serves for this one too.
        plan: the plan that was kept.
    """

    matching: ExactMatching | WindowMatching
    attention: bool
    cross_attention: bool
    mlp: bool
    whole: bool
    keeps: bool
    fresh: bool = True
    leader: BlockMerging | None = None
    plan: Plan | None = field(default=None, repr=False)

    def plan_for(self, tokens: Tensor) -> Plan:
        """The plan for tokens ``[B, N, C]``: of this call, of an earlier step, or of the leader.

        With gradients each block makes its own: it may be called again for them when the leader has seen other tokens.
        """
        h, w = self.matching.grid
        if tokens.shape[1] != h * w:
            raise SettingsError(
                f"token merging was applied for {h} by {w} = {h * w} tokens and a block got {tokens.shape[1]}; "
                "apply it with the size of these latents."
            )
        made = None if self.fresh else self.plan
        if self.leader is not None and not torch.is_grad_enabled():
            made = self.leader.plan
        if made is not None and len(made.rows) == tokens.shape[0] * tokens.shape[1]:  # guidance may have ended
            return made
        with torch.no_grad():
            plan = Plan.of(self.matching.positions(tokens), self.matching.merged)
        if self.keeps:
            self.plan = plan
        return plan


class MergedBlock(BasicTransformerBlock):
    """A ``BasicTransformerBlock`` on merged tokens; a block becomes one by its ``__class__``, and ceases by it too.

    One class for all blocks and engines, so that a compiled block serves its neighbours, pickle finds it by name, and
    whatever lives inside the block (LoRA layers, attention processors) is untouched.
    """

    merging: BlockMerging

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention, cross-attention and feed-forward layer on tokens ``[B, N, C]``, merged where asked for.

        Raises:
            SettingsError: for tokens of another grid than merging was applied for, or a mask of self-attention.
        """
        if attention_mask is not None:
            raise SettingsError("token merging takes no attention_mask of self-attention; leave it out or tome off.")
        on, batch = self.merging, len(hidden_states)
        plan = on.plan_for(hidden_states)
        if on.whole:
            merged = plan.merge(hidden_states, batch)
            done = super().forward(
                merged,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                cross_attention_kwargs=cross_attention_kwargs,
            )
            gained = done - merged if torch.is_grad_enabled() else done.sub_(merged)
            return added(plan.unmerge(gained, batch), hidden_states)

        def layer(run: Any, norm: Any, tokens: Tensor, merges: bool, **context: Any) -> Tensor:
            if not merges:
                return run(norm(tokens), **context) + tokens
            return added(plan.unmerge(run(plan.merge(norm(tokens), batch), **context), batch), tokens)

        options = cross_attention_kwargs or {}
        own = encoder_hidden_states if self.only_cross_attention else None
        tokens = layer(self.attn1, self.norm1, hidden_states, on.attention, encoder_hidden_states=own, **options)
        if self.attn2 is not None:
            context = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            tokens = layer(self.attn2, self.norm2, tokens, on.cross_attention, **context, **options)
        return layer(self.ff, self.norm3, tokens, on.mlp)


def added(unmerged: Tensor, tokens: Tensor) -> Tensor:
    """Tokens and what a layer adds to them, which nobody else holds: without gradients it becomes the sum."""
    if torch.is_grad_enabled() or unmerged.dtype != tokens.dtype:
        return unmerged + tokens
    return unmerged.add_(tokens)
