"""What the kernels' machine code uses on GPUs that need not be there: no spills, tensor cores, one
exponential.

benchmarks/kernel_resources.py prints the same for every variant; here a subset has to keep its promises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels._compile_subset"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def select(compiled: list[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    found = [row for row in compiled if all(row[name] == value for name, value in wanted.items())]
    assert found, f"no variant with {wanted} was compiled"
    return found


def label(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['mode']} sm_{row['arch']} {row['dtype']} D={row['dim']}"


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_everything_fits(compiled: list[dict[str, Any]], arch: int) -> None:
    for row in select(compiled, arch=arch):
        assert row["stack"] == 0, f"{label(row)} spills {row['stack']} bytes"
        assert row["registers"] <= 255, label(row)
        assert row["shared"] <= SHARED_LIMIT[arch], f"{label(row)} shares {row['shared']} bytes"


@pytest.mark.parametrize("arch", ARCHS)
def test_products_of_16_bit_types_use_the_tensor_cores(compiled: list[dict[str, Any]], arch: int) -> None:
    for kernel in ("hycon_fwd", "hycon_bwd"):
        for row in select(compiled, arch=arch, kernel=kernel):
            if row["dtype"] != "fp32":
                assert row["counts"][TENSOR_CORES[arch]] > 0, label(row)
    for row in select(compiled, dtype="fp32", precision="ieee"):
        assert not any(row["counts"][kind] for kind in TENSOR_CORES.values()), label(row)


def test_one_exponential_an_element(compiled: list[dict[str, Any]]) -> None:
    # sm_90 keeps each of the three loops (diagonal, z, μ) in one piece: BLOCK_M BLOCK_N elements on 256
    # threads.
    for kernel, mode in (("hycon_fwd", "triangle"), ("hycon_fwd", "square"), ("hycon_bwd", "shifted")):
        for row in select(compiled, arch=90, kernel=kernel, mode=mode, dtype="bf16"):
            constants, threads = row["constants"], 32 * row["options"]["num_warps"]
            elements = constants["BLOCK_M"] * constants["BLOCK_N"] // threads
            assert row["counts"]["MUFU.EX2"] == 3 * elements, label(row)


@pytest.mark.parametrize("arch", ARCHS)
def test_only_the_triangle_uses_atomics(compiled: list[dict[str, Any]], arch: int) -> None:
    for row in select(compiled, arch=arch):
        expected = row["mode"].startswith("triangle") and row["kernel"] != "hycon_finish"
        assert (row["counts"]["RED"] > 0) == expected, label(row)
