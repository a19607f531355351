"""Captions as the denoiser is given them in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.conditioning.text import chunks_of, encode_texts
from sdmodule.families.conditioning import Conditioning


def encode_captions(captions: Sequence[str], parts: Components, cached: Any = None) -> Conditioning:
    """Text embeddings of captions, in which parentheses have no meaning.

    An empty caption has embeddings of zeros where the checkpoint says so of empty prompts: these are what sampling is
    guided away from, and how the published training code of Stable Diffusion XL drops captions.

    Args:
        captions: B captions.
        parts: the model.
        cached: embeddings by prompt, see `data.cache.latents.CachedEmbeddings`; used if it has all of them.
    """
    prompts = [escape_prompt(caption) for caption in captions]
    if cached is not None and all(prompt in cached for prompt in prompts):
        text = cached(prompts).on(parts.unet.device)
    else:
        text = encode_texts(prompts, parts, chunks_of(prompts, parts))
    if not parts.zero_empty_prompts:
        return text
    return text.zeroed([row for row, caption in enumerate(captions) if not caption])
