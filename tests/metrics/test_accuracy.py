"""Accuracy by shot group, by hand."""

from __future__ import annotations

import pytest
import torch

from allnc.metrics import shot_accuracy, shot_groups

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3])


def test_by_hand() -> None:
    """Classes 0 and 1 are many-shot with 3/4 and 0/2 right; class 2 medium with 1/2; class 3 few with 1/1."""
    predictions = torch.tensor([0, 0, 0, 3, 0, 0, 2, 1, 3])
    result = shot_accuracy(predictions, LABELS, [500, 101, 100, 19])
    assert result == {"accuracy": pytest.approx(500 / 9), "balanced": 56.25, "many": 37.5, "medium": 50.0, "few": 100.0}


def test_limits_of_the_groups() -> None:
    groups = shot_groups([101, 100, 20, 19, 0])
    assert groups["many"].tolist() == [True, False, False, False, False]
    assert groups["medium"].tolist() == [False, True, True, False, False]
    assert groups["few"].tolist() == [False, False, False, True, True]
    custom = shot_groups([101, 100, 20, 19, 0], many=60, few=1)
    assert custom["few"].tolist() == [False, False, False, False, True]


def test_empty_groups_are_none() -> None:
    result = shot_accuracy(LABELS, LABELS, [10, 10, 10, 10])
    assert result == {"accuracy": 100.0, "balanced": 100.0, "many": None, "medium": None, "few": 100.0}
    untested = shot_accuracy(LABELS, LABELS, [10, 10, 10, 10, 500])
    assert untested["many"] is None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LABELS.float(), LABELS, [1] * 4), {}, "predictions must be int64.*argmax"),
        ((LABELS[:3], LABELS, [1] * 4), {}, r"predictions must be int64 of shape \[9\]"),
        ((LABELS, LABELS.int(), [1] * 4), {}, "labels must be int64"),
        ((LABELS, LABELS, [1] * 3), {}, r"labels must be in \[0, 3\).*; got 3"),
        ((LABELS[:0], LABELS[:0], [1] * 3), {}, "labels must hold at least one"),
        ((LABELS, LABELS, [1] * 4), {"many": 5, "few": 6}, "few and many must satisfy"),
    ],
)
def test_errors_say_what_to_do(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        shot_accuracy(*arguments, **options)
