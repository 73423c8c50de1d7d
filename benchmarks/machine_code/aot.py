"""Compiles the kernels for a GPU that need not be there, and reads what they use from the machine code.

`variants` asks the launchers' own functions for block sizes and options, so that what is compiled here is
what would be launched. `resources` gives registers, stack (spills), shared memory and instruction counts of a variant,
`predicted` what the formulas say that one trip through its loop over tiles holds, `blocks_per_multiprocessor` how many
of its blocks run at once.

    python benchmarks/machine_code/aot.py --arch 90 --dim 64 128 --dtype bfloat16

prints them as JSON, one line a variant. TRITON_INTERPRET must not be set: an interpreted kernel has no code.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from sass import TENSOR_CORES, Section, read_code
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from allnc.kernels import all_around, centred_unit, p2p
from allnc.kernels._common import Blocks, uses_waves
from allnc.kernels.hycon import classes, loss, lse, panels, waves

TRITON_TYPE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

# Types of the arguments that are not float32 pointers or int32 numbers; "*z" is a pointer to the activations' type.
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("temperature", "p2p_temperature", "mean_weight"), "fp32"),
    **dict.fromkeys(("z_ptr", "mu_ptr", "dz_ptr", "dmu_ptr", "rows_ptr", "k_ptr", "means_ptr", "dmeans_ptr"), "*z"),
    "order_ptr": "*i32",
    "seen_ptr": "*i1",
    "contrast": panels.Contrast(z="*z", mu="*z", a="*fp32", b="*fp32"),
    "labels": classes.Labels(given="*i64", ordered="*i64", order="*i64"),
    "prepared": classes.Prepared(state="*fp32", index="*i32", sums="*fp32", rows="*z"),
    "classes": p2p.Classes(x="*fp32", y="*fp32", seen="*i1"),
    **dict.fromkeys(("x", "u", "du", "dx"), centred_unit.Sides(x="*fp32", y="*fp32")),
}
_ALIGNED = {"width"}  # a multiple of 64, which the launcher's specialisation sees

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block, CUDA C++ Programming Guide


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One kernel at one set of compile-time arguments, for one architecture."""

    kernel: str
    arch: int
    dtype: str
    precision: str
    dim: int
    mode: str
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def blocks(self) -> Blocks:
        """Its tiles; zeros for a kernel that has none."""
        return self.constants.get("blocks", Blocks(self.dim, 0, 0, 0, 0, False, self.precision))


@dataclasses.dataclass(frozen=True, slots=True)
class Resources:
    """What a variant's code uses: registers a thread, bytes a block, tensor memory columns, instructions in the code.

    `loops` are those of sass.py that multiply on tensor cores or take exponentials.
    """

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    instructions: int
    counts: dict[str, int]
    loops: list[Section]
    outside: Section

    def fullest(self, count: Callable[[Section], int]) -> int:
        """The most of something in one loop; in the code that is in no loop where none has any."""
        return max(map(count, self.loops), default=0) or count(self.outside)


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What one trip through a variant's loops must hold, from its tile and the formulas.

    Attributes:
        products: multiply-adds that each warp (`multiplies_by_warp`) or group of four warps (sm_90) issues in the loop
            that ends a tile, and in the one over chunks of columns; 0 for a loop that has none.
        issued: tensor-core instructions of these loops on sm_100, whose code does not show their shape: each takes the
            whole tile and 32 bytes of depth.
        exponentials: EX2 a thread and tile; in the running-maximum forward without the few that rescale the sums.
    """

    products: tuple[int, int]
    issued: tuple[int, int]
    exponentials: int


_KERNELS: dict[str, Any] = {
    "hycon_lse_fwd": lse.hycon_lse_fwd_kernel,
    "hycon_lse_finish": lse.hycon_lse_finish_kernel,
    "hycon_lse_terms": lse.hycon_lse_terms_kernel,
    "hycon_lse_bwd": lse.hycon_lse_bwd_kernel,
    "hycon_wave": waves.hycon_wave_kernel,
    "hycon_prepare": classes.hycon_prepare_kernel,
    "hycon_loss_fwd": loss.hycon_loss_fwd_kernel,
    "hycon_loss_bwd": loss.hycon_loss_bwd_kernel,
    "all_around_fwd": all_around.all_around_fwd_kernel,
    "p2p_fwd": p2p.p2p_fwd_kernel,
    "p2p_finish": p2p.p2p_finish_kernel,
    "p2p_bwd": p2p.p2p_bwd_kernel,
    "unit_sums": centred_unit.unit_sums_kernel,
    "unit_rows": centred_unit.unit_rows_kernel,
    "unit_bwd_sums": centred_unit.unit_bwd_sums_kernel,
    "unit_bwd_rows": centred_unit.unit_bwd_rows_kernel,
}

# Those whose loops the formulas predict.
PREDICTED = ("hycon_lse_fwd", "hycon_lse_bwd", "hycon_wave", "hycon_loss_fwd", "hycon_loss_bwd")

_CLASSES = 1000  # C, where block sizes depend on it
_SMALL_BATCH, _LARGE_BATCH = 512, 65536  # N, where they depend on it


def variants(
    archs: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[torch.dtype],
    precision: str,
    kernels: Sequence[str] = tuple(_KERNELS),
    features: int = 512,
) -> Iterator[Variant]:
    """Every variant the launchers choose for these shapes and types, with class means.

    Args:
        archs: compute capabilities, 80, 90 or 100.
        dims: D.
        dtypes: of the activations.
        precision: value of torch.get_float32_matmul_precision() to choose for; it only matters to float32.
        kernels: names, without "_kernel".
        features: F of the class means and classifier, for all_around and the kernels of P2P, which are float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for arch in archs:
            for dtype in dtypes:
                for dim in dims:
                    found = itertools.chain(_modes(arch, dim, dtype), _loss_modes(arch, dim, dtype, features))
                    for name, mode, (constants, options) in found:
                        if name in kernels:
                            of = _precision(constants)
                            yield Variant(name, arch, TRITON_TYPE[dtype], of, dim, mode, constants, options)
            for name, mode, (constants, options) in _class_modes(features):
                if name in kernels:
                    yield Variant(name, arch, "fp32", _precision(constants), features, mode, constants, options)
    finally:
        torch.set_float32_matmul_precision(before)


