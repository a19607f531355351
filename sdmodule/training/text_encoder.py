"""How the text encoder learns beside the UNet."""

from __future__ import annotations

from dataclasses import dataclass

from sdmodule.errors import SettingsError
from sdmodule.ranges import check_flag, check_whole


@dataclass(frozen=True)
class TextEncoderTraining:
    """Whether and how the text encoder learns beside the UNet.

    Args:
        text_encoder: train it too.
        text_encoder_lr: its learning rate; that of the UNet if None.
        text_encoder_stop: optimizer step from which on it stays as it is; None trains it to the end.

    Raises:
        SettingsError: for a value out of range, and for settings of a text encoder that is not trained.
    """

    text_encoder: bool = False
    text_encoder_lr: float | None = None
    text_encoder_stop: int | None = None

    def __post_init__(self) -> None:
        check_flag("tuning.text_encoder", self.text_encoder)
        for name in ("text_encoder_lr", "text_encoder_stop"):
            value = getattr(self, name)
            if value is not None and not self.text_encoder:
                raise SettingsError(
                    f"tuning.{name}={value} was given and the text encoder is not trained; set "
                    "tuning.text_encoder=true, or leave it out."
                )
        rate, stop = self.text_encoder_lr, self.text_encoder_stop
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e3):
            raise SettingsError(f"tuning.text_encoder_lr={rate} is not allowed; give a number over 0.")
        if stop is not None:
            check_whole("tuning.text_encoder_stop", stop)

    def text_encoder_learns(self, step: int) -> bool:
        """Whether the text encoder is still trained at an optimizer step, counted from 0."""
        return self.text_encoder and (self.text_encoder_stop is None or step < self.text_encoder_stop)
