"""HyCon across ranks: 1 to 4 gloo processes with uneven batches against one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from allnc import _extension
from allnc.ops._common import has_triton, triton_interprets
from allnc.ops.hycon import hycon_reference
from tests.cases import rounding_of, value_and_gradients
from tests.ops._ranks_worker import CASES, SIZES, rows_and_options
from tests.tolerances import assert_as_exact

WORLD = max(SIZES)
BACKENDS = [
    "eager",
    *(["cpp"] if _extension.has_cpp() else []),
    *(["triton"] if triton_interprets() and has_triton() else []),
]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of the four processes saved."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.ops._ranks_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*command, str(rank), str(WORLD), str(folder), *BACKENDS], env=environment)
        for rank in range(WORLD)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * WORLD
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


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
        assert told["still in step"] == "no error"
    assert "the group of another process" in ranks[3]["outside"]
