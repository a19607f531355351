"""The one rule for transparency: what a model sees of an image, a control image or a mask that has an alpha channel.

| file                                 | becomes                                                                      |
|--------------------------------------|------------------------------------------------------------------------------|
| image, control image                 | RGB on white                                                                 |
| mask                                 | white where it is both white and opaque                                      |
| mask whose visible part has one colour | its alpha channel: strokes of any colour on nothing                        |
| photo to inpaint                     | on white for the model; outside the mask its own pixels and alpha are kept   |

It holds for RGBA, LA, palettes and PNG's ``tRNS``, wherever an image is read.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops


def on_white(image: Image.Image) -> Image.Image:
    """An image or control image as RGB, with its transparent parts on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def mask_levels(image: Image.Image) -> Image.Image:
    """A mask as greys of mode L; above half of white is masked."""
    if not image.has_transparency_data:
        return image.convert("L")
    rgba = image.convert("RGBA")
    alpha, grey = rgba.getchannel("A"), rgba.convert("RGB").convert("L")
    visible = np.asarray(grey)[np.asarray(alpha) > 0]
    if len(np.unique(np.asarray(alpha))) > 1 and visible.min() == visible.max():
        return alpha
    return ImageChops.darker(grey, alpha)