def _precision(constants: dict[str, Any]) -> str:
    return constants["blocks"].precision if "blocks" in constants else "ieee"


_Mode = tuple[str, str, tuple[dict[str, Any], dict[str, Any]]]  # kernel, mode, constants and options


def _modes(arch: int, dim: int, dtype: torch.dtype) -> Iterator[_Mode]:
    """The kernels of lse: for several ranks, every mode, and many columns."""
    for mode, shifted, triangle in (("triangle", True, True), ("square", True, False), ("unshifted", False, False)):
        choice = {"has_mu": True, "shifted": shifted, "triangle": triangle, "arch": arch}
        yield "hycon_lse_fwd", mode, lse.forward_constants(dim, dtype, **choice)
    yield "hycon_lse_finish", "triangle", (lse.finish_constants(), {})
    for mode, shifted in (("shifted", True), ("unshifted", False)):
        backward = lse.backward_constants(dim, dtype, has_mu=True, shifted=shifted, arch=arch)
        yield "hycon_lse_terms", mode, (lse.terms_constants(backward[0]), {})
        if uses_waves(dim, dtype):
            yield "hycon_wave", mode, waves.wave_constants(dim, dtype, shifted=shifted, arch=arch)
        else:
            yield "hycon_lse_bwd", mode, backward


def _loss_modes(arch: int, dim: int, dtype: torch.dtype, features: int) -> Iterator[_Mode]:
    """The kernels of whole losses, for as many columns as they take."""
    if dim > loss.MAX_DIM:
        return
    for mode, sorted_labels in (("scan", False), ("sorted", True)):
        choice = {"has_mu": True, "has_seen": True, "balanced": True, "sorted_labels": sorted_labels}
        yield "hycon_prepare", mode, classes.prepare_constants(dim, **choice)
    yield "hycon_loss_fwd", "triangle", loss.loss_forward_constants(dim, dtype, has_mu=True, arch=arch)
    for target in ("etf", "softmax"):
        chosen = all_around.all_around_constants(dim, dtype, _CLASSES, features, arch=arch, target=target)
        yield "all_around_fwd", f"triangle, {target}", chosen
    for mode, num_rows, num_means in (
        ("shifted", _LARGE_BATCH, _CLASSES),
        ("shifted, small batch", _SMALL_BATCH, 100),
    ):
        sizes = {"num_rows": num_rows, "num_means": num_means}
        yield "hycon_loss_bwd", mode, loss.loss_backward_constants(dim, dtype, has_mu=True, arch=arch, **sizes)


def _class_modes(features: int) -> Iterator[_Mode]:
    """The kernels of P2P, on F columns."""
    for target in ("etf", "softmax"):
        for blocks in ("own", "all"):
            choice: dict[str, Any] = {"target": target, "blocks": blocks}
            forward = p2p.p2p_forward_constants(_CLASSES, features, torch.float32, **choice)
            yield "p2p_fwd", f"{target}, {blocks}", forward
            backward = p2p.p2p_backward_constants(_CLASSES, features, torch.float32, **choice)
            yield "p2p_bwd", f"{target}, {blocks}", backward
            yield "p2p_finish", f"{target}, {blocks}", (p2p.p2p_finish_constants(forward[0]), {})
    constants, options = centred_unit.unit_constants(features)
    for name in ("unit_sums", "unit_rows", "unit_bwd_sums", "unit_bwd_rows"):
        more = {"SHARES": centred_unit.SHARES} if name == "unit_rows" else {}
        if name.endswith("_rows"):
            more |= centred_unit.centres((True, False))
        yield name, "", (constants | more, options)


