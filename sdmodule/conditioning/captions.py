"""Captions as the denoiser is given them in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.conditioning.text import Tokens, chunks_of, encode_tokens, tokenize_texts
from sdmodule.families.conditioning import Conditioning


class CaptionInputs(NamedTuple):
    """Captions before they are embedded.

    Attributes:
        batch_size: B.
        tokens: for each text encoder; none where all embeddings are known.
        hidden_states: known ones, ``[B, L, D]``.
        pooled: likewise, ``[B, P]``.
        empty: rows whose embeddings are zeros, int64.
    """

    batch_size: int
    tokens: tuple[Tokens, ...] = ()
    hidden_states: Tensor | None = None
    pooled: Tensor | None = None
    empty: Tensor | None = None


def encode_captions(captions: Sequence[str], parts: Components, cached: Any = None) -> Conditioning:
    """Text embeddings of captions, in which parentheses have no meaning.

    An empty caption has embeddings of zeros where the checkpoint says so of empty prompts: these are what sampling is
    guided away from, and how the published training code of Stable Diffusion XL drops captions.

    Args:
        captions: B captions.
        parts: the model.
        cached: embeddings by prompt, see `data.cache.latents.CachedEmbeddings`; used if it has all of them.
    """
    return embed_captions(caption_inputs(captions, parts, cached), parts)


def caption_inputs(captions: Sequence[str], parts: Components, cached: Any = None) -> CaptionInputs:
    """What `embed_captions` needs of captions, on the CPU; the arguments are those of `encode_captions`."""
    prompts = [escape_prompt(caption) for caption in captions]
    empty = [row for row, caption in enumerate(captions) if not caption] if parts.zero_empty_prompts else []
    rows = torch.tensor(empty) if empty else None
    if cached is not None and all(prompt in cached for prompt in prompts):
        known = cached(prompts)
        return CaptionInputs(len(captions), (), known.hidden_states, known.pooled, rows)
    return CaptionInputs(len(captions), tokenize_texts(prompts, parts, chunks_of(prompts, parts)), empty=rows)


def embed_captions(inputs: CaptionInputs, parts: Components) -> Conditioning:
    """Text embeddings of captions from what `caption_inputs` gives, wherever that is."""
    if inputs.hidden_states is not None:
        text = Conditioning(inputs.hidden_states, inputs.pooled).on(parts.unet.device)
    else:
        text = encode_tokens(inputs.tokens, inputs.batch_size, parts)
    return text if inputs.empty is None else text.zeroed(inputs.empty)
