"""Class sizes and subsets against the published CIFAR-LT totals and hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest

from allnc.data.longtail import class_sizes, subset


@pytest.mark.parametrize(
    ("num_classes", "largest", "ratio", "total"),
    [
        (10, 5000, 200, 11203),
        (10, 5000, 100, 12406),
        (10, 5000, 50, 13996),
        (10, 5000, 10, 20431),
        (100, 500, 200, 9502),
        (100, 500, 100, 10847),
        (100, 500, 50, 12608),
        (100, 500, 10, 19573),
    ],
)
def test_totals_of_cifar_lt(num_classes: int, largest: int, ratio: float, total: int) -> None:
    assert sum(class_sizes(num_classes, largest, ratio)) == total


def test_profiles_by_hand() -> None:
    assert class_sizes(3, 100, 100) == [100, 10, 1]
    assert class_sizes(4, 50, 10, "step") == [50, 50, 5, 5]
    assert class_sizes(5, 50, 10, "step") == [50, 50, 50, 5, 5]
    assert class_sizes(1, 7, 10) == [7]


def test_impossible_profiles_are_refused() -> None:
    with pytest.raises(ValueError, match="imbalance_ratio must leave an image in the smallest class"):
        class_sizes(3, 10, 100)
    with pytest.raises(ValueError, match="profile must be exponential or step; got 'linear'"):
        class_sizes(3, 10, 2, "linear")
    with pytest.raises(ValueError, match="ratio must be >= 1"):
        class_sizes(3, 10, 0.5)


def test_subset_keeps_the_sizes_and_follows_the_seed() -> None:
    labels = np.arange(60, dtype=np.int64) % 3
    chosen = subset(labels, [9, 4, 1], seed=0)
    assert labels[chosen].tolist() == [0] * 9 + [1] * 4 + [2]
    assert len(set(chosen.tolist())) == 14
    assert np.array_equal(chosen, subset(labels, [9, 4, 1], seed=0))
    assert not np.array_equal(chosen, subset(labels, [9, 4, 1], seed=1))


def test_smaller_subsets_are_part_of_larger_ones() -> None:
    labels = np.arange(60, dtype=np.int64) % 3
    assert set(subset(labels, [9, 4, 1], seed=0)) < set(subset(labels, [12, 8, 3], seed=0))


def test_a_class_too_small_is_named() -> None:
    labels = np.array([0, 0, 0, 1], dtype=np.int64)
    with pytest.raises(ValueError, match="class 1 has 1, 2 asked for"):
        subset(labels, [3, 2], seed=0)
