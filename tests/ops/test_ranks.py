"""Ops across ranks: 1 to 4 gloo processes with uneven batches against one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from allnc import _extension
from allnc.ops._common import has_triton, triton_interprets
from allnc.ops.all_around import all_around_reference
from allnc.ops.hycon import hycon_reference
from tests.cases import rounding_of, value_and_gradients
from tests.ops._ranks_worker import CASES, SIZES, C, all_around_case, class_means, rows_and_options
from tests.processes import needs_gloo, run_ranks
from tests.tolerances import assert_as_exact, assert_near

WORLD = max(SIZES)
BACKENDS = [
    "eager",
    *(["cpp"] if _extension.has_cpp() else []),
    *(["triton"] if triton_interprets() and has_triton() else []),
]

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of the four processes saved."""
    return run_ranks("tests.ops._ranks_worker", WORLD, tmp_path_factory.mktemp("ranks"), *BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_one_process(ranks: list[dict[Any, Any]], size: int, name: str, backend: str) -> None:
    rows, options = rows_and_options(name)
    if backend == "triton" and rows["z"].dtype == torch.float64:
        pytest.skip("the Triton backend does not take float64")
    want = value_and_gradients(hycon_reference, rows, dtype=torch.float64, **options)
    eager = value_and_gradients(hycon_reference, rows, **options)
    together = [ranks[rank][size, name, backend] for rank in range(size)]
    growth = max(1.0, 0.02 / float(options.get("temperature", 0.1)))
    rounded = rounding_of(backend, rows)
    for of_rank in together:
        assert_as_exact(of_rank["value"], eager["value"], want["value"], dtype=rounded)
    totals = {"z": torch.cat([of_rank["z"] for of_rank in together])}
    for leaf in {"means", "temperature"} & want.keys():
        totals[leaf] = torch.stack([of_rank[leaf].double() for of_rank in together]).sum(0)
    assert totals.keys() == want.keys() - {"value"}
    for leaf, total in totals.items():
        assert_as_exact(total, eager[leaf], want[leaf], dtype=rounded or eager[leaf].dtype, growth=growth)


@pytest.mark.parametrize("size", SIZES)
def test_all_around_equals_one_process(ranks: list[dict[Any, Any]], size: int) -> None:
    rows, options = all_around_case()
    want = value_and_gradients(all_around_reference, rows, **options)
    together = [ranks[rank][size, "all_around"] for rank in range(size)]
    for name, value in want.items():
        if name.endswith(" loss"):
            for of_rank in together:
                assert_near(of_rank[name], value)
        elif name == "z":
            assert_near(torch.cat([of_rank[name] for of_rank in together]), value)
        else:
            assert_near(torch.stack([of_rank[name] for of_rank in together]).sum(0), value)


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("size", SIZES)
def test_class_means_equal_one_process(ranks: list[dict[Any, Any]], size: int, gradient: str) -> None:
    rows, _ = all_around_case()
    want = class_means(rows["z"], rows["labels"], gradient=gradient)
    together = [ranks[rank][size, gradient] for rank in range(size)]
    for of_rank in together:
        assert torch.equal(of_rank["means"], together[0]["means"]) and torch.equal(of_rank["seen"], want["seen"])
        assert_near(of_rank["means"], want["means"])
        assert_near(of_rank["value"], want["value"])
    assert_near(torch.cat([of_rank["features"] for of_rank in together]), want["features"])


def test_an_error_on_one_rank_is_an_error_on_all(ranks: list[dict[Any, Any]]) -> None:
    for rank, result in enumerate(ranks):
        told = result["wrong calls"]
        own = "ValueError: labels must be int64; got torch.int32. Convert with labels.long()"
        other = "RuntimeError: rank 1 was given arguments it cannot take; its own error says which"
        assert told["labels"] == (own if rank == 1 else other)
        here, there = (0.2, "0.1 on rank 0") if rank == 1 else (0.1, "0.2 on rank 1")
        message = f"ValueError: temperature must be the same on every rank; got {here} here and {there}"
        assert told["temperature"] == message
        assert told["means"].startswith("ValueError: means must be the same on every rank; got entries that differ by")
        assert told["empty"] == "ValueError: z must have at least one row on some rank; got none on all ranks"
        assert told["not a group"].startswith("TypeError: group must be a torch.distributed process group")
        assert told["not a group"].count("got str") == 1
        wrong_label = f"ValueError: labels must be in [0, {C}) or ignore_index (-100); got "
        assert told["class means"].startswith(wrong_label if rank == 1 else other)
        assert told["target"].startswith("ValueError: target (auto 0, etf 1, softmax 2) must be the same on every rank")
        assert told["still in step"] == "no error"
    assert "the group of another process" in ranks[3]["outside"]
