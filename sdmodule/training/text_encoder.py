"""Settings for training text encoders together with the UNet."""

from __future__ import annotations

from dataclasses import dataclass

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError, check_bool, check_int, check_number


def freeze_text_encoders(parts: Components) -> None:
    """Freeze all text encoders, in evaluation mode."""
    for _, encoder in parts.text_encoders:
        encoder.eval().requires_grad_(False)


def freeze_unused(parts: Components) -> None:
    """Freeze the layers of text encoders that nothing depends on: DDP would wait for their gradients."""
    for name in parts.family.text_encoders.values():
        for layer in parts.family.unused_layers(name, getattr(parts, name)):
            layer.requires_grad_(False)


@dataclass(frozen=True)
class TextEncoderTraining:
    """Whether and how text encoders are trained together with the UNet.

    Args:
        text_encoder: train the text encoder too.
        text_encoder_2: train the second text encoder of a model that has two; as ``text_encoder`` if None.
        text_encoder_lr: learning rate of text encoders; that of the UNet if None.
        text_encoder_stop: optimizer step from which on they are frozen; None trains them to the end.

    Raises:
        SettingsError: for a value out of range, and for settings of text encoders that are not trained.
    """

    text_encoder: bool = False
    text_encoder_2: bool | None = None
    text_encoder_lr: float | None = None
    text_encoder_stop: int | None = None

    def __post_init__(self) -> None:
        check_bool("tuning.text_encoder", self.text_encoder)
        if self.text_encoder_2 is not None:
            check_bool("tuning.text_encoder_2", self.text_encoder_2)
        for name in ("text_encoder_lr", "text_encoder_stop"):
            value = getattr(self, name)
            if value is not None and not self._chosen:
                raise SettingsError(
                    f"tuning.{name}={value}: the text encoder is not trained; set tuning.text_encoder=true, or leave "
                    f"{name} out."
                )
        if self.text_encoder_lr is not None:
            check_number("tuning.text_encoder_lr", self.text_encoder_lr, above=0, below=1000)
        if self.text_encoder_stop is not None:
            check_int("tuning.text_encoder_stop", self.text_encoder_stop)

    @property
    def _chosen(self) -> set[str]:
        """Names of the text encoders to train, of which a model may lack the second."""
        second = self.text_encoder if self.text_encoder_2 is None else self.text_encoder_2
        return {name for name, chosen in (("text_encoder", self.text_encoder), ("text_encoder_2", second)) if chosen}

    def choose_text_encoders(self, parts: Components) -> set[str]:
        """Names of a model's text encoders that are trained.

        Raises:
            SettingsError: if the second is to be trained of a model that has one.
        """
        if self.text_encoder_2 and "text_encoder_2" not in parts.networks:
            raise SettingsError(
                f"tuning.text_encoder_2=true: pretrained={parts.source} has one text encoder; use "
                "tuning.text_encoder=true, or leave it out."
            )
        return self._chosen & parts.networks.keys()

    def text_encoder_learns(self, step: int) -> bool:
        """Whether text encoders are trained at an optimizer step, counted from 0."""
        return bool(self._chosen) and (self.text_encoder_stop is None or step < self.text_encoder_stop)
