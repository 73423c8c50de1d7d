"""Calibration, measures by class and class priors: by hand, and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score

from allnc.metrics import adjust_prior, calibration_error, per_class

CONFIDENCE = torch.tensor([0.2, 0.5, 0.55, 0.9, 1.0])
RIGHT = torch.tensor([False, True, False, True, True])


def test_equal_width_by_hand() -> None:
    """Two bins: (0, 0.5] has confidences 0.2, 0.5 and one right, gap |0.7 - 1|; (0.5, 1] has 2.45 and two, gap 0.45."""
    assert calibration_error(CONFIDENCE, RIGHT, bins=2) == pytest.approx(100 * (0.3 + 0.45) / 5, rel=1e-6)


def test_equal_mass_by_hand() -> None:
    """Five bins of one image each: 0.2, 0.5, 0.55, 0.1 and 0; four images in two bins: 0.3 and 0.45."""
    assert calibration_error(CONFIDENCE, RIGHT, bins=5, equal_mass=True) == pytest.approx(27.0, rel=1e-6)
    four = calibration_error(CONFIDENCE[:4], RIGHT[:4], bins=2, equal_mass=True)
    assert four == pytest.approx(100 * (0.3 + 0.45) / 4, rel=1e-6)


def test_a_bin_of_one_width_divides_into_bins_of_equal_mass() -> None:
    """Overconfident and underconfident images cancel in one bin of width 1/15, not in bins of equal mass."""
    confidence = torch.tensor([0.95] * 10 + [0.99] * 10)
    right = torch.tensor([True] * 10 + [True] * 9 + [False])
    assert calibration_error(confidence, right, equal_mass=True, bins=2) == pytest.approx(100 * (0.5 + 0.9) / 20)
    assert calibration_error(confidence, right) == pytest.approx(100 * abs(19.4 - 19) / 20)


@pytest.mark.parametrize("equal_mass", [False, True])
def test_the_order_of_the_images_does_not_matter(equal_mass: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = (torch.rand(1000, generator=generator) * 20).round() / 20  # many are alike
    right = torch.rand(1000, generator=generator) < confidence
    order = torch.randperm(1000, generator=generator)
    first = calibration_error(confidence, right, equal_mass=equal_mass)
    again = calibration_error(confidence[order], right[order], equal_mass=equal_mass)
    assert first == pytest.approx(again, rel=1e-9)
    assert 0 < first < 10


@pytest.mark.parametrize("equal_mass", [False, True])
def test_an_image_of_weight_two_is_two_images(equal_mass: bool) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0])
    repeated = torch.repeat_interleave(torch.arange(5), weight.long())
    want = calibration_error(CONFIDENCE[repeated], RIGHT[repeated], bins=3, equal_mass=equal_mass)
    got = calibration_error(CONFIDENCE, RIGHT, bins=3, equal_mass=equal_mass, weight=weight)
    assert got == pytest.approx(want, rel=1e-9) and want > 0


def test_by_class_against_scikit_learn() -> None:
    """Class 5 has no image and is predicted, class 6 has one and is not, class 7 has neither."""
    generator = np.random.default_rng(1)
    labels, predictions = generator.integers(0, 5, 200), generator.integers(0, 6, 200)
    labels[0] = 6
    ours = per_class(torch.from_numpy(predictions), torch.from_numpy(labels), 8)
    there = np.unique(labels)
    options = {"labels": there, "average": None, "zero_division": 0.0}
    assert ours.recall[there].numpy() == pytest.approx(recall_score(labels, predictions, **options))
    assert ours.precision[there].nan_to_num(0).numpy() == pytest.approx(precision_score(labels, predictions, **options))
    assert ours.f1[there].numpy() == pytest.approx(f1_score(labels, predictions, **options))
    macro = f1_score(labels, predictions, labels=there, average="macro")
    assert ours.macro_f1 == pytest.approx(macro)
    assert ours.recall[[5, 7]].isnan().all() and ours.precision[[6, 7]].isnan().all() and ours.f1[[5, 7]].isnan().all()

    weight = generator.random(200)
    weighted = per_class(torch.from_numpy(predictions), torch.from_numpy(labels), 8, torch.from_numpy(weight))
    want = f1_score(labels, predictions, labels=there, average="macro", sample_weight=weight)
    assert weighted.macro_f1 == pytest.approx(want) and want != macro


def test_the_most_frequent_wrong_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3])
    predictions = torch.tensor([2, 1, 2, 0, 3, 0, 2, 1, 1])
    ours = per_class(predictions, labels, 5)
    assert ours.confused_with.tolist() == [2, 0, -1, 1, -1]  # of class 1, 0 and 3 are level: the first
    assert ours.confused.tolist() == [2, 1, 0, 2, 0]


def test_adjusted_logits_are_bayes_under_the_other_prior() -> None:
    """Two classes with known likelihoods of three pictures; posteriors under one prior become those under another."""
    likelihood = torch.tensor([[0.7, 0.1], [0.2, 0.3], [0.1, 0.6]], dtype=torch.float64)  # [picture, class]
    train, wanted = torch.tensor([0.9, 0.1]), torch.tensor([3.0, 1.0])
    logits = (likelihood * train).log() + 5  # posterior up to a constant
    want = likelihood * torch.tensor([0.75, 0.25])
    got = adjust_prior(logits, train, wanted).softmax(1)
    torch.testing.assert_close(got, want / want.sum(1, keepdim=True), rtol=1e-6, atol=0)
    assert adjust_prior(logits, train, torch.tensor([0.0, 1.0])).softmax(1)[:, 1].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(adjust_prior(logits, train, train), logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration_error(CONFIDENCE, RIGHT[:3]), "same shape"),
        (lambda: calibration_error(CONFIDENCE[:0], RIGHT[:0]), "N >= 1"),
        (lambda: calibration_error(CONFIDENCE + 0.5, RIGHT), r"in \[0, 1\]"),
        (lambda: calibration_error(CONFIDENCE, RIGHT, bins=0), "at least 1"),
        (lambda: calibration_error(CONFIDENCE, RIGHT, weight=torch.zeros(5)), "not all zero"),
        (lambda: per_class(torch.tensor([0]), torch.tensor([2]), 2), r"in \[0, 2\); got 2"),
        (lambda: per_class(torch.tensor([0, 1]), torch.tensor([0]), 2), "same shape"),
        (lambda: adjust_prior(torch.zeros(1, 3), torch.ones(2), torch.ones(2)), r"\[N, C\]"),
        (lambda: adjust_prior(torch.zeros(1, 2), torch.tensor([1.0, 0.0]), torch.ones(2)), "assumed must be > 0"),
        (lambda: adjust_prior(torch.zeros(1, 2), torch.ones(2), torch.zeros(2)), "wanted must be finite"),
    ],
)
def test_errors_say_what_to_do(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
