"""The metrics as functions of features: equal to torchmetrics, right on cases whose answer is known."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from sdmodule.errors import SettingsError
from sdmodule.evaluation import distances
from sdmodule.evaluation.bootstrap import Measured, mean_of, resampled_counts
from sdmodule.evaluation.distances import cmmd, frechet_distance, kernel_distance
from sdmodule.evaluation.neighbours import neighbourhood
from sdmodule.evaluation.text_image import clip_scores, prompt_ranks


class Pixels(nn.Module):
    """A feature extractor of our own: the pixels themselves."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1)


def two_sets(one=90, other=90, shift=0.3):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    return torch.randn(one, 12, generator=generator) @ mixing, torch.randn(other, 12, generator=generator) + shift


@pytest.mark.parametrize("counts", [(90, 60), (8, 60), (8, 10)], ids=["more images than features", "one", "none"])
def test_fid_is_that_of_torchmetrics(counts):
    one, other = two_sets(*counts)
    theirs = FrechetInceptionDistance(Pixels(), normalize=True).set_dtype(torch.float64)
    theirs.update(one.view(-1, 3, 2, 2).double(), real=True)
    theirs.update(other.view(-1, 3, 2, 2).double(), real=False)
    assert frechet_distance(one, other) == pytest.approx(float(theirs.compute()), abs=1e-3)


def test_kid_is_that_of_torchmetrics_over_all_images(monkeypatch):
    one, other = two_sets()
    theirs = KernelInceptionDistance(Pixels(), subsets=1, subset_size=len(one), normalize=True)
    theirs.update(one.view(-1, 3, 2, 2), real=True)
    theirs.update(other.view(-1, 3, 2, 2), real=False)
    expected = float(theirs.compute()[0])
    assert float(kernel_distance(one, other)) == pytest.approx(expected, abs=1e-3, rel=1e-5)
    monkeypatch.setattr(distances, "BLOCK", 7)
    assert float(kernel_distance(one, other)) == pytest.approx(expected, abs=1e-3, rel=1e-5)


def test_kid_of_unequal_numbers_is_unbiased():
    estimates = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        estimates.append(
            kernel_distance(torch.randn(6, 3, generator=generator), torch.randn(9, 3, generator=generator))
        )
    estimates = torch.cat(estimates)
    assert abs(float(estimates.mean())) < 2.5 * float(estimates.std()) / math.sqrt(len(estimates))


def test_cmmd_follows_the_papers_formula():
    one, other = two_sets(20, 30)
    x, y = (rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (one, other))

    def mean_kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / 200).mean()

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert float(cmmd(one, other)) == pytest.approx(float(expected), rel=1e-6)
    assert float(cmmd(one, 3 * one)) == pytest.approx(0, abs=1e-9)


def test_weights_count_images_as_often_as_they_are_drawn():
    one, other = two_sets(20, 30)
    counts, others = resampled_counts(20, 3, 0), resampled_counts(30, 3, 1)
    drawn, drawn_others = one.repeat_interleave(counts[:, 1].int(), 0), other.repeat_interleave(others[:, 1].int(), 0)
    assert len(drawn) == 20
    weighted = frechet_distance(one, other, counts[:, 1], others[:, 1])
    assert weighted == pytest.approx(frechet_distance(drawn, drawn_others), rel=1e-6)
    assert float(cmmd(one, other, counts, others)[1]) == pytest.approx(float(cmmd(drawn, drawn_others)), rel=1e-6)
    # copies of an image are not pairs, or resamples would be farther apart than the sets are
    resampled = kernel_distance(one, other, resampled_counts(20, 300, 0), resampled_counts(30, 300, 1))
    assert abs(float(resampled.mean() - kernel_distance(one, other))) < float(resampled.std()) / 3


def test_clip_score_is_two_and_a_half_times_the_positive_cosine():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, -1.0], [5.0, 0.0]])
    assert clip_scores(images, texts).tolist() == pytest.approx([2.5, 0.0, 2.5 / math.sqrt(2)])
    with pytest.raises(SettingsError, match="3 images and 2 prompts: give one prompt for each image"):
        clip_scores(images, texts[:2])


def test_ranks_count_the_prompts_that_are_nearer():
    texts = torch.eye(3)
    images = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.9, 0.5, 0.1], [1.0, 1.0, 1.0]])
    assert prompt_ranks(images, texts, torch.tensor([0, 1, 2, 0])).tolist() == [0, 1, 2, 2]  # ties count against it


def test_precision_and_recall_tell_apart_what_lacks_quality_from_what_lacks_variety():
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(40, 4, generator=generator), torch.randn(40, 4, generator=generator) + 50])
    one_kind = torch.randn(40, 4, generator=generator)
    far = torch.cat([one_kind, torch.randn(40, 4, generator=generator) - 50])
    narrow, poor = neighbourhood(one_kind, real), neighbourhood(far, real)
    assert narrow.precision.mean() > 0.8 and narrow.recall.mean() < 0.6 and narrow.coverage.mean() < 0.6
    assert poor.precision.mean() < 0.6 and poor.density.mean() < narrow.density.mean()
    same = neighbourhood(real, real)
    assert [float(figure.mean()) for figure in (same.precision, same.recall, same.coverage)] == [1, 1, 1]
    assert float(same.density.mean()) == pytest.approx(6 / 5)  # each point's ball holds itself and 5 others


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        values = torch.rand(40, generator=torch.Generator().manual_seed(seed))
        figure = mean_of(values, resampled_counts(40, 200, seed))
        covered += figure.low < 0.5 < figure.high
    assert 88 <= covered <= 99
    assert Measured.of(0.95, torch.tensor([0.8, 1.0]), (0, 1)).high == 1


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [((1, 4), (5, 4), "1 and 5 images: too few"), ((5, 4), (5, 3), "features of 4 and 3 numbers: not of one network")],
)
def test_sets_that_have_no_distance(one, other, message):
    for distance in (frechet_distance, kernel_distance, cmmd):
        with pytest.raises(SettingsError, match=message):
            distance(torch.zeros(one), torch.zeros(other))
    with pytest.raises(SettingsError, match="too few for precision and recall; give 6"):
        neighbourhood(torch.zeros(5, 2), torch.zeros(9, 2))
