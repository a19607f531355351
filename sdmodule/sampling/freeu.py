"""FreeU: weaker skip connections and stronger backbone features in the decoder of a UNet, for free (Si et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sdmodule.errors import check_number


@dataclass(frozen=True)
class FreeU:
    """Factors of the first two stages of the decoder; 1 changes nothing.

    The paper's repository recommends ``s1=0.9, s2=0.2, b1=1.2, b2=1.4`` for Stable Diffusion 1.x,
    ``s1=0.9, s2=0.2, b1=1.1, b2=1.2`` for 2.x and ``s1=0.6, s2=0.4, b1=1.1, b2=1.2`` for XL.

    Args:
        s1: factor of the low frequencies of the first stage's skip connections.
        s2: of the second stage's.
        b1: factor of half of the channels of the first stage's backbone.
        b2: of the second stage's.

    Raises:
        SettingsError: for a value out of range.
    """

    s1: float = 1.0
    s2: float = 1.0
    b1: float = 1.0
    b2: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_number(f"freeu.{name}", value, minimum=0, maximum=10)


@contextmanager
def freeu_applied(unet: Any, freeu: FreeU | None) -> Iterator[None]:
    """Scale the features of a ``UNet2DConditionModel`` inside a ``with`` block; nothing is changed without FreeU."""
    if freeu is None:
        yield
        return
    unet.enable_freeu(**asdict(freeu))
    try:
        yield
    finally:
        unet.disable_freeu()
