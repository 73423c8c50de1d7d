"""Time and memory of one step, measured so that figures of different providers can be compared.

Providers are interleaved (A B C, A B C, ...), because the speed of shared machines drifts; the figure is the median
with the 20th and 80th percentile. On CUDA, time is taken with events, and the L2 cache is overwritten before each run.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_WARM_UP_SECONDS = 0.3  # of runs after the first: a step that takes longer has warmed the GPU by itself

Step = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds over the counted runs."""

    median: float
    p20: float
    p80: float
    runs: int


def warm_up(variants: Sequence[Step], device: torch.device) -> Any:
    """Compile, allocate and load: the first runs, which are not counted. Returns what the first one returned."""
    value = variants[0]()
    for step in variants[1:]:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(3):
            if time.perf_counter() - started < _WARM_UP_SECONDS:
                variants[0]()
                torch.cuda.synchronize(device)
    return value


def time_interleaved(
    steps: Mapping[str, Sequence[Step]], device: torch.device, *, seconds: float, min_runs: int, warmed: bool = False
) -> dict[str, Timing]:
    """Time every provider's step, one run of each in turn.

    Args:
        steps: provider -> its step on each of several input sets, used in rotation.
        device: where the steps run.
        seconds: time to spend on the counted rounds, beyond which no new round starts once `min_runs` are done.
        min_runs: rounds to do in any case.
        warmed: every step was passed to `warm_up` already.

    Returns:
        Provider -> Timing.
    """
    if not warmed:
        for variants in steps.values():
            warm_up(variants, device)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    cache = _cache_filler(device)
    started = time.perf_counter()
    while steps and (len(next(iter(samples.values()))) < min_runs or time.perf_counter() - started < seconds):
        for name, variants in steps.items():
            step = variants[len(samples[name]) % len(variants)]
            samples[name].append(_time_once(step, device, cache))
    return {name: _summary(values) for name, values in samples.items()}


def _cache_filler(device: torch.device) -> torch.Tensor | None:
    """A tensor of twice the L2 cache of a GPU: writing it leaves nothing of a step's inputs there."""
    if device.type != "cuda":
        return None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(size, 2**20), dtype=torch.uint8, device=device)


def _time_once(step: Step, device: torch.device, cache: torch.Tensor | None) -> float:
    if cache is not None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda.synchronize(device)  # the launches of the step count: a small batch is bound by them
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    begin_s = time.perf_counter()
    step()
    return (time.perf_counter() - begin_s) * 1e3


def _summary(values: list[float]) -> Timing:
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return Timing(median=float(median), p20=float(p20), p80=float(p80), runs=len(values))


def peak_memory(step: Step, device: torch.device) -> float | None:
    """MiB that one step holds beyond what was allocated before it, at its peak; None where it cannot be told.

    On CUDA: the caching allocator's peak. On Linux CPUs: the process's peak resident set, reset before the step;
    pages the allocator kept from before are returned first, so that they do not hide what the step needs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        return None


def _status(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def available_memory() -> float | None:
    """Bytes of main memory a new allocation can have, of the machine or of this control group; None if not known."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        return free if limit == "max" else min(free, float(limit) - used)
    except OSError:
        return free
