"""Prompts to the hidden states that the UNet attends to, with weighted words and prompts of any length.

An ordinary prompt gives, to the bit, what ``StableDiffusionPipeline.encode_prompt`` gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from textwrap import shorten

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdmodule.components.learned_words import multi_vector_tokens
from sdmodule.errors import SettingsError

MAX_WEIGHT = 10.0
COMMA_REACH = 20  # a long prompt is broken after a comma if one lies among the last 20 tokens of the chunk

_SYNTAX = re.compile(
    r"""
    \\ (?P<escaped> [()] )
    | (?P<opening> \( )
    | : \s* (?P<weight> [+-]? (?: \d+ \.? \d* | \. \d+ ) (?: e [+-]? \d+ )? ) \s* \)
    | (?P<closing> \) )
    | [^\\():]+
    | [\\:]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt into pieces of text and their weights.

    Only ``(words:1.3)`` gives a weight; groups in groups multiply. Any other parenthesis is ordinary text, and
    ``\(`` and ``\)`` always are.

    Args:
        prompt: what the user wrote.

    Returns:
        Pieces in order, neighbours of equal weight joined; a prompt without weights is one piece of weight 1.

    Raises:
        SettingsError: a weight is negative or above 10.

    Example:
        >>> parse_weights("a (red:1.3) cat (sleeping)")
        [('a ', 1.0), ('red', 1.3), (' cat (sleeping)', 1.0)]
    """
    pieces = [("", 1.0)]
    groups: list[int] = []  # where in pieces each open parenthesis stands
    for match in _SYNTAX.finditer(prompt):
        if match["weight"] and groups and groups[-1] + 1 < len(pieces):
            start, factor = groups.pop(), _checked_weight(match["weight"], prompt)
            pieces[start:] = [(text, weight * factor) for text, weight in pieces[start + 1 :]]
            continue
        if match["opening"]:
            groups.append(len(pieces))
        elif groups and (match["closing"] or match["weight"]):
            groups.pop()
        pieces.append((match["escaped"] or match[0], 1.0))
    joined = [("".join(text for text, _ in run), weight) for weight, run in groupby(pieces, key=itemgetter(1))]
    return [piece for piece in joined if piece[0]] or [("", 1.0)]


def escape_prompt(text: str) -> str:
    r"""The prompt that is read as a text is written, whatever its parentheses hold.

    Example:
        >>> literal("a clock (12:30)")
        'a clock \\(12:30\\)'
    """
    return re.sub(r"([()])", r"\\\1", text)


def _checked_weight(number: str, prompt: str) -> float:
    weight = float(number)
    if not 0 <= weight <= MAX_WEIGHT:
        raise SettingsError(
            f"The weight {number} in the prompt {shorten(prompt, 200)!r} is not between 0 and {MAX_WEIGHT:g}: "
            r"choose one in this range, or write \( and \) if the parentheses are meant as text."
        )
    return weight


@dataclass(frozen=True)
class TokenChunks:
    """Prompts as chunks of tokens, each with its own begin, end and padding.

    Attributes:
        input_ids: ``[B, chunks, L]``, int64.
        attention_mask: ``[B, chunks, L]``, int64, 0 at padding.
        weights: ``[B, chunks, L]``, float32, 1 at begin, end and padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weights: Tensor


def count_chunks(prompt: str, tokenizer: CLIPTokenizer) -> int:
    """Count the chunks of ``tokenizer.model_max_length - 2`` tokens that a prompt needs; an empty one needs one."""
    return len(_split(prompt, tokenizer))


def tokenize(prompts: Sequence[str], tokenizer: CLIPTokenizer, chunks: int | None = None) -> TokenChunks:
    """Turn prompts into token ids, without cutting any.

    Args:
        prompts: B prompts, weighted or not.
        tokenizer: its ``model_max_length`` is L, and it pads as it always does.
        chunks: how many chunks to give each prompt; by default as many as the longest one needs.

    Returns:
        Ids, mask and weights, each ``[B, chunks, L]``; short prompts are filled up with empty chunks.

    Raises:
        SettingsError: a prompt needs more than ``chunks``, or has a bad weight.
    """
    split = [_split(prompt, tokenizer) for prompt in prompts]
    longest = max(range(len(split)), key=lambda index: len(split[index]))
    needed = len(split[longest])
    chunks = needed if chunks is None else chunks
    if chunks < needed:
        raise SettingsError(
            f"The prompt {shorten(prompts[longest], 60)!r} needs {needed} chunks of {tokenizer.model_max_length - 2} "
            f"tokens and chunks is {chunks}: set it to {needed} or more, or shorten the prompt."
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
    """Tokenise piece by piece, so that each token knows its weight, and break what is too long after a comma."""
    texts, weights = zip(*parse_weights(prompt), strict=True)
    *pieces, comma = tokenizer([*texts, ","], add_special_tokens=False, verbose=False).input_ids
    spread = multi_vector_tokens(tokenizer)
    tokens = [
        (each, weight)
        for piece, weight in zip(pieces, weights, strict=True)
        for token in piece
        for each in spread.get(token, [token])
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
    """Encode prompts, every chunk by itself and all of them in one call of the text encoder.

    Args:
        prompts: B prompts.
        tokenizer: the text encoder's; its ``model_max_length`` is L, 77 for Stable Diffusion.
        text_encoder: gives hidden states of width D; gradients flow if it is trained.
        chunks: how many chunks to give each prompt; by default as many as the longest one needs.

    Returns:
        ``encoder_hidden_states`` ``[B, chunks * L, D]`` in the text encoder's dtype.

    Raises:
        SettingsError: a prompt needs more than ``chunks`` or has a bad weight, or tokenizer and text encoder differ.
    """
    length, positions = tokenizer.model_max_length, text_encoder.config.max_position_embeddings
    if length > positions:
        raise SettingsError(
            f"The tokenizer's model_max_length is {length} and the text encoder reads {positions} tokens: "
            f"set model_max_length to {positions} in tokenizer_config.json."
        )
    tokens = tokenize(prompts, tokenizer, chunks)
    device = text_encoder.device
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)  # Stable Diffusion's encoders see the padding
    mask = tokens.attention_mask.flatten(0, 1).to(device) if use_mask else None
    hidden: Tensor = text_encoder(tokens.input_ids.flatten(0, 1).to(device), attention_mask=mask)[0]
    weights = tokens.weights.flatten(0, 1)
    if (weights != 1).any():
        hidden = apply_prompt_weights(hidden, weights.to(device))
    return hidden.to(text_encoder.dtype).reshape(len(prompts), -1, hidden.shape[-1])


def apply_prompt_weights(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiply hidden states by their tokens' weights and keep each chunk's mean.

    This is the convention of AUTOMATIC1111's web UI. Its ratio of means is meaningless where the mean is next to
    nothing, as in a text encoder that starts from random weights (its LayerNorm centres every token), or changes
    sign: such a chunk is only multiplied. A chunk whose weights are all one comes back as it was, to the bit.

    Args:
        hidden: ``[N, L, D]``, one chunk a row.
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
