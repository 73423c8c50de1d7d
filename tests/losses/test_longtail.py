"""Long-tail classification losses: hand-computed values, their limits, and classes without images."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allnc.losses import LDAM, ClassBalanced, CrossEntropy, Focal, LogitAdjusted, long_tail_loss
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


def _all_losses(counts: list[int]) -> list[nn.Module]:
    names = ("logit_adjusted", "focal", "class_balanced", "ldam")
    return [CrossEntropy(len(counts)), *(long_tail_loss(name, counts) for name in names)]


@pytest.mark.parametrize("index", range(5))
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


@pytest.mark.parametrize("index", range(5))
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
        (lambda: long_tail_loss("ce", COUNTS), "name must be one of 'logit_adjusted'"),  # pyright: ignore[reportArgumentType]
        (lambda: CrossEntropy(3)(LOGITS, LABELS + 1), r"labels must be in \[0, 3\).*; got 3"),
        (lambda: CrossEntropy(4)(LOGITS, LABELS), r"logits must have shape \[N, 4\]; got \[2, 3\]"),
        (lambda: CrossEntropy(3)(LOGITS, LABELS[:1]), r"labels must have shape \[2\]"),
    ],
)
def test_errors_say_what_to_do(build, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()
