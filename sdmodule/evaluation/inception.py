"""Features of the Inception network that FID is usually computed with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdmodule.errors import SettingsError, check_path
from sdmodule.io.redact import shorten_home

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""Name of the file that torch-fidelity publishes."""


class InceptionFeatures:
    """The 2,048 features before the last layer of the Inception v3 of Heusel et al. 2017, which published FIDs have.

    It is torch-fidelity's port, which also resizes as the original does. It needs that package and its file of weights;
    nothing is downloaded.

    Args:
        weights: path of ``weights-inception-2015-12-05-6726825d.pth``.
        device: where it computes.

    Raises:
        SettingsError: if the package or the file is missing, or it is another file.
    """

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu") -> None:
        check_path("inception", weights)
        file = Path(weights).expanduser()
        if not file.is_file():
            raise SettingsError(
                f"inception={weights}: not found; give the path of {WEIGHTS}, as torch-fidelity has it."
            )
        if find_spec("torch_fidelity") is None:
            raise SettingsError(f"inception={weights}: needs torch-fidelity; pip install 'sdmodule[fidelity]'.")
        self.name = f"Inception v3 ({shorten_home(str(weights))})"
        self.device = torch.device(device)
        try:
            torch.load(file, weights_only=True)  # torch-fidelity would run code that a file holds
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
        except Exception as error:  # torch's and torch-fidelity's, for a file of another kind
            raise SettingsError(
                f"inception={weights}: cannot be read ({' '.join(str(error).split())[:120]}); give {WEIGHTS}, as "
                "torch-fidelity has it."
            ) from error
        self.network = network.eval().to(self.device)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features ``[N, 2048]`` of N RGB images; the network resizes them to 299 pixels itself."""
        rows = [self._same_size(list(group)) for _, group in groupby(images, key=lambda image: image.size)]
        return torch.cat(rows)

    def _same_size(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        [features] = self.network(pixels.to(self.device))
        return features.float().cpu()
