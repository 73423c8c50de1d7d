"""Kill a training at every one of its operations on files, resume it, and compare.

`python -m tests.faults.kills DIR EVERY` tries every EVERY-th point.

The kill points are all opens, renames, removals and new folders in the run folder (Python's audit events), and all
fsyncs, before which half of the file is cut off, as a power failure may do. Every training is a fork that ends in
os._exit, so that nothing is tidied up; the process that forks never trains itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from allnc.data import load
from allnc.trainer import checkpoint, ending, loop, run
from allnc.trainer.manifest import read_manifest
from tests.faults.runs import TINY, quiet

CONFIG = dataclasses.replace(
    TINY,
    data=dataclasses.replace(TINY.data, validation=0.3),  # so that there is a best epoch, too
    train=dataclasses.replace(TINY.train, epochs=2, eval_every=1),
)

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
KILLED = 9


def kill_at(point: int, folder: Path) -> None:
    """Let this process die at its `point`-th operation in the folder."""
    seen = 0
    fsync = os.fsync

    def arrive(name: str) -> bool:
        nonlocal seen
        seen += str(folder) in name
        return str(folder) in name and seen > point

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arrive(f"{arguments[0]} {arguments[1]}"):
            os._exit(KILLED)

    def torn(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if arrive(name):
            if os.path.isfile(name):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os._exit(KILLED)
        fsync(descriptor)

    os.fsync = torn
    sys.addaudithook(hook)


def forked(body: Callable[[], object]) -> int:
    """Run in a fork; return its exit status."""
    if (child := os.fork()) == 0:
        try:
            body()
        except ValueError as error:
            print(error, file=sys.stderr)
            os._exit(2)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(folder: Path) -> dict[str, Any]:
    """Return what must not depend on a kill: records and summary without times, and the weights."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    _, epoch, weights = checkpoint.load_weights(folder)
    best = checkpoint.load_weights(folder, "best")[2]
    timed = ("seconds", "images_per_second", "loader_wait")
    return {
        "records": [{k: v for k, v in record.items() if k not in timed} for record in records],
        "summary": {k: v for k, v in summary.items() if k not in timed},
        "epoch": epoch,
        "weights": {name: value.double().sum().item() for name, value in weights.items()},
        "best": {name: value.double().sum().item() for name, value in best.items()},
        "files": sorted(path.name for path in folder.rglob("*") if "tfevents" not in path.name),
    }


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    images = load(CONFIG.data)  # once: the forks shall train, not import and draw
    run.load = lambda _, tested=False: images
    ending.git_commit = lambda: None
    ending.plot_angles = ending.plot_curves = ending.plot_confusion = lambda *_, **__: None
    run.Run(CONFIG)  # imports what each fork would import again
    assert forked(lambda: loop.train(CONFIG, root / "straight", quiet())) == 0
    wanted = result(root / "straight")
    epochs: dict[str, int] = {}
    for point in range(0, 10_000, int(sys.argv[2])):
        folder = root / f"killed-{point}"

        def killed(point: int = point, folder: Path = folder) -> None:
            kill_at(point, folder)
            loop.train(CONFIG, folder, quiet())

        status = forked(killed)
        if status == 0:
            break
        assert status == KILLED, (point, status)
        manifest = read_manifest(folder) if folder.is_dir() else None
        epochs[str(point)] = 0 if manifest is None else manifest.epoch
        if manifest is not None:  # what others read, before anybody has resumed
            assert checkpoint.load_weights(folder)[1] == manifest.epoch, point
            assert checkpoint.load_weights(folder, "best")[1] <= manifest.epoch, point
        mode = "new" if not (folder / "config.yaml").is_file() else "overwrite" if manifest is None else "resume"
        assert forked(lambda m=mode, f=folder: loop.train(CONFIG, f, quiet(), mode=m)) == 0, (point, mode)
        assert result(folder) == wanted, point
    print(json.dumps({"points": len(epochs), "last": max(map(int, epochs)), "epochs": sorted(set(epochs.values()))}))


if __name__ == "__main__":
    main()
