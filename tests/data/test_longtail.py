"""Class sizes and subsets against the published CIFAR-LT totals and hand-computed cases."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from allnc.data.longtail import class_sizes, held_out, sizes_within, subset


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


def test_a_ratio_that_floats_do_not_hold_exactly_leaves_the_whole_number() -> None:
    for ratio in range(1, 3000):
        assert class_sizes(2, ratio, ratio)[-1] == class_sizes(2, ratio, ratio, "step")[-1] == 1
        assert class_sizes(3, 7 * ratio, ratio)[-1] == 7


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("ratio", [10, 20, 50, 100, 200])
def test_sizes_of_the_published_cifar_subsets(classes: int, ratio: int) -> None:
    largest = 50_000 // classes
    published = [int(largest * (1 / ratio) ** (i / (classes - 1))) for i in range(classes)]  # LDAM's own expression
    assert class_sizes(classes, largest, ratio) == published


@pytest.mark.parametrize("ratio", [math.nan, math.inf, 0.5, -1.0])
def test_ratios_that_are_none(ratio: float) -> None:
    with pytest.raises(ValueError, match="must be >= 1 and finite"):
        class_sizes(3, 10, ratio)


def test_the_size_that_is_proposed_fits_and_the_next_does_not() -> None:
    generator = np.random.default_rng(0)
    proposed = 0
    for _ in range(300):
        counts = generator.integers(1, 60, generator.integers(1, 6)).tolist()
        ratio, profile = float(generator.uniform(1, 12)), str(generator.choice(["exponential", "step"]))
        largest = None if generator.random() < 0.3 else int(generator.integers(1, 80))
        try:
            sizes = sizes_within(counts, largest, ratio, profile)
            assert all(1 <= size <= count for size, count in zip(sizes, counts, strict=True))
        except ValueError as error:
            found = re.search(
                r"or set data\.max_per_class (\d+)(?: and data\.imbalance_ratio (\d+) or less)?$", str(error)
            )
            assert found, error
            proposed += 1
            sizes_within(counts, int(found[1]), float(found[2] or ratio), profile)
            if found[2]:
                for size in range(1, 80):
                    with pytest.raises(ValueError):
                        sizes_within(counts, size, ratio, profile)
            else:
                with pytest.raises(ValueError):
                    sizes_within(counts, int(found[1]) + 1, ratio, profile)
    assert proposed > 100


def test_a_share_of_each_class_is_held_out_and_every_class_keeps_an_image() -> None:
    labels = np.repeat([0, 1, 2, 3], [10, 4, 2, 1])
    kept, held = held_out(labels, 4, 0.3, seed=0)
    assert np.bincount(labels[held], minlength=4).tolist() == [3, 1, 1, 0]  # round(3.0, 1.2, 0.6, 0.3)
    assert sorted([*kept, *held]) == list(range(17))
    assert np.bincount(labels[held_out(labels, 4, 0.9, seed=0)[0]]).tolist() == [1, 1, 1, 1]
    assert not np.array_equal(held, held_out(labels, 4, 0.3, seed=1)[1])


def test_groups_are_held_out_whole() -> None:
    groups = np.repeat(np.arange(10), 7)
    labels = np.tile(np.arange(7), 10)
    kept, held = held_out(labels, 7, 0.3, seed=3, groups=groups)
    assert not set(groups[kept]) & set(groups[held])
    assert len(set(groups[held])) == 3
    with pytest.raises(ValueError, match=r"data.validation must leave every class an image; got 0.5, and class"):
        held_out(groups, 10, 0.5, seed=0, groups=groups)


def test_a_share_too_small_for_any_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must hold out an image of some class; got 0.01 of 4 images"):
        held_out(np.array([0, 0, 1, 1]), 2, 0.01, seed=0)
