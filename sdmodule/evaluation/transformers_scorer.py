"""Two-tower models of transformers as scorers: OpenAI's CLIP, SigLIP and their kin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdmodule.errors import SettingsError
from sdmodule.evaluation.clip_folder import EXAMPLE, read_clip
from sdmodule.io.redact import shorten_home

MOST = 3
"""Number of unknown words that are named."""


class TransformersScorer:
    """A CLIP-like model: Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), and what transformers reads as such.

    Args:
        place: a folder that transformers wrote, or a hub id such as ``openai/clip-vit-large-patch14``.
        device: where it computes, in float32.
        key: the setting that named it, for messages.

    Attributes:
        words: all words that it has learned, from ``words.txt`` in its folder; None for a model without that file.

    Raises:
        SettingsError: if there is no such model, or it is one of another kind.
    """

    def __init__(self, place: str | Path, device: str | torch.device = "cpu", key: str = "scorer") -> None:
        parts = read_clip(place, key)
        self.setting = f"{key}={place}"
        self.name = shorten_home(str(place))
        self.device = torch.device(device)
        self.model = parts.model.requires_grad_(False).to(self.device)
        self.tokenizer, self.image_processor, self.words = parts.tokenizer, parts.image_processor, parts.words
        text_config = self.model.config.get_text_config()
        # SigLIP has learned from texts padded to one length, without a mask over the padding
        self._fixed_length = self.model.config.model_type.startswith("siglip")
        self._length = text_config.max_position_embeddings

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features ``[N, D]`` of N RGB images, resized and cropped as the model's own processor does."""
        inputs = self.image_processor(images=list(images), return_tensors="pt").to(self.device)
        return _pooled(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features ``[N, D]`` of N texts; what is longer than the model reads, 77 tokens for CLIP, is cut off."""
        padding = "max_length" if self._fixed_length else True
        inputs = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self.device)
        if self._fixed_length:
            return _pooled(self.model.get_text_features(input_ids=inputs["input_ids"]))
        mask = inputs["attention_mask"]
        return _pooled(self.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=mask))

    def check_words(self, texts: Iterable[str]) -> None:
        """Check that the model knows all words of texts.

        Raises:
            SettingsError: if the model has a list of words, and one of the texts has others.
        """
        known = self.words
        if known is None:
            return
        words = (word for text in texts for word in re.findall(r"[^\W_]+", text.lower()))
        unknown = list(dict.fromkeys(word for word in words if word not in known and not word.isdigit()))
        if not unknown:
            return
        named = ", ".join(f'"{word}"' for word in unknown[:MOST]) + (" and others" if len(unknown) > MOST else "")
        raise SettingsError(
            f"{self.setting}: never saw {named}; it knows the words of its words.txt alone; write prompts in them, or "
            f"give a scorer such as {EXAMPLE}."
        )


def _pooled(output: Any) -> Tensor:
    """The features in what a model returns: a tensor in transformers 4, a named output in 5."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return features.float().cpu()
