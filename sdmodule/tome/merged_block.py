"""A transformer block that works on merged tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from sdmodule.errors import SettingsError
from sdmodule.tome.exact import ExactMatching
from sdmodule.tome.plan import Plan
from sdmodule.tome.window import WindowMatching


@dataclass
class BlockMerging:
    """State of a merged block.

    Attributes:
        matching: matches tokens.
        attention: merge for self-attention.
        cross_attention: merge for cross-attention.
        mlp: merge for the feed-forward layer.
        whole: merge once and unmerge once for all three.
        keeps: keep the plan for later steps or following blocks.
        fresh: make a new plan at the next call even if one is kept, unless the leader has one.
        leader: the first block of this part of the UNet, if it shares its plan.
        plan: the plan that is kept.
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
        """The plan for tokens ``[B, N, C]``: a new one, that of an earlier step, or the leader's.

        With gradients each block makes its own: activation checkpointing calls it again when the leader's plan may be
        for other tokens.

        Raises:
            SettingsError: for tokens of another grid.
        """
        h, w = self.matching.grid
        if tokens.shape[1] != h * w:
            raise SettingsError(
                f"tome: applied for {h} by {w} = {h * w} tokens, and a block got {tokens.shape[1]}; "
                "apply it with the size of these latents."
            )
        kept = None if self.fresh else self.plan
        if self.leader is not None and not torch.is_grad_enabled():
            kept = self.leader.plan
        if kept is not None and len(kept.rows) == tokens.shape[0] * tokens.shape[1]:  # guidance may have ended
            return kept
        with torch.no_grad():
            plan = Plan.of(self.matching.positions(tokens), self.matching.merged)
        if self.keeps:
            self.plan = plan
        return plan


class MergedBlock(BasicTransformerBlock):
    """A ``BasicTransformerBlock`` on merged tokens; assigned through ``__class__``.

    One class serves all blocks and engines, so that compiled blocks share their code, pickle finds the class by name,
    and what is inside the block (LoRA layers, attention processors) is untouched.
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
        """Self-attention, cross-attention and feed-forward layer on tokens ``[B, N, C]``, merged as set.

        Raises:
            SettingsError: for tokens of another grid than merging was applied for, or a self-attention mask.
        """
        if attention_mask is not None:
            raise SettingsError(
                "tome: token merging takes no attention_mask for self-attention; leave it out, or set tome.ratio=0."
            )
        merging, batch = self.merging, len(hidden_states)
        plan = merging.plan_for(hidden_states)
        if merging.whole:
            merged = plan.merge(hidden_states, batch)
            output = super().forward(
                merged,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                cross_attention_kwargs=cross_attention_kwargs,
            )
            residual = output - merged if torch.is_grad_enabled() else output.sub_(merged)
            return add_residual(plan.unmerge(residual, batch), hidden_states)

        def layer(run: Any, norm: Any, tokens: Tensor, merges: bool, **context: Any) -> Tensor:
            if not merges:
                return run(norm(tokens), **context) + tokens
            return add_residual(plan.unmerge(run(plan.merge(norm(tokens), batch), **context), batch), tokens)

        options = cross_attention_kwargs or {}
        own = encoder_hidden_states if self.only_cross_attention else None
        tokens = layer(self.attn1, self.norm1, hidden_states, merging.attention, encoder_hidden_states=own, **options)
        if self.attn2 is not None:
            context = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            tokens = layer(self.attn2, self.norm2, tokens, merging.cross_attention, **context, **options)
        return layer(self.ff, self.norm3, tokens, merging.mlp)


def add_residual(unmerged: Tensor, tokens: Tensor) -> Tensor:
    """Tokens plus a layer's unmerged residual, which is overwritten if there are no gradients."""
    if torch.is_grad_enabled() or unmerged.dtype != tokens.dtype:
        return unmerged + tokens
    return unmerged.add_(tokens)
