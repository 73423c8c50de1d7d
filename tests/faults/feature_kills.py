"""Kill an extraction of features at its operations on files, resume it, and compare.

`python -m tests.faults.feature_kills DIR EVERY` tries every EVERY-th point; tests/faults/kills.py says what they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from allnc.data import load
from allnc.trainer import extract, run
from allnc.trainer.extract_command import Plan, plan
from tests.faults.kills import KILLED, forked, kill_at
from tests.faults.runs import quiet

WORDS = ["--data.max_per_class", "30", "--data.imbalance_ratio", "2", "--model.width", "4", "--train.threads", "1"]
WORDS += ["--passes", "2", "--shard_rows", "400"]  # a file a pass, two of test images


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    straight = plan([*WORDS, "--out", str(root / "straight")])
    assert straight.config is not None
    images = load(straight.config.data)  # once: the forks shall extract, not import
    run.load = lambda _, tested=False: images
    extract.git_commit = lambda: None
    run.Run(straight.config)  # imports what each fork would import again
    assert forked(lambda: extract.extract(straight, quiet())) == 0
    wanted, points, files = contents(root / "straight"), 0, set()
    for point in range(0, 10_000, int(sys.argv[2])):
        folder = root / f"killed-{point}"

        def killed(point: int = point, folder: Path = folder) -> None:
            kill_at(point, folder)
            extract.extract(straight._replace(folder=folder), quiet())

        status = forked(killed)
        if status == 0:
            break
        assert status == KILLED, (point, status)
        begun = (folder / "features.json").is_file()
        files.add(len(json.loads((folder / "features.json").read_text())["shards"]) if begun else -1)
        again = Plan(folder, "resume") if begun else straight._replace(folder=folder)
        assert forked(lambda again=again: extract.extract(again, quiet())) == 0, point
        assert contents(folder) == wanted, point
        points += 1
    print(json.dumps({"points": points, "files": sorted(files)}))


if __name__ == "__main__":
    main()
