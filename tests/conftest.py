"""Test-wide settings: interpreted Triton where there is no GPU, quiet threads, `gpu` tests skipped with a reason."""

from __future__ import annotations

import os
import signal
import tempfile

# Threads that spin while they wait slow each other down many times over when tests share their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts its thread pool

# Processes of pytest-xdist share the cores.
if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(processes))))

# torch.compile keys its cache by the forward graph alone: after a change of an op's backward, an entry of an earlier
# run would be used and call the old one. A folder of its own for each run and all its processes, removed at its end.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="allnc-compiled-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

# A shell without job control starts what runs in its background with Ctrl-C ignored, which the processes that the tests
# start and interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

torch.set_flush_denormal(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
