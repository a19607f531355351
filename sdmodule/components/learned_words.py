"""Words that a text encoder learned later (Gal et al. 2022, "An Image is Worth One Word")."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdmodule.errors import SettingsError

EMBEDDING_FILE = "learned_embeds.safetensors"
"""File that diffusers looks for in a folder."""


class LearnedWords(nn.Module):
    """The embedding of a text encoder with more words behind its own.

    Args:
        words: the embedding, which stays as it is.
        first: token of the first new word.
        vectors: of the new words, ``[n, D]``.
    """

    def __init__(self, words: nn.Module, first: int, vectors: Tensor) -> None:
        super().__init__()
        self.words = words
        self.first = first
        self.learned = nn.Parameter(vectors.clone())

    @property
    def weight(self) -> Tensor:
        """The vectors of the new words, which tell others dtype and device."""
        return self.learned

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors of tokens ``[B, L]``: ``[B, L, D]``."""
        new = F.embedding((tokens - self.first).clamp(min=0, max=len(self.learned) - 1), self.learned)
        old = self.words(tokens.clamp(max=self.first - 1))
        return torch.where((tokens >= self.first).unsqueeze(-1), new.to(old.dtype), old)


def vectors_of(text: str, count: int, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> Tensor:
    """The vectors of a text's tokens, again from the first where there are fewer than ``count``: ``[count, D]``.

    Raises:
        SettingsError: for a text of more tokens.
    """
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    if not 1 <= len(tokens) <= count:
        raise SettingsError(
            f"{text!r} has {len(tokens)} tokens and {count} vectors should start from them; give a text of 1 to "
            f"{count} tokens, or more vectors."
        )
    chosen = torch.tensor([tokens[k % len(tokens)] for k in range(count)], device=text_encoder.device)
    return text_encoder.get_input_embeddings()(chosen).detach().clone()


def add_word(placeholder: str, vectors: Tensor, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> LearnedWords:
    """Teach a model a word, in place: ``placeholder`` in a prompt stands for all of its vectors.

    Args:
        placeholder: the word, such as ``<my-cat>``.
        vectors: ``[n, D]``.
        tokenizer: gets a token for each vector: ``<my-cat>``, ``<my-cat>_1``, …
        text_encoder: gets the vectors.

    Returns:
        The embedding, with the vectors as its parameter ``learned``.

    Raises:
        SettingsError: for a word that the model has, or that a prompt could not hold.
    """
    if not re.fullmatch(r"[^\s():\\]+", placeholder):
        raise SettingsError(f"{placeholder!r} cannot stand in a prompt as one word; give one such as <my-cat>.")
    names = [placeholder, *(f"{placeholder}_{k}" for k in range(1, len(vectors)))]
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name in vocabulary or f"{name.lower()}</w>" in vocabulary:
            raise SettingsError(f"{name} is a word that the model has already; give a new one, such as <{name}-new>.")
    first = len(tokenizer)
    tokenizer.add_tokens(names)
    embedding = LearnedWords(text_encoder.get_input_embeddings(), first, vectors.to(text_encoder.device))
    text_encoder.set_input_embeddings(embedding)
    return embedding


def tokens_of_words(tokenizer: CLIPTokenizer) -> dict[int, list[int]]:
    """For the first token of each learned word of several vectors, the tokens of all of them."""
    added = tokenizer.get_added_vocab()
    spread = {}
    for name, token in added.items():
        others = [added[f"{name}_{k}"] for k in range(1, len(added)) if f"{name}_{k}" in added]
        if others:
            spread[token] = [token, *others]
    return spread
