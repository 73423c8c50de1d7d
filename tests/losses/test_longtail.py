"""Long-tail classification losses: hand-computed values, their limits, and classes without images."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allnc.losses import (
    LDAM,
    ClassBalanced,
    Classification,
    CrossEntropy,
    DotRegression,
    Focal,
    LogitAdjusted,
    MeanSquaredError,
    PrototypeContrast,
    long_tail_loss,
)
from allnc.losses.longtail import LONG_TAIL
from tests.tolerances import assert_near

COUNTS = [60, 30, 10]
LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


def _softmax_loss(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(v) for v in logits)) - logits[label]


def test_cross_entropy_by_hand() -> None:
    want = (_softmax_loss([1, 2, 3], 0) + _softmax_loss([0.5, -1, 0], 2)) / 2
    assert math.isclose(CrossEntropy(3)(LOGITS, LABELS).item(), want, rel_tol=1e-12)


def test_logit_adjusted_by_hand() -> None:
    """Adding log π is weighing each exponential by the class's frequency."""
    pi = [0.6, 0.3, 0.1]
    rows = []
    for logits, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        total = sum(p * math.exp(v) for p, v in zip(pi, logits, strict=True))
        rows.append(-math.log(pi[label] * math.exp(logits[label]) / total))
    assert math.isclose(LogitAdjusted(COUNTS)(LOGITS, LABELS).item(), sum(rows) / 2, rel_tol=1e-6)
    plain = F.cross_entropy(LOGITS, LABELS)
    assert_near(LogitAdjusted(COUNTS, tau=0)(LOGITS, LABELS), plain)
    assert_near(LogitAdjusted([5, 5, 5])(LOGITS, LABELS), plain, dtype=torch.float32)


def test_focal_by_hand() -> None:
    want = 0.0
    for logits, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        p = math.exp(logits[label]) / sum(math.exp(v) for v in logits)
        want += (1 - p) ** 3 * -math.log(p) / 2
    assert math.isclose(Focal(3, gamma=3)(LOGITS, LABELS).item(), want, rel_tol=1e-12)
    assert_near(Focal(3, gamma=0)(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS))


def test_class_balanced_by_hand() -> None:
    beta = 0.9
    weight = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    rows = [_softmax_loss([1, 2, 3], 0), _softmax_loss([0.5, -1, 0], 2)]
    want = (weight[0] * rows[0] + weight[2] * rows[1]) / (weight[0] + weight[2])
    assert math.isclose(ClassBalanced(COUNTS, beta=beta)(LOGITS, LABELS).item(), want, rel_tol=1e-6)
    assert_near(ClassBalanced(COUNTS, beta=0)(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS))


def test_ldam_by_hand() -> None:
    """Margins ∝ n^(-1/4), the largest 0.5: for 256, 16 and 1 images 1/8, 1/4 and 1/2."""
    loss = LDAM([256, 16, 1], max_margin=0.5, scale=30)
    assert loss.margin.tolist() == [0.125, 0.25, 0.5]
    want = (_softmax_loss([30 * 0.875, 60, 90], 0) + _softmax_loss([15, -30, 30 * -0.5], 2)) / 2
    assert math.isclose(loss(LOGITS, LABELS).item(), want, rel_tol=1e-12)


def test_ldam_of_a_scaled_cosine_is_the_papers() -> None:
    """CE(30 (cos - m_y)) with margins of at most 0.5 of a cosine: 1/8 and 1/2 for 256 images and one."""
    cosines = torch.tensor([[0.9, -0.2], [0.1, 0.3]], dtype=torch.float64)
    value = long_tail_loss("ldam", [256, 1], classifier_scale=30.0)(30 * cosines, torch.tensor([0, 1]))
    want = (_softmax_loss([30 * (0.9 - 0.125), 30 * -0.2], 0) + _softmax_loss([30 * 0.1, 30 * (0.3 - 0.5)], 1)) / 2
    assert math.isclose(value.item(), want, rel_tol=1e-7)


def test_label_smoothing_by_hand() -> None:
    """The target of 0.3: 0.7 of the label and 0.1 of each of the three classes."""
    want = 0.0
    for logits, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        want += 0.7 * _softmax_loss(logits, label) / 2 + sum(0.1 * _softmax_loss(logits, c) for c in range(3)) / 2
    assert math.isclose(CrossEntropy(3, label_smoothing=0.3)(LOGITS, LABELS).item(), want, rel_tol=1e-12)
    even = LogitAdjusted([5, 5, 5], label_smoothing=0.3)(LOGITS, LABELS)
    assert math.isclose(even.item(), want, rel_tol=1e-6)


