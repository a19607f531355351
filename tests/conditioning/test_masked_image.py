"""Images and masks that cannot be used are refused with one sentence."""

import pytest
from PIL import Image

from sdmodule.conditioning.masked_image import pair_images_and_masks
from sdmodule.errors import SettingsError

IMAGE = Image.new("RGB", (32, 24), "teal")
MASK = Image.new("L", (32, 24), 255)


@pytest.mark.parametrize("side", [float("inf"), float("nan"), 1.5])
def test_a_box_needs_four_whole_numbers(side):
    with pytest.raises(SettingsError, match=rf"mask=\[0,0,{side},10\]: must be four whole numbers"):
        pair_images_and_masks(IMAGE, [0, 0, side, 10], 1)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(SettingsError, match="mask: 2 entries for 3 of image"):
        pair_images_and_masks([IMAGE] * 3, [MASK] * 2, 3)
    with pytest.raises(SettingsError, match="image: 3 entries for 2 prompts"):
        pair_images_and_masks([IMAGE] * 3, MASK, 2)


def test_a_transparent_image_without_a_mask_suggests_its_alpha_channel():
    with pytest.raises(SettingsError, match=r"mask\[1\]: missing; give one for image\[1\], .* or mask=alpha"):
        pair_images_and_masks([IMAGE.convert("RGBA")] * 2, [MASK, None], 2)


def test_folders_are_paired_by_name(tmp_path):
    for folder, names in (("images", "ab"), ("masks", "ab"), ("other", "ac")):
        (tmp_path / folder).mkdir()
        for name in names:
            (IMAGE if folder == "images" else MASK).save(tmp_path / folder / f"{name}.png")
    assert len(pair_images_and_masks(tmp_path / "images", tmp_path / "masks", 2)) == 2
    assert len(pair_images_and_masks(str(tmp_path / "images"), MASK, 2)) == 2
    with pytest.raises(SettingsError, match="b, c is in one of the folders only; name each mask as its image"):
        pair_images_and_masks(tmp_path / "images", tmp_path / "other", 2)
    (tmp_path / "none").mkdir()
    with pytest.raises(SettingsError, match=r"image=.*none: contains no images"):
        pair_images_and_masks(tmp_path / "none", MASK, 1)
