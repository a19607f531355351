"""Words learned by textual inversion (Gal et al. 2022, "An Image is Worth One Word")."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdmodule.errors import SettingsError

SEPARATOR = "\ue000"
"""Stands between a word and the number of its vector; private to this package, so that words stay apart."""


class ExtendedEmbedding(nn.Module):
    """Token embedding of a text encoder, extended by learned vectors.

    Args:
        words: the original embedding, left as it is.
        first: token id of the first learned vector.
        vectors: initial values of the learned vectors, ``[n, D]``.
    """

    def __init__(self, words: nn.Module, first: int, vectors: Tensor) -> None:
        super().__init__()
        self.words = words
        self.first = first
        self.learned = nn.Parameter(vectors.clone())

    @property
    def weight(self) -> Tensor:
        """The learned vectors; transformers reads dtype and device from here."""
        return self.learned

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[B, L, D]`` of token ids ``[B, L]``."""
        learned = F.embedding((tokens - self.first).clamp(min=0, max=len(self.learned) - 1), self.learned)
        original = self.words(tokens.clamp(max=self.first - 1))
        return torch.where((tokens >= self.first).unsqueeze(-1), learned.to(original.dtype), original)


def initial_vectors(text: str, count: int, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> Tensor:
    """Embeddings ``[count, D]`` of a text's tokens, repeated from the first if there are fewer than ``count``.

    Raises:
        SettingsError: for a text of no tokens, or of more than ``count``.
    """
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    if not 1 <= len(tokens) <= count:
        raise SettingsError(
            f"tuning.initializer={text}: has {len(tokens)} tokens for {count} vectors; give a text of 1 to {count} "
            "tokens, or raise tuning.vectors."
        )
    chosen = torch.tensor([tokens[k % len(tokens)] for k in range(count)], device=text_encoder.device)
    return text_encoder.get_input_embeddings()(chosen).detach().clone()


def add_word(
    placeholder: str, vectors: Tensor, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> ExtendedEmbedding:
    """Add a word to tokenizer and text encoder, in place: in a prompt, ``placeholder`` stands for all its vectors.

    Args:
        placeholder: the word, such as ``<my-cat>``.
        vectors: ``[n, D]``.
        tokenizer: receives one token for each vector; those after the first have names that no prompt contains.
        text_encoder: receives the vectors.

    Returns:
        The extended embedding, with the vectors as its parameter ``learned``.

    Raises:
        SettingsError: for a word that is in the vocabulary already, or that has characters of the prompt syntax.
    """
    if not re.fullmatch(r"[^\s():\\]+", placeholder):
        raise SettingsError(f"placeholder={placeholder}: cannot be one word of a prompt; give one such as <my-cat>.")
    names = [placeholder, *(f"{placeholder}{SEPARATOR}{k}" for k in range(1, len(vectors)))]
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name in vocabulary or f"{name.lower()}</w>" in vocabulary:
            raise SettingsError(
                f"placeholder={name}: already in the vocabulary; give a new word, such as <{name}-new>."
            )
    first = len(tokenizer)
    tokenizer.add_tokens(names)
    # with an old configuration, transformers takes the largest id for a prompt's end, and those of words are larger
    getattr(text_encoder, "text_model", text_encoder).eos_token_id = tokenizer.eos_token_id
    embedding = ExtendedEmbedding(text_encoder.get_input_embeddings(), first, vectors.to(text_encoder.device))
    text_encoder.set_input_embeddings(embedding)
    return embedding


def check_no_words(text_encoders: Iterable[nn.Module]) -> None:
    """Check that text encoders can be written as a checkpoint's: a learned word has a file of its own.

    Raises:
        SettingsError: if a word was added to one.
    """
    if any(isinstance(module, ExtendedEmbedding) for encoder in text_encoders for module in encoder.modules()):
        raise SettingsError(
            "adapters: a learned word is not written into a checkpoint; load the model without it, and give its file "
            "in adapters beside what you write."
        )


def multi_vector_tokens(tokenizer: CLIPTokenizer) -> dict[int, list[int]]:
    """Tokens of each learned word that has several vectors, by its first token."""
    added = tokenizer.get_added_vocab()
    words: dict[int, list[int]] = {}
    for name, token in sorted(added.items(), key=lambda item: item[1]):
        word, separator, _ = name.partition(SEPARATOR)
        if separator:
            words.setdefault(added[word], [added[word]]).append(token)
    return words
