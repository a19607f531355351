"""CLIP-like models as transformers reads and writes them: two networks, a tokenizer, an image processor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdmodule.errors import SettingsError, check_path

EMBEDDED = "tiny-clip"
"""A small CLIP for renderings of things and shapes; its architecture and its tokenizer are shipped, weights are not."""

WEIGHTS = "model.safetensors"

ASSETS = Path(__file__).parents[1] / "components" / "assets"

EXAMPLE = "openai/clip-vit-large-patch14"
ADVICE = f"give the folder of a CLIP-like model, or a hub id such as {EXAMPLE}"

WORDS = "words.txt"
"""File of a model that knows certain words alone: one on each line."""


@dataclass(frozen=True)
class ClipFolder:
    """A CLIP-like model and what it reads with.

    Attributes:
        model: maps images and texts into one space; in float32 and evaluation mode.
        tokenizer: from texts to tokens.
        image_processor: from images to what the model takes.
        words: all words that it has learned; None for a model without such a list.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    words: frozenset[str] | None

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write a folder that transformers and `read_clip` read, with weights of ``dtype``."""
        folder = Path(folder)
        weights = {name: value.to(getattr(torch, dtype)) for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        self.tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for older readers
        self.image_processor.save_pretrained(folder)
        if self.words is not None:
            write_words(folder, self.words)


def write_words(folder: str | Path, words: Iterable[str]) -> None:
    """Write the list of all words that a model has learned."""
    (Path(folder) / WORDS).write_text("".join(f"{word}\n" for word in sorted(words)), encoding="utf-8")


def read_clip(place: str | Path, key: str = "scorer", scratch: bool = False) -> ClipFolder:
    """Read a CLIP-like model.

    Args:
        place: a folder that transformers wrote, a hub id, or ``tiny-clip``, which has no weights yet.
        key: the setting that named it, for messages.
        scratch: keep the architecture and start from random weights.

    Raises:
        SettingsError: if there is no such model, or it is one of another kind.
    """
    check_path(key, place)
    folder = ASSETS / EMBEDDED if place == EMBEDDED else Path(place).expanduser()
    setting = f"{key}={place}"
    if folder.is_dir() and not (folder / "config.json").is_file():
        kind = "is a diffusers checkpoint" if (folder / "model_index.json").is_file() else "has no config.json"
        raise SettingsError(f"{setting}: {kind}; {ADVICE}.")
    if folder.is_file() or (not folder.is_dir() and str(place).count("/") != 1):
        raise SettingsError(f"{setting}: {'is a file' if folder.is_file() else 'not found'}; {ADVICE}.")
    if place == EMBEDDED and not scratch and not (folder / WEIGHTS).is_file():
        raise SettingsError(f"{setting}: ships without weights; train.py experiment=tiny_clip makes them, or {ADVICE}.")
    words = folder / WORDS
    known = frozenset(words.read_text(encoding="utf-8").split()) if words.is_file() else None
    return ClipFolder(*_read(str(folder) if folder.is_dir() else str(place), setting, scratch), words=known)


def _read(location: str, setting: str, scratch: bool) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor.

    Raises:
        SettingsError: if one of them cannot be read.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        model = _model(location, setting, scratch)
        tokenizer, known = AutoTokenizer.from_pretrained(location), model.config.get_text_config().vocab_size
        if not known / 2 <= len(tokenizer) <= known:  # transformers makes an empty one up where its files are missing
            raise SettingsError(
                f"{setting}: its tokenizer has {len(tokenizer):,} tokens, and the model {known:,}; add the files "
                "of its tokenizer to the folder."
            )
        image_processor = AutoImageProcessor.from_pretrained(location, backend="pil")  # as CLIP was trained
    except SettingsError:
        raise
    except Exception as error:  # transformers raises many kinds, for a folder of another kind and without a network
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"{setting}: cannot be read ({reason}); give the folder of a CLIP-like model with its tokenizer and "
            f"preprocessor_config.json, or a hub id such as {EXAMPLE}."
        ) from error
    return model, tokenizer, image_processor


def _model(location: str, setting: str, scratch: bool) -> Any:
    from transformers import AutoConfig, AutoModel

    missing: list[str] = []
    if scratch:
        model = AutoModel.from_config(AutoConfig.from_pretrained(location))
    else:
        model, info = AutoModel.from_pretrained(location, output_loading_info=True, dtype=torch.float32)
        missing = info["missing_keys"]
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise SettingsError(
            f"{setting}: is a {type(model).__name__}, which does not map images and texts into one space; "
            f"give a CLIP-like model such as {EXAMPLE}."
        )
    if missing:
        raise SettingsError(f"{setting}: lacks weights, such as {min(missing)}; download it again.")
    return model.eval()
