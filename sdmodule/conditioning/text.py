"""Text embeddings of prompts, with weighted words and prompts of any length.

For a prompt without weights and of at most 75 tokens, the embeddings equal those of diffusers'
``StableDiffusionPipeline.encode_prompt`` to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdmodule.components.checkpoint import Components
from sdmodule.components.learned_words import multi_vector_tokens
from sdmodule.conditioning.prompt_syntax import parse_weights, split_at_breaks
from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError
from sdmodule.families.conditioning import Conditioning
from sdmodule.families.recognize import STABLE_DIFFUSION

COMMA_REACH = 20
"""A long prompt is split after a comma, if there is one among this many last tokens of a chunk."""


class TokenChunks(NamedTuple):
    """Prompts as chunks of tokens, each with its own start, end and padding tokens.

    Attributes:
        input_ids: ``[B, chunks, L]``, int64.
        attention_mask: ``[B, chunks, L]``, int64, 0 at padding.
        weights: ``[B, chunks, L]``, float32, 1 at start, end and padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weights: Tensor


Tokens = tuple[Tensor, Tensor | None, Tensor | None]
"""Ids of N chunks, ``[N, L]``; their attention mask if the text encoder uses it; their weights if not all are 1."""


def count_chunks(prompt: str, tokenizer: CLIPTokenizer) -> int:
    """Number of chunks of ``tokenizer.model_max_length - 2`` tokens that a prompt needs, at least 1."""
    return len(_split(prompt, tokenizer))


def tokenize(prompts: Sequence[str], tokenizer: CLIPTokenizer, chunks: int | None = None) -> TokenChunks:
    """Tokenise prompts into chunks, without truncation.

    Args:
        prompts: B prompts, weighted or not.
        tokenizer: its ``model_max_length`` is L.
        chunks: number of chunks of every prompt; by default as many as the longest one needs.

    Returns:
        Ids, mask and weights, each ``[B, chunks, L]``; short prompts are filled up with empty chunks.

    Raises:
        SettingsError: if a prompt needs more than ``chunks``, or has a weight out of range.
    """
    split = [_split(prompt, tokenizer) for prompt in prompts]
    longest = max(range(len(split)), key=lambda index: len(split[index]))
    needed = len(split[longest])
    chunks = needed if chunks is None else chunks
    if chunks < needed:
        raise SettingsError(
            f"prompt={shorten(prompts[longest], 60)!r}: needs {needed} chunks of {tokenizer.model_max_length - 2} "
            f"tokens and chunks={chunks}; set chunks to {needed} or more, or shorten the prompt."
        )
    rows = [row for prompt in split for row in prompt + [[]] * (chunks - len(prompt))]
    bos, eos = (tokenizer.bos_token_id, 1.0), (tokenizer.eos_token_id, 1.0)
    rows = [[bos, *row, eos] for row in rows]
    padded = tokenizer.pad(
        {"input_ids": [[token for token, _ in row] for row in rows]},
        padding="max_length",
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
        verbose=False,
    )
    weights = torch.ones(padded.input_ids.shape)
    weights[padded.attention_mask.bool()] = torch.tensor([weight for row in rows for _, weight in row])
    shape = (len(prompts), chunks)
    return TokenChunks(*(x.unflatten(0, shape) for x in (padded.input_ids, padded.attention_mask, weights)))


def _split(prompt: str, tokenizer: CLIPTokenizer) -> list[list[tuple[int, float]]]:
    """Tokens of a prompt with their weights, in chunks that end at ``BREAK``, and after a comma where possible."""
    sections: list[list[tuple[str, float]]] = [[]]
    for text, weight in parse_weights(prompt):
        first, *others = split_at_breaks(text)
        sections[-1].append((first, weight))
        sections += [[(part, weight)] for part in others]
    return [chunk for section in sections for chunk in _split_section(section, tokenizer)]


def _split_section(section: list[tuple[str, float]], tokenizer: CLIPTokenizer) -> list[list[tuple[int, float]]]:
    """Tokens of weighted texts, which start a chunk of their own."""
    texts, weights = zip(*section, strict=True)
    *pieces, comma = tokenizer([*texts, ","], add_special_tokens=False, verbose=False).input_ids
    words = multi_vector_tokens(tokenizer)
    tokens = [
        (expanded, weight)
        for piece, weight in zip(pieces, weights, strict=True)  # piece by piece, so that each token has its weight
        for token in piece
        for expanded in words.get(token, [token])
    ]
    size = tokenizer.model_max_length - 2
    chunks = []
    while len(tokens) > size:
        ends = range(size, max(size - COMMA_REACH, 0), -1)
        end = next((end for end in ends if tokens[end - 1][0] in comma), size)
        chunks.append(tokens[:end])
        tokens = tokens[end:]
    return [*chunks, tokens]


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    *,
    chunks: int | None = None,
) -> Tensor:
    """Text embeddings of prompts, ``[B, chunks * L, D]``; each chunk is encoded separately, all in one call.

    Args:
        prompts: B prompts.
        tokenizer: its ``model_max_length`` is L, 77 for Stable Diffusion.
        text_encoder: its hidden states have width D; gradients flow if it is trained.
        chunks: number of chunks of every prompt; by default as many as the longest one needs.

    Returns:
        ``encoder_hidden_states`` ``[B, chunks * L, D]`` in the text encoder's dtype.

    Raises:
        SettingsError: if a prompt needs more than ``chunks`` or has a weight out of range, or if the tokenizer's length
            exceeds the text encoder's.
    """
    tokens = encoder_input(prompts, tokenizer, text_encoder, chunks)
    return _encode(tokens, len(prompts), text_encoder, STABLE_DIFFUSION.encode)[0]


