"""The tuner's choice, with times made up: it needs a GPU only to measure."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from allnc.kernels import _common
from allnc.kernels._common import CHUNKED, Tile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "machine_code")  # scripts, not a package
    return importlib.import_module("tune")


@pytest.mark.parametrize(
    ("dim", "dtype", "name"),
    [(128, torch.bfloat16, "BACKWARD"), (300, torch.float16, "WAVES"), (129, torch.float32, "WAVES")],
)
def test_the_fastest_tile_is_printed_and_nothing_is_kept(tune: Any, dim: int, dtype: torch.dtype, name: str) -> None:
    row = _common.row_class(dim, dtype)
    tables = {"FORWARD": _common.FORWARD, name: getattr(_common, name)}
    before = {key: dict(table[90]) for key, table in tables.items()}
    winners = {key: tune.candidates(table, 90, row)[-1] for key, table in tables.items()}
    tried: list[set[Tile]] = []

    def timer(run: Callable[[], object]) -> float:
        current = {key: table[90][row] for key, table in tables.items()}
        tried.append(set(current.values()))
        won = any(current[key] == winners[key] for key in tables)
        return 0.5 if won else 1.0

    lines = tune.tune(70, dim, dtype, device="cpu", arch=90, timer=timer)
    key = "CHUNKED" if row == CHUNKED else str(row)
    rows = [line for line in lines if not line.startswith("#")]
    assert [line.split(",  #")[0] for line in rows] == [f"{key}: Tile{tuple(tile)}" for tile in winners.values()]
    assert all("was" in line for line in rows)
    assert len(tried) == sum(len(tune.candidates(table, 90, row)) for table in tables.values())
    assert {key: dict(table[90]) for key, table in tables.items()} == before


def test_noise_does_not_change_a_row_and_what_does_not_fit_is_left_out(tune: Any) -> None:
    current, *others = tune.candidates(_common.FORWARD, 90, 256)
    assert current == _common.FORWARD[90][256] and current not in others

    def timer(run: Callable[[], object]) -> float:
        tile = _common.FORWARD[90][256]
        if tile == others[0]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0 if tile == current else 0.98

    times = tune.measure(_common.FORWARD, 90, 256, lambda: None, timer)
    assert others[0] not in times and len(times) == len(others)
    assert tune.choose(times) == current
    assert tune.report("FORWARD", 90, 256, times)[-1] == f"256: Tile{tuple(current)},  # as it is"


def test_the_launchers_use_the_row(tune: Any) -> None:
    tile = Tile(64, 32, 4, 5)
    with tune.using(_common.FORWARD, 80, 256, tile):
        blocks, options = _common.forward_blocks(100, torch.bfloat16, 86)
    chosen = (blocks.block_m, blocks.block_n, options["num_warps"], options["num_stages"])
    assert chosen == tile and blocks.block_d == 128
    assert _common.FORWARD[80][256] != tile


@pytest.mark.parametrize(("arch", "row"), [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)])
def test_every_architecture_has_rows(arch: int, row: int) -> None:
    assert _common.table_arch(arch) == row


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_needs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/machine_code/tune.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "GPU" in run.stderr and not run.stdout
