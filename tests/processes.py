"""Several gloo processes on this machine, for tests of what crosses ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.forks import Fork

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def run_ranks(module: str, world: int, folder: Path, *arguments: str) -> list[dict[Any, Any]]:
    """What each of `world` processes `python -m MODULE RANK WORLD FOLDER ...` has passed to `save`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = (str(world), str(folder), *arguments)
    processes = [Fork(module, str(rank), *words, environment=environment) for rank in range(world)]
    end = time.monotonic() + 240
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):  # the others would wait for it
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    assert [process.wait() for process in processes] == [0] * world, [process.errors() for process in processes]
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def rank_main(work: Callable[[int, int, list[str]], dict[Any, Any]]) -> None:
    """Be one of those processes: join the others, work, save what `work(rank, world, arguments)` returns."""
    rank, world, folder, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=60),
    )
    torch.save(work(int(rank), int(world), arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
