"""Training a UNet to inpaint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sdmodule.components.inpaint_unet import convert_to_inpaint, is_inpaint_unet
from sdmodule.errors import SettingsError, check_bool, check_number


@dataclass(frozen=True)
class InpaintTraining:
    """How a UNet is trained to inpaint.

    Args:
        convert: widen a text-to-image UNet to nine input channels when training starts.
        full_mask_share: share of drawn masks that cover the whole image (Stable Diffusion's inpainting checkpoints
            were trained with 0.25).
        masked_area_weight: weight of the masked area in the loss, relative to the rest of the image.

    Raises:
        SettingsError: for a value out of range.
    """

    convert: bool = False
    full_mask_share: float = 0.25
    masked_area_weight: float = 1.0

    def __post_init__(self) -> None:
        check_bool("training.inpaint.convert", self.convert)
        check_number("training.inpaint.full_mask_share", self.full_mask_share, minimum=0, maximum=1)
        check_number("training.inpaint.masked_area_weight", self.masked_area_weight, above=0)

    def prepare(self, unet: Any, source: str, tuning: Any) -> None:
        """Widen the UNet if it takes no mask yet.

        Args:
            unet: a ``UNet2DConditionModel``.
            source: the checkpoint's name, for messages.
            tuning: what is trained; see `training.tuning`.

        Raises:
            SettingsError: if the UNet takes no mask and may not be widened.
        """
        if is_inpaint_unet(unet):
            return
        if not self.convert:
            raise SettingsError(
                f"pretrained={source}: its UNet takes {unet.config.in_channels} channels and no mask; set "
                "training.inpaint.convert=true to widen it, or give an inpainting checkpoint."
            )
        if "unet" not in tuning.from_scratch:
            raise SettingsError(
                "training.inpaint.convert=true: adds channels that need training, which "
                f"tuning={tuning.kind} leaves out; use tuning=full."
            )
        convert_to_inpaint(unet)

    def restore(self, unet: Any) -> None:
        """Widen the UNet as its training did, to load that training's weights."""
        if self.convert and not is_inpaint_unet(unet):
            convert_to_inpaint(unet)

    def __str__(self) -> str:
        return ", ".join(f"training.inpaint.{name}={value}" for name, value in asdict(self).items())
