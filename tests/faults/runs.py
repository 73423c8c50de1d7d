"""A tiny run on the digits, in this process or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from allnc.config import Config, DataConfig, ModelConfig, TrainConfig
from tests.forks import Fork

TINY = Config(
    data=DataConfig(max_per_class=60, imbalance_ratio=6, many=40, few=15),
    model=ModelConfig(name="resnet8", width=4, projection_dim=16),
    train=TrainConfig(
        epochs=3, batch_size=64, precision="fp32", device="cpu", threads=1, eval_every=2, collapse_every=0
    ),
)
WORDS = ["--model.width", "4", "--data.max_per_class", "40", "--train.epochs", "2", "--train.eval_every", "9"]
Process = subprocess.Popen[str]
ROOT = Path(__file__).parents[2]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    """Return what a quiet console was told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def start(*words: str, program: str = "allnc.train", largest_file: int | None = None, **environment: str) -> Fork:
    """Start the command in a process of its own, which can write no file of more than so many bytes."""
    given = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return Fork(program, *words, environment=given, largest_file=largest_file)


def start_afresh(*words: str, **environment: str) -> Process:
    """Start the command as a shell does, by an interpreter that has imported nothing."""
    return subprocess.Popen(
        [sys.executable, "-m", "allnc.train", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*words: str, **options: Any) -> tuple[int, str]:
    """Run the command in a process of its own (see `start`); return its exit status and its standard error."""
    process = start(*words, **options)
    _, errors = process.communicate(timeout=120)
    return process.wait(0), errors


def one_line(errors: str) -> str:
    """Return the only line that a command wrote to standard error."""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    return lines[0]
