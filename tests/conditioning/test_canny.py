"""Edges equal those of OpenCV, to the pixel."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from sdmodule.conditioning.canny import canny_edges


def mixed_image(seed: int, height: int, width: int) -> np.ndarray:
    """Noise, smoothed in integers so that it is the same on every machine, with a box in it."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.int64)
    for _ in range(2):
        noise = (2 * noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) // 4
    noise[height // 4 : height // 2, width // 3 : width // 2] = (250, 30, 90)
    return noise.astype(np.uint8)


@pytest.mark.parametrize(
    ("seed", "height", "width", "digest"),
    # of cv2.Canny(image, 100, 200), opencv-python-headless 5.0.0
    [(0, 64, 64, "0f72ab2a4aac70bd"), (1, 37, 90, "8e677fc63aca32a8"), (2, 120, 75, "22cc51e0b8b5f2b6")],
)
def test_edges_equal_those_of_opencv(seed, height, width, digest):
    edges = np.asarray(canny_edges(Image.fromarray(mixed_image(seed, height, width))))
    assert edges.shape == (height, width, 3) and set(np.unique(edges)) == {0, 255}
    assert (edges[..., 0] == edges[..., 1]).all() and (edges[..., 0] == edges[..., 2]).all()
    assert hashlib.sha256(edges[..., 0].tobytes()).hexdigest()[:16] == digest


def test_an_image_of_one_colour_has_no_edges():
    assert not np.asarray(canny_edges(Image.new("RGB", (20, 30), "teal"))).any()