def test_class_weights_by_hand() -> None:
    """Each row weighs by its own class, smoothed target or not, and the mean is over the weights."""
    weight = torch.tensor([1.0, 5.0, 3.0])
    for loss in (CrossEntropy(3, label_smoothing=0.2), Focal(3), LDAM(COUNTS), MeanSquaredError(3)):
        rows = [loss(LOGITS[i : i + 1], LABELS[i : i + 1]).item() for i in range(2)]
        got = loss(LOGITS, LABELS, weight).item()
        assert math.isclose(got, (1 * rows[0] + 3 * rows[1]) / 4, rel_tol=1e-12)
        assert not math.isclose(got, sum(rows) / 2, rel_tol=1e-3)


def test_deferred_reweighting_begins_at_its_share() -> None:
    """From then on it is the class-balanced loss; (1 - β) / (1 - β^n) is about 1/n for small n."""
    loss = Classification(CrossEntropy(3), drw=0.8, class_counts=COUNTS)
    branch = (LOGITS, LABELS)

    def value(progress: float) -> float:
        return loss(LOGITS, LABELS, torch.zeros(3, 4), branch, branch, progress).total.item()

    rows = [_softmax_loss([1, 2, 3], 0), _softmax_loss([0.5, -1, 0], 2)]
    assert value(0.79) == CrossEntropy(3)(LOGITS, LABELS).item()
    assert math.isclose(value(0.8), (rows[0] / 60 + rows[1] / 10) / (1 / 60 + 1 / 10), rel_tol=1e-2)
    assert math.isclose(value(1.0), ClassBalanced(COUNTS)(LOGITS, LABELS).item(), rel_tol=1e-12)


def test_mean_squared_error_by_hand() -> None:
    """Targets 15 and 0 of a linear classifier; 8 and -4 of three classes' cosines at scale 8."""
    want = ((14**2 + 2**2 + 3**2) / 3 + (0.5**2 + 1**2 + 15**2) / 3) / 2
    assert math.isclose(MeanSquaredError(3)(LOGITS, LABELS).item(), want, rel_tol=1e-12)
    want = ((7**2 + 6**2 + 7**2) / 3 + (4.5**2 + 3**2 + 8**2) / 3) / 2
    assert math.isclose(MeanSquaredError(3, classifier_scale=8.0)(LOGITS, LABELS).item(), want, rel_tol=1e-12)


def test_dot_regression_by_hand() -> None:
    """It reads the own logit only: (s - z)² / 2s, where z are 1 and 0."""
    got = DotRegression(3, classifier_scale=8.0)(LOGITS, LABELS)
    assert math.isclose(got.item(), (7**2 / 16 + 8**2 / 16) / 2, rel_tol=1e-12)
    logits = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(DotRegression(3, classifier_scale=8.0)(logits, LABELS), logits)
    assert grad.count_nonzero() == 2


@pytest.mark.parametrize("only_negatives", [False, True])
def test_prototype_contrast_by_hand(only_negatives: bool) -> None:
    """Four images, of which the third takes no part; class 1 is absent. Large logits must not overflow."""
    logits = torch.tensor([[1.0, 9.0, 3.0], [0.5, 9.0, 0.0], [99.0, 99.0, 99.0], [-1.0, 9.0, 2.0]]).double() + 800
    labels = torch.tensor([0, 0, -100, 2])
    if only_negatives:
        rows = [-1 - 1.0, -1 - 0.5, math.log(math.exp(3) + math.exp(0)) - 2]
    else:
        of_class_0 = math.log(math.exp(1) + math.exp(0.5) + math.exp(-1))
        rows = [of_class_0 - 1, of_class_0 - 0.5, math.log(math.exp(3) + 1 + math.exp(2)) - 2]
    value = PrototypeContrast(3, only_negatives=only_negatives)(logits, labels)
    assert math.isclose(value.item(), sum(rows) / 3, rel_tol=1e-12)


def test_only_negatives_of_a_batch_of_one_class_is_nothing() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    value = PrototypeContrast(3, only_negatives=True)(logits, torch.tensor([1, 1]))
    (grad,) = torch.autograd.grad(value, logits)
    assert value.item() == 0 and bool((grad == 0).all())


def _all_losses(counts: list[int]) -> list[nn.Module]:
    num_classes = len(counts)
    return [
        *(long_tail_loss(name, counts, label_smoothing=0.1) for name in LONG_TAIL),
        MeanSquaredError(num_classes),
        DotRegression(num_classes, classifier_scale=4.0),
        PrototypeContrast(num_classes, only_negatives=False),
        PrototypeContrast(num_classes, only_negatives=True),
    ]


