"""Ranks, parts of a batch and batch sizes through the real command: the same losses, memory and images/s.

    python benchmarks/large_batch.py [--batch 512 1024] [--ranks 1 2] [--micro 0 128 32] [--norm group batch] FOLDER

Every run is `torchrun -m allnc.train --config fashion_lt` for some epochs in float32, in random order and repeated, so
that a busy machine hits all alike. Loss is the mean of each epoch, `apart` its largest distance to that of one process
with whole batches (same batch and normalisation), relative; memory is the growth of the largest process from the
first import to its peak; images/s is the median over repetitions. FOLDER gets large_batch.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


class Setting(NamedTuple):
    """What differs between the rows; micro 0 is the whole batch."""

    norm: str
    batch: int
    ranks: int
    micro: int


def worker(notes: str, words: list[str]) -> int:
    """Train in this process and note how its memory grew."""
    import allnc.trainer.loop  # noqa: F401  # what every run loads
    from allnc.train import main as train

    status = Path("/proc/self/status").read_text()
    before = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024
    code = train(words)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    place = Path(notes) / f"rank{os.environ.get('RANK', '0')}.json"
    place.write_text(json.dumps({"before": before, "peak": peak}))
    return code


def measure(setting: Setting, epochs: int, threads: int) -> dict[str, Any]:
    """Run one setting; return losses by epoch, bytes and images/s."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [
            *("--config", "fashion_lt", "--train.epochs", str(epochs), "--train.precision", "fp32"),
            *("--model.norm", setting.norm, "--train.batch_size", str(setting.batch), "--train.collapse_every", "0"),
            *("--train.threads", str(max(1, threads // setting.ranks)), "--train.warmup_epochs", "1"),
            *("--train.eval_every", str(epochs), "--out", str(folder / "run")),
        ]
        words += ["--train.micro_batch", str(setting.micro)] if setting.micro else []
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // setting.ranks)), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *launcher, __file__, "--worker", name, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{setting}: {done.stderr.strip()[-2000:]}")
        notes = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "run" / "summary.json").read_text())
        return {
            "losses": [record["loss"] for record in records],
            "bytes": max(note["peak"] - note["before"] for note in notes),
            "images_per_second": summary["images_per_second"],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--micro", type=int, nargs="+", default=[0, 128, 32])
    parser.add_argument("--norm", nargs="+", choices=["group", "batch"], default=["group", "batch"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all processes together")
    options = parser.parse_args()
    settings = [
        Setting(norm, batch, ranks, micro)
        for norm in options.norm
        for batch in options.batch
        for ranks in options.ranks
        for micro in options.micro
    ]
    console, found = Console(), {setting: [] for setting in settings}
    for _ in range(options.repeat):
        for setting in random.sample(settings, len(settings)):
            found[setting].append(measure(setting, options.epochs, options.threads))
            console.print(setting, found[setting][-1], soft_wrap=True, highlight=False)
    table = Table("norm", "batch", "ranks", "parts of", "losses by epoch", "apart", "memory MiB", "images/s", "n")
    rows = []
    for setting, runs in found.items():
        reference = found.get(setting._replace(ranks=1, micro=0), runs)[0]["losses"]
        apart = max(abs(a / b - 1) for run in runs for a, b in zip(run["losses"], reference, strict=True))
        memory, speed = (median(run[name] for run in runs) for name in ("bytes", "images_per_second"))
        row = setting._asdict() | {"losses": runs[0]["losses"], "apart": apart, "bytes": memory}
        rows.append(row | {"images_per_second": [run["images_per_second"] for run in runs]})
        table.add_row(
            *(setting.norm, str(setting.batch), str(setting.ranks), str(setting.micro or "-")),
            " ".join(f"{loss:.4f}" for loss in runs[0]["losses"]),
            *(f"{apart:.1e}", f"{memory / MIB:.0f}", f"{speed:.0f}", str(len(runs))),
        )
    console.print(table)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "large_batch.json").write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2], sys.argv[3:]))
    sys.exit(main())