def encode_texts(
    prompts: Sequence[str],
    parts: Components,
    chunks: int,
    second: Sequence[str] | None = None,
    clip_skip: int = 0,
) -> Conditioning:
    """Embeddings of prompts by all text encoders of a model, side by side.

    Args:
        prompts: B prompts.
        parts: the model.
        chunks: number of chunks of every prompt; see `chunks_of`.
        second: what the second text encoder reads instead.
        clip_skip: last layers of the text encoders that are skipped.

    Raises:
        SettingsError: as `encode_prompts` does.
    """
    return encode_tokens(tokenize_texts(prompts, parts, chunks, second), len(prompts), parts, clip_skip)


def tokenize_texts(
    prompts: Sequence[str], parts: Components, chunks: int, second: Sequence[str] | None = None
) -> tuple[Tokens, ...]:
    """Tokens of prompts for each text encoder of a model, on the CPU; the arguments are those of `encode_texts`."""
    texts = [prompts, prompts if second is None else second]
    return tuple(encoder_input(each, *pair, chunks) for each, pair in zip(texts, parts.text_encoders, strict=False))


def encode_tokens(tokens: Sequence[Tokens], count: int, parts: Components, clip_skip: int = 0) -> Conditioning:
    """Embeddings of ``count`` prompts from their tokens for each text encoder; see `encode_texts`."""
    encode = partial(parts.family.encode, clip_skip=clip_skip)
    pairs = zip(tokens, parts.text_encoders, strict=True)
    encoded = [_encode(each, count, encoder, encode) for each, (_, encoder) in pairs]
    pooled = [embedding for _, embedding in encoded if embedding is not None]
    return Conditioning(torch.cat([hidden for hidden, _ in encoded], dim=-1), pooled[-1] if pooled else None)


def chunks_of(prompts: Sequence[str], parts: Components) -> int:
    """Chunks of text that the longest of some prompts needs in any of a model's tokenizers."""
    return max(count_chunks(prompt, tokenizer) for prompt in prompts for tokenizer, _ in parts.text_encoders)


def encoder_input(prompts: Sequence[str], tokenizer: CLIPTokenizer, text_encoder: Any, chunks: int | None) -> Tokens:
    """What a text encoder reads of prompts, on the CPU.

    Raises:
        SettingsError: as `encode_prompts` does.
    """
    length, positions = tokenizer.model_max_length, text_encoder.config.max_position_embeddings
    if length > positions:
        raise SettingsError(
            f"tokenizer.model_max_length={length}: the text encoder reads {positions} tokens; "
            f"set model_max_length to {positions} in tokenizer_config.json."
        )
    ids, mask, weights = (each.flatten(0, 1) for each in tokenize(prompts, tokenizer, chunks))
    # Stable Diffusion's encoders attend to padding
    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    return ids, mask if uses_mask else None, weights if (weights != 1).any() else None


def _encode(
    tokens: Tokens,
    count: int,
    text_encoder: Any,
    encode: Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """Hidden states ``[B, chunks * L, D]`` by one text encoder, and the pooled embedding of each first chunk."""
    device = text_encoder.device
    ids, mask, weights = (None if each is None else upload(each, device) for each in tokens)
    hidden, pooled = encode(text_encoder, ids, mask)  # type: ignore[arg-type]
    if weights is not None:
        hidden = apply_prompt_weights(hidden, weights)
    hidden = hidden.to(text_encoder.dtype).reshape(count, -1, hidden.shape[-1])
    return hidden, None if pooled is None else pooled.unflatten(0, (count, -1))[:, 0]


def apply_prompt_weights(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiply hidden states by their tokens' weights, and rescale each chunk to its former mean.

    This is the convention of AUTOMATIC1111's web UI. The ratio of means is meaningless if the mean is close to zero,
    as in a text encoder with random weights (its LayerNorm centres every token), or changes its sign: such a chunk is
    multiplied, but not rescaled. A chunk whose weights are all 1 is unchanged, to the bit.

    Args:
        hidden: ``[N, L, D]``, one chunk per row.
        weights: ``[N, L]``.

    Returns:
        ``[N, L, D]`` in float32.
    """
    hidden = hidden.float()
    weighted = hidden * weights.unsqueeze(-1)
    before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (hidden, weighted))
    negligible = 1e-3 * hidden.abs().mean(dim=(1, 2), keepdim=True)
    meaningful = before * after > negligible.square()
    return weighted * (torch.where(meaningful, before, 1) / torch.where(meaningful, after, 1))