@pytest.mark.parametrize("index", range(9))
@pytest.mark.parametrize("labels", [[0, 1, 1], [2, 2, 2], [-100, 0, 2], [-100, -100, -100]])
def test_finite_with_absent_classes_and_ignored_rows(index: int, labels: list[int]) -> None:
    """Class 2 has no training image; even a label of it gives a finite loss and gradient."""
    loss = _all_losses([1000, 10, 0])[index]
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    value = loss(logits, torch.tensor(labels))
    (grad,) = torch.autograd.grad(value, logits)
    ignored = torch.tensor(labels) == -100
    assert math.isfinite(value.item()) and bool(grad.isfinite().all())
    assert bool((grad[ignored] == 0).all())
    if bool(ignored.all()):
        assert value.item() == 0


@pytest.mark.parametrize("index", range(9))
def test_gradients(index: int) -> None:
    loss = _all_losses(COUNTS)[index].double()

    def value(logits: Tensor) -> Tensor:
        return loss(logits, torch.tensor([0, 2, -100, 1]))

    assert torch.autograd.gradcheck(value, torch.randn(4, 3, dtype=torch.float64, requires_grad=True))


def test_ldam_margins_ignore_absent_classes() -> None:
    assert LDAM([16, 0, 16], max_margin=0.5).margin.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_smooth_at_certainty(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    value = Focal(2, gamma=gamma)(logits, torch.tensor([0]))
    assert math.isfinite(value.item()) and bool(torch.autograd.grad(value, logits)[0].isfinite().all())


def test_half_precision_logits_are_summed_in_float32() -> None:
    for loss in _all_losses(COUNTS):
        value = loss(LOGITS.to(torch.bfloat16), LABELS)
        assert value.dtype == torch.float32
        assert_near(value, loss(LOGITS.to(torch.bfloat16).float(), LABELS))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogitAdjusted([3]), r"class_counts must have shape \[C\] with C >= 2; got \[1\]"),
        (lambda: LogitAdjusted([3, -1]), "class_counts must be whole numbers >= 0"),
        (lambda: LogitAdjusted(torch.tensor([0.5, 2])), "class_counts must be whole numbers >= 0"),
        (lambda: LogitAdjusted([0, 0]), "class_counts must hold at least one training image"),
        (lambda: LogitAdjusted(COUNTS, tau=-1), "tau must be >= 0; got -1"),
        (lambda: Focal(3, gamma=-1), "gamma must be >= 0; got -1"),
        (lambda: Focal(1), "num_classes must be >= 2; got 1"),
        (lambda: ClassBalanced(COUNTS, beta=1.0), r"beta must be in \[0, 1\); got 1"),
        (lambda: LDAM(COUNTS, max_margin=0), "max_margin must be > 0; got 0"),
        (lambda: LDAM(COUNTS, scale=0), "scale must be > 0; got 0"),
        (lambda: CrossEntropy(3, label_smoothing=1.0), r"label_smoothing must be in \[0, 1\); got 1"),
        (lambda: LogitAdjusted(COUNTS, label_smoothing=-0.1), r"label_smoothing must be in \[0, 1\); got -0.1"),
        (lambda: Classification(CrossEntropy(3), drw=1.1, class_counts=COUNTS), r"drw must be in \[0, 1\); got 1.1"),
        (lambda: Classification(CrossEntropy(3), drw=0.5), "class_counts must be given with drw; got None"),
        (lambda: MeanSquaredError(3, classifier_scale=0.0), "classifier_scale must be > 0; got 0"),
        (lambda: DotRegression(3, classifier_scale=-1.0), "classifier_scale must be > 0; got -1"),
        (lambda: PrototypeContrast(1, only_negatives=True), "num_classes must be >= 2; got 1"),
        (lambda: long_tail_loss("mse", COUNTS), "name must be one of 'ce', 'logit_adjusted'"),  # pyright: ignore[reportArgumentType]
        (lambda: CrossEntropy(3)(LOGITS, LABELS + 1), r"labels must be in \[0, 3\).*; got 3"),
        (lambda: CrossEntropy(4)(LOGITS, LABELS), r"logits must have shape \[N, 4\]; got \[2, 3\]"),
        (lambda: CrossEntropy(3)(LOGITS, LABELS[:1]), r"labels must have shape \[2\]"),
    ],
)
def test_errors_say_what_to_do(build, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()
