"""Samplers against hand-computed probabilities and their own frequencies."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
import torch.utils.data

from allnc.data import BalancedSampler
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


@pytest.mark.parametrize("sampler", ["class_balanced", "square_root", "uniform"])
def test_the_ranks_share_what_one_process_draws(sampler: str) -> None:
    labels = torch.repeat_interleave(torch.arange(3), COUNTS)  # 21 images
    alone = BalancedSampler(labels, sampler, seed=5)
    shares = [BalancedSampler(labels, sampler, seed=5, rank=rank, world_size=2) for rank in range(2)]
    for each in (alone, *shares):
        each.set_epoch(4)
    drawn = [list(each) for each in shares]
    assert [len(each) for each in (alone, *shares)] == [21, 11, 11] == [21, *map(len, drawn)]
    if sampler == "uniform":  # every image once, and one more so that all ranks have as many
        together = [index for pair in zip(*drawn, strict=True) for index in pair]
        assert together[:21] == list(alone) and sorted(together[:21]) == list(range(21))
    again = BalancedSampler(labels, sampler, seed=5)
    again.set_epoch(4)
    assert list(again) == list(alone) and list(again) == list(again)
    again.set_epoch(5)
    assert list(again) != list(alone)


def test_the_sampler_serves_a_loader() -> None:
    labels = torch.repeat_interleave(torch.arange(3), COUNTS)
    data = torch.utils.data.TensorDataset(labels)
    loader = torch.utils.data.DataLoader(data, batch_size=8, sampler=BalancedSampler(labels, size=6000))
    seen = torch.bincount(torch.cat([batch for (batch,) in loader]), minlength=3) / 6000
    torch.testing.assert_close(seen, torch.full((3,), 1 / 3), atol=0.03, rtol=0)  # four standard deviations: 0.024


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0.5, 1.0], {}, "labels must be the class of each image"),
        ([], {}, "labels must be the class"),
        ([0, -1], {}, "labels must be the class"),
        ([0, 1], {"sampler": "random"}, "sampler must be one of uniform, reversed"),
        ([0, 1], {"sampler": "uniform", "size": 4}, "size must be >= 1, and None with sampler uniform; got 4"),
        ([0, 1], {"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\); got 2"),
    ],
)
def test_wrong_arguments_of_the_sampler(labels: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedSampler(labels, **options)


def test_the_example_of_the_sampler() -> None:
    results = doctest.testmod(importlib.import_module("allnc.data.samplers"))
    assert results.attempted > 0 and results.failed == 0
