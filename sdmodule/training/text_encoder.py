"""Settings for training the text encoder together with the UNet."""

from __future__ import annotations

from dataclasses import dataclass

from sdmodule.errors import SettingsError, check_bool, check_int, check_number


@dataclass(frozen=True)
class TextEncoderTraining:
    """Whether and how the text encoder is trained together with the UNet.

    Args:
        text_encoder: train the text encoder too.
        text_encoder_lr: its learning rate; that of the UNet if None.
        text_encoder_stop: optimizer step from which on it is frozen; None trains it to the end.

    Raises:
        SettingsError: for a value out of range, and for settings of a text encoder that is not trained.
    """

    text_encoder: bool = False
    text_encoder_lr: float | None = None
    text_encoder_stop: int | None = None

    def __post_init__(self) -> None:
        check_bool("tuning.text_encoder", self.text_encoder)
        for name in ("text_encoder_lr", "text_encoder_stop"):
            value = getattr(self, name)
            if value is not None and not self.text_encoder:
                raise SettingsError(
                    f"tuning.{name}={value}: the text encoder is not trained; set tuning.text_encoder=true, or leave "
                    f"{name} out."
                )
        if self.text_encoder_lr is not None:
            check_number("tuning.text_encoder_lr", self.text_encoder_lr, above=0, below=1000)
        if self.text_encoder_stop is not None:
            check_int("tuning.text_encoder_stop", self.text_encoder_stop)

    def text_encoder_learns(self, step: int) -> bool:
        """Whether the text encoder is trained at an optimizer step, counted from 0."""
        return self.text_encoder and (self.text_encoder_stop is None or step < self.text_encoder_stop)
