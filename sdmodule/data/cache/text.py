"""Text embeddings of prompts as they are stored, and what they depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sdmodule.conditioning.text import chunks_of, encode_texts
from sdmodule.io.fingerprint import fingerprint, model_fingerprint

CAPTIONS_PER_BATCH = 64


def text_fingerprint(parts: Any) -> str:
    """The fingerprint of a model's text encoders and of their vocabularies."""
    made_by: list[str] = []
    for tokenizer, encoder in parts.text_encoders:
        vocabulary = fingerprint(tokenizer.model_max_length, sorted(tokenizer.get_vocab().items()))
        made_by += [model_fingerprint(encoder, encoder.config.to_dict()), vocabulary]
    return fingerprint(*made_by)


@torch.no_grad()
def embed_prompts(prompts: Sequence[str], parts: Any) -> Iterator[list[tuple[str, Tensor, Tensor | None]]]:
    """Prompts, each with its hidden states ``[chunks * 77, D]`` and pooled embedding ``[P]`` or None, in batches.

    All are on the CPU; a prompt has as many chunks as it needs.
    """
    for start in range(0, len(prompts), CAPTIONS_PER_BATCH):
        batch = prompts[start : start + CAPTIONS_PER_BATCH]
        text = encode_texts(batch, parts, chunks_of(batch, parts)).on(torch.device("cpu"))
        lengths = [chunks_of([prompt], parts) * parts.tokenizer.model_max_length for prompt in batch]
        pooled = [None] * len(batch) if text.pooled is None else text.pooled
        yield [
            (prompt, text.hidden_states[k, :length], pooled[k])
            for k, (prompt, length) in enumerate(zip(batch, lengths, strict=True))
        ]
