"""Textual inversion: learn embeddings of a new word; the model stays frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lightning import Trainer

from sdmodule.components.checkpoint import Components
from sdmodule.components.folder_kinds import EMBEDDING_FILE
from sdmodule.components.learned_word_file import write_word
from sdmodule.components.learned_words import add_word, initial_vectors
from sdmodule.errors import SettingsError, check_int
from sdmodule.training.sharded_strategy import FullyShardedStrategy
from sdmodule.training.text_encoder import freeze_text_encoders


@dataclass(frozen=True)
class TextualInversion:
    """Learn the embeddings of a new word (Gal et al. 2022) and leave the model as it is.

    Args:
        placeholder: the new word as captions write it, such as ``<my-cat>``.
        initializer: a word or two to start from, such as ``cat``.
        vectors: number of token embeddings the word stands for.

    Raises:
        SettingsError: for a setting that is missing or out of range; in `prepare`, for a word that the tokenizer
            already has.
    """

    kind: ClassVar[str] = "textual_inversion"
    layouts: ClassVar[tuple[str, ...]] = ("diffusers",)
    usual_optimizer: ClassVar[dict[str, float]] = {"lr": 5e-3, "weight_decay": 0.0}  # a few vectors take large steps
    from_scratch: ClassVar[set[str]] = set()
    text_encoder_lr: ClassVar[None] = None

    placeholder: str
    initializer: str
    vectors: int = 1

    def __post_init__(self) -> None:
        for name in ("placeholder", "initializer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise SettingsError(f"tuning.{name}={value}: must be a word; give it in quotes.")
        check_int("tuning.vectors", self.vectors, maximum=75)

    def text_encoder_learns(self, step: int) -> bool:
        """Always: gradients reach the word's embeddings through the text encoder."""
        return True

    def check_trainer(self, trainer: Trainer | None) -> None:
        """Check that the trainer does not shard.

        Raises:
            SettingsError: if it does.
        """
        if trainer is not None and isinstance(trainer.strategy, FullyShardedStrategy):
            raise SettingsError(
                "tuning=textual_inversion: trains a few vectors, of which there is nothing to shard; use trainer=ddp."
            )

    def prepare(self, parts: Components, seed: int) -> None:
        """Add the word, and freeze everything but its embeddings.

        Raises:
            SettingsError: for a word that the tokenizer already has, or an initializer of more tokens than vectors.
        """
        parts.unet.requires_grad_(False)
        freeze_text_encoders(parts)
        for tokenizer, encoder in parts.text_encoders:
            vectors = initial_vectors(self.initializer, self.vectors, tokenizer, encoder)
            add_word(self.placeholder, vectors, tokenizer, encoder).learned.requires_grad_(True)

    def export(self, parts: Components, folder: str | Path, dtype: str, layout: str) -> None:
        """Write the embeddings, for ``load_textual_inversion`` of diffusers' pipelines and the web UIs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_word(self.placeholder, parts, folder / EMBEDDING_FILE, dtype)
