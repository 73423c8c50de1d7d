"""Compiles the kernels for a GPU that need not be there, and reads what they use from the machine code.

`variants` asks the launchers' own functions for block sizes and options, so that what is compiled here is
what would be launched. `resources` gives registers, stack (spills), shared memory and instruction counts of a
variant.

    python -m allnc.kernels.aot --arch 90 --dim 64 128 --dtype bfloat16

prints them as JSON, one line a variant. TRITON_INTERPRET must not be set: an interpreted kernel has no code.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from allnc.kernels import all_around, hycon, waves

TRITON_TYPE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

# Arguments that have the type of the activations; the other pointers are float32, except `seen`.
_IN_INPUT_TYPE = {"z_ptr", "mu_ptr", "dz_ptr", "dmu_ptr", "rows_ptr", "k_ptr"}
_OTHER_TYPES = {"seen_ptr": "*i1", "p2p_temperature": "fp32"}
_KINDS = ("HGMMA", "HMMA", "UTCHMMA", "MUFU.EX2", "FFMA", "SHFL", "LDGSTS", "RED")

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


@dataclasses.dataclass(frozen=True, slots=True)
class Resources:
    """What a variant's code uses: registers a thread, bytes a block, static instruction counts."""

    registers: int
    stack: int
    shared: int
    instructions: int
    counts: dict[str, int]


_KERNELS: dict[str, Any] = {
    "hycon_fwd": hycon.hycon_fwd_kernel,
    "hycon_finish": hycon.hycon_finish_kernel,
    "hycon_bwd_terms": hycon.hycon_bwd_terms_kernel,
    "hycon_bwd": hycon.hycon_bwd_kernel,
    "hycon_wave": waves.hycon_wave_kernel,
    "all_around_fwd": all_around.all_around_fwd_kernel,
}


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
        features: F of the class means and classifier, for all_around.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for arch in archs:
            for dtype in dtypes:
                for dim in dims:
                    for name, mode, (constants, options) in _modes(arch, dim, dtype, features):
                        if name in kernels:
                            of = constants.get("PRECISION", "ieee")
                            yield Variant(name, arch, TRITON_TYPE[dtype], of, dim, mode, constants, options)
    finally:
        torch.set_float32_matmul_precision(before)


def _modes(
    arch: int, dim: int, dtype: torch.dtype, features: int
) -> Iterator[tuple[str, str, tuple[dict[str, Any], dict[str, Any]]]]:
    for mode, shifted, triangle in (
        ("triangle", True, True),
        ("square", True, False),
        ("unshifted", False, False),
    ):
        choice = {"has_mu": True, "shifted": shifted, "triangle": triangle, "arch": arch}
        yield "hycon_fwd", mode, hycon.forward_constants(dim, dtype, **choice)
        for target in ("etf", "softmax"):
            chosen = all_around.all_around_constants(dim, dtype, features, torch.float32, target=target, **choice)
            yield "all_around_fwd", f"{mode}, {target}", chosen
    yield "hycon_finish", "triangle", (hycon.finish_constants(), {})
    for mode, shifted in (("shifted", True), ("unshifted", False)):
        backward = hycon.backward_constants(dim, dtype, has_mu=True, shifted=shifted, arch=arch)
        yield "hycon_bwd", mode, backward
        yield "hycon_bwd_terms", mode, (hycon.terms_constants(backward[0]), {})


def resources(variant: Variant) -> Resources:
    """Compile a variant for its architecture (Triton caches the result) and read its machine code."""
    kernel = _KERNELS[variant.kernel]
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: an interpreted kernel has no code. Unset it to compile")
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in _OTHER_TYPES:
            signature[name] = _OTHER_TYPES[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + (variant.dtype if name in _IN_INPUT_TYPE else "fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]  # as torch's allocator aligns
        else:
            signature[name] = "i32"
            if name == "width":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, variant.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=variant.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    counts = collections.Counter("MUFU.EX2" if n.startswith("MUFU.EX2") else n.split(".")[0] for n in names)
    counts["RED"] += counts["REDG"]  # the same instruction's name on newer architectures
    return Resources(
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        instructions=len(names),
        counts={kind: counts[kind] for kind in _KINDS},
    )


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
