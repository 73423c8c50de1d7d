"""Samplers against hand-computed probabilities and their own frequencies."""

from __future__ import annotations

import pytest
import torch

from allnc.data.samplers import class_probabilities, generator, rebalanced_order, uniform_order

COUNTS = torch.tensor([16, 4, 1])


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("uniform", [16 / 21, 4 / 21, 1 / 21]),
        ("class_balanced", [1 / 3, 1 / 3, 1 / 3]),
        ("reversed", [1 / 21, 4 / 21, 16 / 21]),  # 1/16 : 1/4 : 1
        ("square_root", [4 / 7, 2 / 7, 1 / 7]),
    ],
)
def test_class_probabilities_by_hand(sampler: str, expected: list[float]) -> None:
    torch.testing.assert_close(class_probabilities(COUNTS, sampler), torch.tensor(expected, dtype=torch.float64))


def test_a_class_without_images_is_never_drawn() -> None:
    assert class_probabilities(torch.tensor([3, 0, 1]), "reversed")[1] == 0


def test_unknown_sampler() -> None:
    with pytest.raises(ValueError, match="sampler must be one of uniform, reversed"):
        class_probabilities(COUNTS, "random")


@pytest.mark.parametrize("sampler", ["class_balanced", "reversed", "square_root"])
def test_drawn_frequencies(sampler: str) -> None:
    labels = torch.repeat_interleave(torch.arange(3), COUNTS)
    size = 60_000
    drawn = torch.bincount(labels[rebalanced_order(labels, COUNTS, sampler, size, seed=0, epoch=0)], minlength=3)
    expected = class_probabilities(COUNTS, sampler)
    deviation = (expected * (1 - expected) / size).sqrt()
    assert ((drawn / size - expected).abs() < 4 * deviation).all()


def test_images_of_a_class_are_drawn_alike() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1])
    order = rebalanced_order(labels, torch.tensor([4, 1]), "class_balanced", 40_000, seed=1, epoch=0)
    frequency = torch.bincount(order, minlength=5) / 40_000
    torch.testing.assert_close(frequency, torch.tensor([0.125] * 4 + [0.5]), atol=0.01, rtol=0)


def test_orders_depend_on_seed_and_epoch_only() -> None:
    torch.manual_seed(1)
    first = uniform_order(50, seed=0, epoch=3)
    torch.manual_seed(2)
    assert torch.equal(first, uniform_order(50, seed=0, epoch=3))
    assert sorted(first.tolist()) == list(range(50))
    assert not torch.equal(first, uniform_order(50, seed=0, epoch=4))
    assert not torch.equal(first, uniform_order(50, seed=1, epoch=3))


def test_streams_differ() -> None:
    draws = [torch.rand(4, generator=generator(0, s, 0)) for s in ("uniform", "rebalance", "augment")]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1]])
def test_counts_of_which_nothing_can_be_drawn(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="class_counts must be >= 0, one of them > 0"):
        class_probabilities(torch.tensor(counts, dtype=torch.int64), "reversed")
