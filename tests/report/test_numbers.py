"""Numbers of a report against hand-computed ones."""

from __future__ import annotations

import numpy as np
import pytest

from allnc.report import numbers
from allnc.report.numbers import Answers


def told(labels: list[int], predicted: list[int], confidence: list[float], counts: list[int]) -> Answers:
    n = len(labels)
    return Answers(
        labels=np.array(labels),
        predicted=np.array(predicted),
        confidence=np.array(confidence, np.float32),
        true_confidence=np.full(n, 0.5, np.float32),
        positions=np.arange(n),
        paths=None,
        classes=tuple(f"c{i}" for i in range(len(counts))),
        class_counts=np.array(counts),
        measured_on="test",
    )


SEVEN = told([0, 0, 0, 0, 1, 1, 2], [0, 1, 1, 2, 1, 0, 0], [0.9, 0.6, 0.8, 0.7, 0.5, 0.6, 0.9], [50, 10, 5, 1])


def test_accuracy_and_mistakes_of_classes() -> None:
    found = numbers.of_classes(SEVEN)
    assert found.tested.tolist() == [4, 2, 1, 0]
    np.testing.assert_allclose(found.accuracy, [25, 50, 0, np.nan])
    assert found.mistaken_for.tolist() == [1, 0, 0, -1]


def test_pairs_are_ordered_by_images_then_confidence() -> None:
    found = numbers.pairs(SEVEN)
    assert [(p.label, p.predicted, p.images) for p in found] == [(0, 1, 2), (2, 0, 1), (0, 2, 1), (1, 0, 1)]
    assert found[0].rows.tolist() == [2, 1]  # the more confident first
    assert not numbers.pairs(told([0], [0], [1.0], [1, 1]))


def test_confusion_matrix_in_percent_of_the_row() -> None:
    found = numbers.confusion_map(SEVEN, np.array([2, 0, 1, 3]))
    assert not found.errors_only
    nan = np.nan
    wanted = [[0, 100, 0, 0], [25, 25, 50, 0], [0, 50, 50, 0], [nan, nan, nan, nan]]
    np.testing.assert_allclose(found.cells, wanted)


def test_groups_count_mistakes_alone() -> None:
    num_classes = 120  # groups of three
    labels = np.repeat(np.arange(num_classes), 2)
    predicted = labels.copy()
    predicted[0] = 1  # 0 for 1: the same group
    predicted[2] = 119  # 1 for 119: the last group
    of_all = told(labels.tolist(), predicted.tolist(), [0.5] * 240, [1] * num_classes)
    found = numbers.confusion_map(of_all, np.arange(num_classes))
    assert found.errors_only and [g.tolist() for g in found.groups[:2]] == [[0, 1, 2], [3, 4, 5]]
    assert found.cells[0, 0] == found.cells[0, 39] == pytest.approx(100 / 6)
    assert found.cells.sum() == pytest.approx(200 / 6)


def test_calibration_by_hand() -> None:
    # (0.6, 0.6667]: one image of confidence 0.65, wrong. (0.8667, 0.9333]: 0.9 twice, one of them right.
    found = numbers.calibration(told([0, 0, 1], [1, 0, 0], [0.65, 0.9, 0.9], [5, 5]))
    assert found.images.tolist() == [0] * 9 + [1, 0, 0, 0, 2, 0]
    np.testing.assert_allclose([found.confidence[9], found.accuracy[9]], [0.65, 0], atol=1e-6)
    np.testing.assert_allclose([found.confidence[13], found.accuracy[13]], [0.9, 0.5], atol=1e-6)
    assert found.error == pytest.approx(100 * (0.65 + 2 * 0.4) / 3, abs=1e-4)
    assert np.isnan(found.accuracy[0])
    assert numbers.calibration(SEVEN, np.array([False, True, False, False])).images.sum() == 2


def test_trend_is_the_mean_of_classes_of_similar_size() -> None:
    found = numbers.trend(np.array([1, 1, 100, 100, 100]), np.array([0.0, 10.0, 50.0, 70.0, np.nan]), steps=2)
    np.testing.assert_allclose([step[:2] for step in found], [(1, 5), (100, 60)])
    assert numbers.trend(np.array([5, 5]), np.array([1.0, 2.0])) == []  # no axis to draw it over