_ALIGNMENT = [["tt.divisibility", 16]]  # of pointers: as torch's allocator aligns


def _type(kind: str, variant: Variant) -> str:
    return f"*{variant.dtype}" if kind == "*z" else kind


def resources(variant: Variant) -> Resources:
    """Compile a variant for its architecture (Triton caches the result) and read its machine code."""
    kernel = _KERNELS[variant.kernel]
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: an interpreted kernel has no code. Unset it to compile")
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = _TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        if name in variant.constants:
            signature[name] = "constexpr"
        elif isinstance(kind, tuple):
            signature[name] = type(kind)(*(_type(of, variant) for of in kind))  # type: ignore[attr-defined]
            attributes |= {(index, field): _ALIGNMENT for field in range(len(kind))}
        else:
            signature[name] = _type(kind, variant)
            if kind.startswith("*") or name in _ALIGNED:
                attributes[(index,)] = _ALIGNMENT
    source = ASTSource(kernel, signature, variant.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=variant.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        code = read_code(_output(knobs.nvidia.nvdisasm.path, "-c", str(cubin)))
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        instructions=code.instructions,
        counts=code.total.counts,
        loops=[loop for loop in code.loops if any(loop.counts[kind] for kind in (*TENSOR_CORES, "MUFU.EX2"))],
        outside=code.outside,
    )


def multiplies_by_warp(variant: Variant) -> bool:
    """Whether each warp issues its own products, as on sm_80: newer instructions take panels of at least 64 rows."""
    return variant.arch == 80 or variant.blocks.block_m < 64


def predicted(variant: Variant) -> Prediction:
    """The loops of hycon's forwards, backwards and waves, by formula: S, the exponentials of S, and K times z."""
    blocks = variant.blocks
    rows, columns, chunk, gradient = blocks.block_m, blocks.block_n, blocks.block_d, blocks.block_g
    warps = variant.options["num_warps"]
    tile = rows * columns // (warps if multiplies_by_warp(variant) else warps // 4)
    depth = 32 // {"fp32": 4}.get(variant.dtype, 2)  # columns one instruction of sm_100 takes
    once = gradient and columns // depth
    per_element = 1 if variant.kernel.endswith("fwd") or variant.constants.get("SHIFTED", True) else 2
    exponentials = per_element * rows * columns // (32 * warps)
    if blocks.resident:
        return Prediction((tile * (chunk + gradient), 0), (chunk // depth + once, 0), exponentials)
    return Prediction((tile * gradient, tile * chunk), (once, chunk // depth), exponentials)


def blocks_per_multiprocessor(variant: Variant, used: Resources) -> int:
    """Blocks that run on one multiprocessor at once, as registers, shared and tensor memory and threads allow."""
    warps = variant.options.get("num_warps", 4)
    a_warp = -(-used.registers * 32 // 256) * 256  # registers are given to a warp in units of 256
    limits = [65536 // (a_warp * warps), 64 // warps, 32]
    # Of the shared memory every block takes 1 KiB more than it asks for.
    limits.append((SHARED_LIMIT[variant.arch] + 1024) // (used.shared + 1024))
    if used.tensor_memory:
        limits.append(512 // used.tensor_memory)
    return min(limits)


def resources_of_all(chosen: Sequence[Variant], workers: int | None = None) -> Iterator[tuple[Variant, Resources]]:
    """`resources` of each variant, compiled in `workers` processes (default: one a core)."""
    with ProcessPoolExecutor(workers) as pool:
        yield from zip(chosen, pool.map(resources, chosen), strict=True)


@functools.cache
def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in TRITON_TYPE:
        raise argparse.ArgumentTypeError(f"must be float16, bfloat16 or float32; got {name}")
    return dtype


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command-line arguments that choose variants."""
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--dtype", type=_dtype, nargs="+", default=[torch.bfloat16])
    parser.add_argument("--precision", default="high", choices=["highest", "high", "medium"], help="of float32")
    parser.add_argument("--kernel", nargs="+", default=list(_KERNELS), choices=list(_KERNELS))
    parser.add_argument("--mode", nargs="+", help="keep only variants whose mode starts with one of these")
    parser.add_argument("--workers", type=int)


def chosen_variants(arguments: argparse.Namespace) -> list[Variant]:
    """The variants that parsed arguments choose."""
    found = variants(arguments.arch, arguments.dim, arguments.dtype, arguments.precision, arguments.kernel)
    modes = tuple(arguments.mode or ("",))
    return [variant for variant in found if variant.mode.startswith(modes)]


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description="Compile the kernels ahead of time; one JSON line a variant.")
    add_arguments(_parser)
    _arguments = _parser.parse_args()
    for _variant, _resources in resources_of_all(chosen_variants(_arguments), _arguments.workers):
        print(json.dumps(dataclasses.asdict(_variant) | dataclasses.asdict(_resources)), flush=True)
