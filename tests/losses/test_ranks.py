"""Losses across ranks: 1 to 4 gloo processes with uneven and empty batches against one process with all images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.losses._ranks_worker import COUNTS, IMAGES, SIZES, STEPS, C, cases, train
from tests.processes import needs_gloo, run_ranks

WORLD = max(SIZES)
TOLERANCE = 1e-11  # of the largest entry; all of it is float64

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of the four processes saved."""
    return run_ranks("tests.losses._ranks_worker", WORLD, tmp_path_factory.mktemp("ranks"))


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    largest = float(want.abs().max())
    assert float((got - want).abs().max()) <= TOLERANCE * largest


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("size", SIZES)
def test_the_average_gradient_is_that_of_one_process(ranks: list[dict[Any, Any]], size: int, name: str) -> None:
    want = train(cases()[name], slice(0, IMAGES), None)
    reached = [g for g in want["gradients"] if float(g.abs().max()) > 0]
    assert len(reached) >= 2 * STEPS, "encoder and classifier must have a gradient for the comparison to mean anything"
    for rank in range(size):
        got = ranks[rank][size, name]
        for parts, expected in zip(got["parts"], want["parts"], strict=True):
            assert set(parts) == set(expected)
            for part, value in expected.items():
                assert_near(parts[part], value)
        for gradient, expected in zip(got["gradients"], want["gradients"], strict=True):
            assert_near(gradient, expected)


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("size", SIZES)
def test_the_state_is_bit_equal_on_every_rank(ranks: list[dict[Any, Any]], size: int, name: str) -> None:
    want = train(cases()[name], slice(0, IMAGES), None)["state"]
    states = [ranks[rank][size, name]["state"] for rank in range(size)]
    for key, value in want.items():
        assert all(torch.equal(state[key], states[0][key]) for state in states), key
        if value.is_floating_point():
            assert_near(states[0][key], value)
        else:
            assert torch.equal(states[0][key], value)


def test_a_step_synchronises_once(ranks: list[dict[Any, Any]]) -> None:
    for name in cases():
        assert ranks[0][WORLD, name]["exchanges"] == STEPS, name


def test_a_wrong_argument_on_one_rank_is_an_error_on_all(ranks: list[dict[Any, Any]]) -> None:
    for rank, result in enumerate(ranks):
        told, of_views, of_baseline, then = result["wrong call"]
        wrong_views = "ValueError: h must have a multiple of num_views = 4 rows; got 46."
        wrong_label = f"ValueError: labels must be in [0, {C}) or ignore_index (-100); got {len(COUNTS)}"
        other = "RuntimeError: rank 1 was given arguments it cannot take; its own error says which"
        assert told.startswith(wrong_label if rank == 1 else other)
        assert of_views.startswith(wrong_views if rank == 1 else other)
        assert of_baseline.startswith(wrong_label if rank == 1 else other)
        assert then == "no error"
