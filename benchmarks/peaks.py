"""How fast a machine could do a loss's work at best.

    limit = max( FLOPs / peak FLOP/s, exponentials / peak exp/s, bytes / copy bandwidth )

of the best algorithm known, the same for every provider of a case, so that `limit / time` compares them. The peaks of
known GPUs are their data sheets'. Those of a CPU are measured when a run starts: a library's matrix product is not the
peak (MKL's stays far below an AMD processor's), so that multiply-adds are timed in a loop of nothing else.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from work import Work


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What a machine can do at best, per second; None where it is not known. `source` says where from."""

    flops: float
    exps: float | None
    copy: float  # bytes read and written by a copy
    source: str

    def limit_ms(self, work: Work) -> float:
        """The least time for `work`."""
        exps = work.exps / self.exps if self.exps else 0.0
        return 1e3 * max(work.flops / self.flops, exps, work.bytes / self.copy)


# Dense tensor-core rates (float32: plain FMA) of the vendor's data sheets; exponentials: 16 a clock and multiprocessor
# (CUDA programming guide, arithmetic instructions) x multiprocessors x boost clock.
GPUS = {
    # 132 multiprocessors at 1.83 GHz. The two differ only in memory. "H100 80GB" is the SXM card; PCIe is slower.
    "H200": {"bfloat16": 989e12, "float16": 989e12, "tf32": 494e12, "float32": 67e12, "float64": 67e12, "exps": 3.9e12},
    "H100 80GB": {
        "bfloat16": 989e12, "float16": 989e12, "tf32": 494e12, "float32": 67e12, "float64": 67e12, "exps": 3.9e12,
    },
    # 108 multiprocessors at 1.41 GHz.
    "A100": {
        "bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12, "float64": 19.5e12, "exps": 2.4e12,
    },
}  # fmt: skip


def peaks(device: torch.device, dtype_name: str) -> Peaks:
    """Peaks of this machine for a type: of the table for a known GPU, else measured in some seconds.

    Args:
        device: where the steps will run.
        dtype_name: bfloat16, float16, float32, float64, or tf32 for float32 inputs multiplied as TF32.
    """
    copy = _copy_bandwidth(device)
    dtype = getattr(torch, dtype_name.replace("tf32", "float32"))
    if device.type == "cpu":
        return _cpu_peaks(torch.float32 if dtype == torch.float16 else dtype, copy)  # float16 is widened
    name = torch.cuda.get_device_name(device)
    for known, rates in GPUS.items():
        if known in name:
            source = f"data sheet of {known}; copy measured"
            return Peaks(flops=rates[dtype_name], exps=rates["exps"], copy=copy, source=source)
    # torch.exp is bound by memory on a GPU: it says nothing about exponentials.
    source = "torch.mm and copy measured; exponentials not known"
    return Peaks(flops=_matrix_rate(8192, dtype, device), exps=None, copy=copy, source=source)


def _cpu_peaks(dtype: torch.dtype, copy: float) -> Peaks:
    cpu = torch.device("cpu")
    # Small enough for the cache, large enough for all threads. torch.exp2 is several times as fast as torch.exp.
    exp_type = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = (torch.zeros(1 << 18, dtype=exp_type) for _ in range(2))
    exps = x.numel() / _shortest(lambda: torch.exp2(x, out=y), cpu)
    matrix = max(_matrix_rate(size, dtype, cpu) for size in (512, 2048))
    loops = {torch.float64: [_FLOAT64], torch.bfloat16: [_BFLOAT16, _FLOAT32]}.get(dtype, [_FLOAT32])
    rates = (_multiply_add_rate(code, torch.get_num_threads()) for code in loops)
    loop = next((rate for rate in rates if rate is not None), None)
    source = ("torch.mm" if loop is None or loop < matrix else "a multiply-add loop") + ", torch.exp2 and copy measured"
    return Peaks(flops=max(matrix, loop or 0.0), exps=exps, copy=copy, source=source)


def _matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    return 2.0 * size**3 / _shortest(lambda: torch.mm(a, b, out=c), device)


# Twelve independent chains of vector multiply-adds fill the units of any current processor. LANES are the
# multiply-adds of one instruction.
_CHAINS = """
double multiply_add(long rounds) {
    Vector sums[12], zero = {0};
    for (int k = 0; k < 12; k++) { sums[k] = zero + (float)k; }  /* unlike, or the compiler makes them one */
    for (long i = 0; i < rounds; i++) {
        #pragma GCC unroll 12
        for (int k = 0; k < 12; k++) { sums[k] = STEP; }
    }
    for (int k = 1; k < 12; k++) { sums[0] += sums[k]; }
    return sums[0][0];
}
long lanes(void) { return LANES; }
"""
_PLAIN = """
typedef TYPE Vector __attribute__((vector_size(64)));
#define LANES (64 / sizeof(TYPE))
#define STEP sums[k] * (TYPE)0.999 + (TYPE)0.001
"""
_FLOAT32, _FLOAT64 = (_PLAIN.replace("TYPE", name) + _CHAINS for name in ("float", "double"))
# Pairs of bfloat16, where the processor has them; elsewhere this does not compile.
_BFLOAT16 = (
    """
#include <immintrin.h>
#ifndef __AVX512BF16__
#error "no bfloat16 products"
#endif
typedef __m512 Vector;
#define LANES 32
#define STEP _mm512_dpbf16_ps(sums[k], _mm512_cvtne2ps_pbh(one, one), _mm512_cvtne2ps_pbh(one, one))
static const __m512 one = {1};
"""
    + _CHAINS
)


def _multiply_add_rate(code: str, threads: int) -> float | None:
    """FLOP/s of multiply-adds in registers on some threads; None without a C compiler or such instructions."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    rounds = 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(code)
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", path, source]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return None
        library = ctypes.CDLL(str(path))
    library.multiply_add.argtypes, library.multiply_add.restype = [ctypes.c_long], ctypes.c_double
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        run = lambda: list(pool.map(library.multiply_add, [rounds] * threads))  # noqa: E731
        seconds = _shortest(run, torch.device("cpu"))
    return 2.0 * 12 * library.lanes() * rounds * threads / seconds


def _copy_bandwidth(device: torch.device) -> float:
    source = torch.randint(256, (2**30 if device.type == "cuda" else 2**27,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _shortest(lambda: target.copy_(source), device)


def _shortest(function: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    """Seconds of the fastest of many runs: what the machine can do, not what it does on average."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
