"""Row 6: one rule for transparency, whoever reads the image: training, sampling, masks, control images, ``infer``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdmodule.conditioning.control import read_controls
from sdmodule.conditioning.masked_image import read_masked_image
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.io.transparency import mask_levels, on_white
from sdmodule.module import StableDiffusionModule
from tests.reported.drawing import BOX, SIDE, metadata, numbered, ramp, strokes

BLACK, WHITE, CLEAR = (0, 0, 0, 255), (255, 255, 255, 255), (0, 0, 0, 0)
WHITE_CLEAR = (255, 255, 255, 0)


def palette(ground: tuple[int, int, int], ink: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([*ground, *ink])
    image.paste(1, BOX)
    return image


def saved(image: Image.Image, file, **options):
    image.save(file, **options)
    return file


BOX_MASK = np.zeros((SIDE, SIDE), dtype=bool)
BOX_MASK[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True

MASKS = {
    "white on black": (strokes((0, 0, 0), (255, 255, 255)), {}),
    "white on nothing": (strokes(CLEAR, WHITE), {}),
    "white on white nothing": (strokes(WHITE_CLEAR, WHITE), {}),
    "black on nothing": (strokes(CLEAR, BLACK), {}),
    "black on white nothing": (strokes(WHITE_CLEAR, BLACK), {}),
    "grey and alpha": (strokes((0, 0), (255, 255)), {}),
    "dark grey and alpha": (strokes((255, 0), (0, 255)), {}),
    "red on nothing": (strokes(CLEAR, (255, 0, 0, 255)), {}),
    "palette": (palette((0, 0, 0), (255, 255, 255)), {"transparency": 0}),
    "palette, white hidden": (palette((255, 255, 255), (0, 0, 0)), {"transparency": 0}),
    "tRNS": (strokes((255, 0, 255), (255, 255, 255)), {"transparency": (255, 0, 255)}),
    "white and black, half hidden": (strokes((0, 0, 0, 255), WHITE), {}),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_the_same_in_training_and_sampling(tmp_path, kind):
    image, options = MASKS[kind]
    for file in numbered(tmp_path, 1).glob("*.txt"):
        file.unlink()
    file = saved(image, tmp_path / "mask.png", **options)
    sampled = read_masked_image(ramp(), str(file)).mask
    assert (np.asarray(sampled) > 0).tolist() == BOX_MASK.tolist()
    metadata(tmp_path, [{"file_name": "p0.png", "text": "a", "mask_file_name": "mask.png"}])
    data = ImageFolderDataModule(str(tmp_path), resolution=SIDE, val_fraction=0)
    data.setup()
    assert (data.train_set[0]["mask"][0] > 0).numpy().tolist() == BOX_MASK.tolist()
    with Image.open(file) as opened:
        for given in (opened.copy(), np.asarray(opened.convert("RGBA"))):
            assert read_masked_image(ramp(), given).mask.tobytes() == sampled.tobytes()


def test_what_is_hidden_by_alpha_is_no_mask():
    image = strokes((0, 0, 0, 255), WHITE)
    image.paste(WHITE_CLEAR, (0, 0, 10, 10))  # white, but transparent
    assert (np.asarray(mask_levels(image)) > 127).tolist() == BOX_MASK.tolist()


CONTROLS = {
    "black on nothing": (strokes(CLEAR, BLACK), {}),
    "black on white nothing": (strokes(WHITE_CLEAR, BLACK), {}),
    "grey and alpha": (strokes((0, 0), (0, 255)), {}),
    "palette": (palette((9, 9, 9), (0, 0, 0)), {"transparency": 0}),
    "tRNS": (strokes((255, 0, 255), (0, 0, 0)), {"transparency": (255, 0, 255)}),
}


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("kind", CONTROLS)
def test_strokes_of_a_control_image_are_seen_on_white(tmp_path, kind, edges):
    image, options = CONTROLS[kind]
    file = saved(image, tmp_path / "control.png", **options)
    [wanted] = read_controls(strokes((255, 255, 255), (0, 0, 0)), edges, 1)
    [found] = read_controls(str(file), edges, 1)
    assert wanted.getextrema() == ((0, 255),) * 3 and found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", CONTROLS)
def test_training_and_sampling_see_the_same_control_image(tmp_path, kind):
    image, options = CONTROLS[kind]
    for file in numbered(tmp_path, 1).glob("*.txt"):
        file.unlink()
    saved(image, tmp_path / "control.png", **options)
    metadata(tmp_path, [{"file_name": "p0.png", "text": "a", "conditioning_image_file_name": "control.png"}])
    data = ImageFolderDataModule(str(tmp_path), resolution=SIDE, val_fraction=0, conditioning="files")
    data.setup()
    [sampled] = read_controls(str(tmp_path / "control.png"), False, 1)
    trained = (data.train_set[0]["conditioning"] * 255).round().byte().permute(1, 2, 0).numpy()
    assert trained.tobytes() == sampled.tobytes()


@pytest.fixture
def photo() -> Image.Image:
    """A photo with a transparent corner, whose hidden pixels are red."""
    image = ramp(size=(32, 32)).convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 0, 8, 8))
    image.paste((0, 0, 255, 100), (0, 24, 8, 32))
    return image


@pytest.fixture
def inpainter(checkpoint) -> StableDiffusionModule:
    return StableDiffusionModule.from_pretrained(str(checkpoint), task="inpaint")


def test_a_photo_keeps_its_pixels_and_its_alpha_outside_the_mask(inpainter, photo):
    options = {"num_inference_steps": 1, "show_progress": False}
    [image] = inpainter.infer("a", photo, [16, 16, 28, 28], **options)["samples"]
    assert image.mode == "RGBA"
    outside = np.ones((32, 32), dtype=bool)
    outside[16:28, 16:28] = False
    assert np.array_equal(np.asarray(image)[outside], np.asarray(photo)[outside])
    assert (np.asarray(image)[16:28, 16:28, 3] == 255).all()
    [array] = inpainter.infer("a", photo, [16, 16, 28, 28], return_type="numpy", **options)["samples"]
    assert array.shape == (32, 32, 3)


def test_a_photo_whose_transparent_part_is_painted_is_opaque(inpainter, photo):
    photo.putalpha(photo.getchannel("A").point([0] * 50 + [255] * 206))
    [image] = inpainter.infer("a", photo, "alpha", num_inference_steps=1, show_progress=False)["samples"]
    assert image.mode == "RGB"


def test_the_model_sees_a_photo_on_white(inpainter, photo):
    """Its hidden pixels do not matter."""
    other = photo.copy()
    other.paste((0, 255, 0, 0), (0, 0, 8, 8))
    options = {"num_inference_steps": 1, "show_progress": False, "return_type": "tensor"}
    one, two, plain = (
        inpainter.infer("a", image, [4, 4, 28, 28], **options)["samples"] for image in (photo, other, on_white(photo))
    )
    assert torch.equal(one, two) and torch.equal(one, plain)
