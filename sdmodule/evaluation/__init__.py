"""Measures of image quality: does an image show its prompt, and do images look like others?

Features come from a `Scorer`, which maps images and texts into one space, or from any `ImageFeatures`; the metrics are
functions of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdmodule.io.lazy import lazy_attribute

if TYPE_CHECKING:
    from sdmodule.evaluation.distances import cmmd, frechet_distance, kernel_distance
    from sdmodule.evaluation.figures import Evaluation, evaluate
    from sdmodule.evaluation.image_set import ImageSet, read_image_set
    from sdmodule.evaluation.inception import InceptionFeatures
    from sdmodule.evaluation.neighbours import Neighbourhood, neighbourhood
    from sdmodule.evaluation.scorer import ImageFeatures, Scorer
    from sdmodule.evaluation.text_image import clip_scores, prompt_ranks
    from sdmodule.evaluation.transformers_scorer import TransformersScorer

__all__ = [
    "Evaluation",
    "ImageFeatures",
    "ImageSet",
    "InceptionFeatures",
    "Neighbourhood",
    "Scorer",
    "TransformersScorer",
    "clip_scores",
    "cmmd",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "neighbourhood",
    "prompt_ranks",
    "read_image_set",
]

_MODULES = {
    **dict.fromkeys(("ImageFeatures", "Scorer"), "scorer"),
    **dict.fromkeys(("ImageSet", "read_image_set"), "image_set"),
    **dict.fromkeys(("Neighbourhood", "neighbourhood"), "neighbours"),
    **dict.fromkeys(("clip_scores", "prompt_ranks"), "text_image"),
    **dict.fromkeys(("cmmd", "frechet_distance", "kernel_distance"), "distances"),
    **dict.fromkeys(("Evaluation", "evaluate"), "figures"),
    "InceptionFeatures": "inception",
    "TransformersScorer": "transformers_scorer",
}


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
