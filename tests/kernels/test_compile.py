"""What the kernels' machine code uses on GPUs that need not be there: no spills, tensor cores, and in each loop the
products and exponentials that the formulas predict.

benchmarks/machine_code/kernel_resources.py prints the same for every variant; here a subset has to keep its promises.
"""

from __future__ import annotations

import importlib
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
CONSUMER_LIMIT = 99 * 1024  # sm_86, sm_89 and sm_120 use the rows of sm_80
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

MAIN = ("hycon_lse_fwd", "hycon_lse_bwd", "hycon_wave")


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
        limit = CONSUMER_LIMIT if arch == 80 else SHARED_LIMIT[arch]
        assert row["shared"] <= limit, f"{label(row)} shares {row['shared']} bytes"


@pytest.mark.parametrize("arch", ARCHS)
def test_products_of_16_bit_types_use_the_tensor_cores(compiled: list[dict[str, Any]], arch: int) -> None:
    for kernel in MAIN:
        for row in select(compiled, arch=arch, kernel=kernel):
            if row["dtype"] != "fp32":
                assert row["counts"][TENSOR_CORES[arch]] > 0, label(row)
    for row in select(compiled, dtype="fp32", precision="ieee"):
        assert not any(row["counts"][kind] for kind in TENSOR_CORES.values()), label(row)


def test_one_exponential_an_element(compiled: list[dict[str, Any]]) -> None:
    # sm_90 keeps each of the three loops (diagonal, z, μ) in one piece: BLOCK_M BLOCK_N elements on 256
    # threads.
    for kernel, mode in (("hycon_lse_fwd", "triangle"), ("hycon_lse_fwd", "square"), ("hycon_lse_bwd", "shifted")):
        for row in select(compiled, arch=90, kernel=kernel, mode=mode, dtype="bf16"):
            rows, columns = row["tile"]
            elements = rows * columns // (32 * row["options"]["num_warps"])
            assert row["counts"]["MUFU.EX2"] == 3 * elements, label(row)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["hycon_loss_fwd", "hycon_loss_bwd"])
def test_the_loops_of_whole_losses_are_those_of_lse(compiled: list[dict[str, Any]], kernel: str, arch: int) -> None:
    for row in select(compiled, arch=arch, kernel=kernel):
        products, exponentials = row["predicted"]["products"][0], row["predicted"]["exponentials"]
        main = [loop for loop in row["loops"] if loop["products"]]
        assert main, label(row)
        for loop in main:
            assert (loop["products"], loop["counts"]["MUFU.EX2"]) == (products, exponentials), label(row)


def loops_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Its loops, and the code in none: the diagonal's one trip, and the end of a tile of K."""
    return [*row["loops"], row["outside"]]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", MAIN)
def test_every_loop_multiplies_what_the_formula_predicts(
    compiled: list[dict[str, Any]], kernel: str, arch: int
) -> None:
    for row in select(compiled, arch=arch, kernel=kernel):
        if row["precision"] == "ieee" and row["dtype"] == "fp32":
            continue
        wanted = {products for products in row["predicted"]["products"] if products}
        assert {loop["products"] for loop in row["loops"]} - {0} == wanted, label(row)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", MAIN)
def test_every_loop_takes_one_exponential_an_element(compiled: list[dict[str, Any]], kernel: str, arch: int) -> None:
    # Two in the backward's running-maximum mode. sm_100's compiler peels trips out of the loops: the code in none has
    # several, each whole.
    for row in select(compiled, arch=arch, kernel=kernel):
        wanted = row["predicted"]["exponentials"]
        found = [loop["counts"]["MUFU.EX2"] for loop in loops_of(row)]
        assert sum(found) > 0 and all(count % wanted == 0 for count in found), f"{label(row)}: {found} not {wanted}"
        assert set(found[:-1]) <= {0, wanted}, f"{label(row)}: {found} not {wanted}"


def test_sm_100_issues_the_products_that_the_formula_predicts(compiled: list[dict[str, Any]]) -> None:
    # Their shape is in a register; the count in the fullest loop shows that each takes the whole tile.
    for row in select(compiled, arch=100, dtype="bf16"):
        if row["kernel"] in MAIN:
            found = max(loop["counts"]["UTCHMMA"] for loop in row["loops"])
            assert found == max(row["predicted"]["issued"]), label(row)


@pytest.mark.parametrize("arch", ARCHS)
def test_one_block_of_a_wave_multiplies_while_another_forms_coefficients(
    compiled: list[dict[str, Any]], arch: int
) -> None:
    for row in select(compiled, arch=arch, kernel="hycon_wave"):
        assert row["blocks"] >= 2, f"{label(row)}: {row['registers']} registers, {row['shared']} bytes shared"
        assert row["counts"]["LDGSTS"] > 0, f"{label(row)} waits for its loads"


def test_loops_are_read_from_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "machine_code")
    code = importlib.import_module("sass").read_code("""
        /*0000*/                   MUFU.EX2 R1, R2 ;
.L_x_0:
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R7], desc[UR14][R10.64], P6 ;
.L_x_1:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   HGMMA.64x256x8.F32.TF32 R24, gdesc[UR4], R24, gsb0 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   HMMA.16816.F32.BF16 R88, R52, R8, R88 ;
        /*0060*/                   MUFU.EX2 R1, R2 ;
        /*0070*/              @!P6 BRA `(.L_x_0) ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
.L_x_3:
        /*00a0*/                   EXIT ;
    """)
    assert code.instructions == 11 and len(code.loops) == 2
    outer, inner = code.loops
    assert inner.products == 64 * 128 * 16 + 64 * 256 * 8 and inner.counts["HGMMA"] == 2
    assert outer.products == 16 * 8 * 16 and outer.counts["MUFU.EX2"] == 1 and outer.counts["LDGSTS"] == 1
    assert code.outside.counts["MUFU.EX2"] == 1 and code.total.counts["MUFU.EX2"] == 2


@pytest.mark.parametrize("arch", ARCHS)
def test_only_the_triangle_uses_atomics(compiled: list[dict[str, Any]], arch: int) -> None:
    for row in select(compiled, arch=arch):
        expected = row["mode"].startswith("triangle") and row["kernel"] != "hycon_lse_finish"
        assert (row["counts"]["RED"] > 0) == expected, label(row)
