"""Two-tower models of transformers as scorers: OpenAI's CLIP, SigLIP and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdmodule.errors import SettingsError, check_path
from sdmodule.io.redact import shorten_home

EXAMPLE = "openai/clip-vit-large-patch14"
ADVICE = f"give the folder of a CLIP-like model, or a hub id such as {EXAMPLE}"


class TransformersScorer:
    """A CLIP-like model: Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), and what transformers reads as such.

    Args:
        place: a folder that transformers wrote, or a hub id such as ``openai/clip-vit-large-patch14``.
        device: where it computes, in float32.

    Raises:
        SettingsError: if there is no such model, or it is one of another kind.
    """

    def __init__(self, place: str | Path, device: str | torch.device = "cpu") -> None:
        check_path("scorer", place)
        self.name = shorten_home(str(place))
        self.device = torch.device(device)
        self.model, self.tokenizer, self.image_processor = _load(str(Path(place).expanduser()), str(place))
        self.model.to(self.device)
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


def _pooled(output: Any) -> Tensor:
    """The features in what a model returns: a tensor in transformers 4, a named output in 5."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return features.float().cpu()


def _load(location: str, given: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor.

    Raises:
        SettingsError: if one of them cannot be read.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = Path(location)
    if folder.is_dir() and not (folder / "config.json").is_file():
        kind = "is a diffusers checkpoint" if (folder / "model_index.json").is_file() else "has no config.json"
        raise SettingsError(
            f"scorer={given}: {kind}; give the folder of a CLIP-like model, or a hub id such as {EXAMPLE}."
        )
    if folder.is_file() or (not folder.is_dir() and given.count("/") != 1):
        found = "is a file" if folder.is_file() else "not found"
        raise SettingsError(
            f"scorer={given}: {found}; give the folder of a CLIP-like model, or a hub id such as {EXAMPLE}."
        )
    try:
        model, info = AutoModel.from_pretrained(location, output_loading_info=True, dtype=torch.float32)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise SettingsError(
                f"scorer={given}: is a {type(model).__name__}, which does not map images and texts into one space; "
                f"give a CLIP-like model such as {EXAMPLE}."
            )
        if missing := info["missing_keys"]:
            raise SettingsError(f"scorer={given}: lacks weights, such as {min(missing)}; download it again.")
        tokenizer, known = AutoTokenizer.from_pretrained(location), model.config.get_text_config().vocab_size
        if not known / 2 <= len(tokenizer) <= known:  # transformers makes an empty one up where its files are missing
            raise SettingsError(
                f"scorer={given}: its tokenizer has {len(tokenizer):,} tokens, and the model {known:,}; add the files "
                "of its tokenizer to the folder."
            )
        image_processor = AutoImageProcessor.from_pretrained(location, backend="pil")  # as CLIP was trained
    except SettingsError:
        raise
    except Exception as error:  # transformers raises many kinds, for a folder of another kind and without a network
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"scorer={given}: cannot be read ({reason}); give the folder of a CLIP-like model with its tokenizer and "
            f"preprocessor_config.json, or a hub id such as {EXAMPLE}."
        ) from error
    return model.eval().requires_grad_(False), tokenizer, image_processor
