"""Whole sweeps of tiny runs: recorded once, resumed, and honest about runs that fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from allnc.sweep.__main__ import main
from allnc.sweep.execute import run_folder
from allnc.sweep.plan import read_sweep
from allnc.sweep.record import read

TINY = {
    "baseline": "ce",
    "seeds": [0],
    "options": {
        "train.threads": 1,
        "train.epochs": 1,
        "train.collapse_every": 0,
        "data.max_per_class": 30,
        "data.imbalance_ratio": 5,
        "model.width": 2,
    },
    "data": {"digits": {"config": "digits_lt"}},
    "methods": {"ce": {"loss.name": "ce"}, "focal": {"loss.name": "focal"}},
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_sweep_trains_what_is_missing_and_nothing_twice(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(sweep), "--out", str(out), "--dry_run"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2 and not out.exists()
    assert commands[0].startswith("python -m allnc.train --config digits_lt --train.threads=1")
    assert main([str(sweep), "--out", str(out)]) == 0
    assert "2 runs, 2 to train" in capsys.readouterr().out
    assert "| focal | 1 |" in (out / "table.md").read_text()
    lines = (out / "runs.jsonl").read_bytes()

    record = json.loads(lines.splitlines()[0])
    assert record["summary"]["balanced"] == pytest.approx(record["summary"]["accuracy"])  # 50 images of each class
    assert record["summary"]["images"]["test"].startswith("500 (SHA-256 ")

    (out / "table.md").unlink()
    assert main([str(sweep), "--out", str(out)]) == 0
    assert "2 runs, 0 to train" in capsys.readouterr().out
    assert (out / "table.md").exists() and (out / "runs.jsonl").read_bytes() == lines

    (out / "runs.jsonl").write_bytes(lines.splitlines(keepends=True)[0] + b'{"half')  # killed while writing
    place = run_folder(out, read_sweep(sweep).jobs[1])
    before = (place / "last.safetensors").stat().st_mtime_ns
    assert main([str(sweep), "--out", str(out)]) == 0  # the folder has the finished run: it is recorded, not trained
    assert len(read(out)) == 2 and (place / "last.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"diverges": {"loss.name": "ce", "train.lr": 1e30}, "ce": {"loss.name": "ce"}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(TINY | {"methods": methods}, sort_keys=False))
    assert main([str(path), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 2
    said = capsys.readouterr()
    assert "1 of 2 runs failed: digits diverges seed 0 says why in" in said.err
    assert "must stay finite" in (tmp_path / "out/runs/digits/diverges/seed0.log").read_text()
    assert "digits ce seed 0: " in said.out
    assert [result.method for result in read(tmp_path / "out")] == ["ce"]


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_and_the_same_command_continues(tmp_path: Path) -> None:
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    long = TINY | {"options": TINY["options"] | {"train.epochs": 400}, "methods": {"ce": {"loss.name": "ce"}}}
    path.write_text(yaml.safe_dump(long, sort_keys=False))
    command = [sys.executable, "-m", "allnc.sweep", str(path), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    run = out / "runs/digits/ce/seed0"
    deadline = time.monotonic() + 60
    while not (run / "checkpoint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; the same command continues" in said
    assert "stopped; --resume --out" in (run.parent / "seed0.log").read_text()
    assert read(out) == []


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"data": 1}\n')
    with pytest.raises(ValueError, match=r"must hold a finished run in each line; line 1 does not"):
        read(tmp_path)
