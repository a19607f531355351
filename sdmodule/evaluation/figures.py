"""All figures of a set of images: how well it shows its prompts, and how near it is to another set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdmodule.errors import SettingsError, check_int, check_seed, count_of
from sdmodule.evaluation.bootstrap import Measured, mean_of, resampled_counts
from sdmodule.evaluation.distances import cmmd, frechet_distance, kernel_distance
from sdmodule.evaluation.image_set import ImageSet
from sdmodule.evaluation.neighbours import NEAREST, neighbourhood
from sdmodule.evaluation.scorer import ImageFeatures, Scorer, features_of, features_of_texts
from sdmodule.evaluation.text_image import WEIGHT, clip_scores, prompt_ranks
from sdmodule.evaluation.transformers_scorer import TransformersScorer
from sdmodule.io.progress import LONG_TASK, Progress

FRECHET_RESAMPLES = 30
"""Resamples for the Fréchet distance, each of which takes an eigendecomposition: a standard error to within 13%."""

TOP = (1, 5)
"""The k of retrieval's top-k accuracies."""

SHARE, POSITIVE = (0.0, 1.0), (0.0, math.inf)
"""Ranges of figures."""


@dataclass
class Evaluation:
    """The figures of a set of images.

    Attributes:
        about: what was compared with what, and how.
        metrics: the figures, by name.
        notes: what limits them, or why one is missing; sentences.
    """

    about: dict[str, Any]
    metrics: dict[str, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        metrics = {name: figure.plain() for name, figure in self.metrics.items()}
        return {**self.about, "metrics": metrics, "notes": self.notes}


def evaluate(
    images: ImageSet,
    scorer: Scorer,
    against: ImageSet | None = None,
    distance_features: ImageFeatures | None = None,
    *,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    show_progress: bool = False,
) -> Evaluation:
    """Score images, and compare them with others.

    In memory are the features of all images, and a batch of the images.

    Args:
        images: what to score.
        scorer: scores images with their prompts.
        against: other images: real ones, or those of another run, whose score is then compared too.
        distance_features: what distances between sets are taken of; the features of ``scorer`` if None.
        batch_size: images per call of a network.
        resamples: bootstrap resamples, for the intervals.
        seed: of the resamples.
        device: where distances are computed.
        show_progress: whether progress is shown.

    Raises:
        SettingsError: if the images have no prompts and there is nothing to compare them with, one cannot be read, a
            number is out of range, or the prompts have words that the scorer has not learned.
    """
    check_int("batch_size", batch_size)
    check_int("resamples", resamples, minimum=2)
    check_seed("seed", seed)
    if images.prompts is None and against is None:
        raise SettingsError(
            f"{images.setting}: its images have no prompts; give a predict run, or against=FOLDER to compare images "
            "alone."
        )
    if isinstance(scorer, TransformersScorer):
        scorer.check_words((*(images.prompts or ()), *(against.prompts or () if against else ())))
    about = {"run": images.name, "images": len(images), "scorer": scorer.name}
    result = Evaluation(about | {"resamples": resamples, "confidence": 0.95, "seed": seed})
    extractors = [scorer] if distance_features is None else [scorer, distance_features]
    mine = _encode(images, extractors, batch_size, resamples, seed, show_progress)
    scores = None
    if images.prompts is None:
        result.notes.append("The images have no prompts, so there is no text-image score.")
    else:
        scores = _score_prompts(images.prompts, mine, scorer, batch_size, result)
    if against is None:
        return result
    result.about |= {"against": against.name, "against_images": len(against), "distances_by": extractors[-1].name}
    other = _encode(against, extractors, batch_size, resamples, seed ^ 1, show_progress)
    if scores is not None and against.prompts is not None:
        texts = features_of_texts(against.prompts, scorer, batch_size)
        paired = images.is_paired_with(against)
        _compare_scores(scores, clip_scores(other.features[0], texts), mine, other, paired, result)
    _compare_sets(mine.to(device), other.to(device), result)
    if distance_features is None and len(images) > 1 < len(against):
        result.notes.append("FID and KID are of the scorer's features, so they do not compare with published ones.")
    if getattr(scorer, "words", None) is not None:
        result.notes.append(
            f"{scorer.name} has learned the words of its words.txt alone: its distances between other images mean "
            "little."
        )
    return result


@dataclass(frozen=True)
class _Encoded:
    """A set of images as the metrics know it.

    Attributes:
        features: ``[N, D]`` by the scorer, and by the network that distances are taken of.
        counts: how often each image is drawn in each resample, ``[N, B]``.
    """

    features: list[Tensor]
    counts: Tensor

    def to(self, device: str | torch.device) -> _Encoded:
        return _Encoded([features.to(device) for features in self.features], self.counts.to(device))

    def weights(self) -> Tensor:
        """The counts after a first column in which each image counts once, ``[N, 1 + B]``."""
        return torch.cat([torch.ones_like(self.counts[:, :1]), self.counts], dim=1)


def _encode(
    images: ImageSet, extractors: list[Any], batch_size: int, resamples: int, seed: int, show_progress: bool
) -> _Encoded:
    features = features_of(_watched(images, show_progress), extractors, batch_size)
    return _Encoded(features, resampled_counts(len(images), resamples, seed))


def _watched(images: ImageSet, show: bool) -> Iterator[Image.Image]:
    """The images, with the progress through them."""
    bar = Progress(f"images of {images.name}", len(images), "images", show=show, delay=LONG_TASK, leave=False)
    try:
        for done, image in enumerate(images):
            bar.update(done)
            yield image
    finally:
        bar.close()


def _score_prompts(
    prompts: Sequence[str], images: _Encoded, scorer: Scorer, batch_size: int, result: Evaluation
) -> Tensor:
    """Text-image score and retrieval; returns the score of each image, ``[N]``."""
    distinct = list(dict.fromkeys(prompts))
    place = {prompt: k for k, prompt in enumerate(distinct)}
    own = torch.tensor([place[prompt] for prompt in prompts])
    texts = features_of_texts(distinct, scorer, batch_size)
    scores = clip_scores(images.features[0], texts[own])
    result.about["prompts"] = len(distinct)
    result.metrics["clip_score"] = mean_of(scores, images.counts, (0.0, WEIGHT))
    ranks = prompt_ranks(images.features[0], texts, own)
    for top in TOP:
        if len(distinct) > top:
            result.metrics[f"retrieval_top{top}"] = mean_of(ranks < top, images.counts, SHARE)
        else:
            result.notes.append(
                f"retrieval_top{top} needs more than {count_of(top, 'prompt')}; there {_are(distinct)}."
            )
    return scores


def _are(distinct: Sequence[str]) -> str:
    return "is 1" if len(distinct) == 1 else f"are {len(distinct)}"


def _compare_scores(
    scores: Tensor, others: Tensor, images: _Encoded, against: _Encoded, paired: bool, result: Evaluation
) -> None:
    """The score of the other run, and the difference: of each image with its counterpart, where it has one."""
    result.metrics["clip_score_against"] = mean_of(others, against.counts, (0.0, WEIGHT))
    if paired:
        result.metrics["clip_score_difference"] = mean_of(scores - others, images.counts)
        return
    mine, theirs = (means.double() / len(means) for means in (images.counts, against.counts))
    resampled = scores @ mine - others @ theirs
    result.metrics["clip_score_difference"] = Measured.of(float(scores.mean() - others.mean()), resampled)
    result.notes.append(
        f"The {len(scores):,} and {len(others):,} images are not of the same prompts and seeds, so the difference of "
        "their scores is less certain than it could be."
    )


def _compare_sets(images: _Encoded, against: _Encoded, result: Evaluation) -> None:
    """Distances between the sets, and how far one lies within the other."""
    one, other = images.features[-1], against.features[-1]
    few, length = min(len(one), len(other)), one.shape[1]
    if few < 2:
        result.notes.append(
            f"FID, KID and CMMD need at least 2 images on each side; there are {len(one)} and {len(other)}."
        )
        return
    resampled = [
        frechet_distance(one, other, weights, others)
        for weights, others in zip(
            images.counts.T[:FRECHET_RESAMPLES], against.counts.T[:FRECHET_RESAMPLES], strict=True
        )
    ]
    result.metrics["fid"] = Measured.of(frechet_distance(one, other), torch.tensor(resampled), POSITIVE)
    if few <= length:
        result.notes.append(
            f"FID is of {few:,} images and {length:,} features: it needs more images than features, better ten times "
            "as many, and is far too large with fewer; compare it between equal numbers only, or take KID."
        )
    weights, others = images.weights(), against.weights()
    kid = kernel_distance(one, other, weights, others)
    result.metrics["kid"] = Measured.of(float(kid[0]), kid[1:])
    distance = cmmd(images.features[0], against.features[0], weights, others)
    result.metrics["cmmd"] = Measured.of(float(distance[0]), distance[1:], POSITIVE)
    if few <= NEAREST:
        result.notes.append(f"Precision, recall, density and coverage need more than {NEAREST} images on each side.")
        return
    places = neighbourhood(one, other)
    result.metrics |= {
        "precision": mean_of(places.precision, images.counts, SHARE),
        "recall": mean_of(places.recall, against.counts, SHARE),
        "density": mean_of(places.density, images.counts, POSITIVE),
        "coverage": mean_of(places.coverage, against.counts, SHARE),
    }
