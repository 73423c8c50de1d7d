"""The whole command on the digits: it learns, leaves a run folder, and is measured the same again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allnc import evaluate
from allnc.train import main
from allnc.trainer import loop
from allnc.trainer.checkpoint import load_weights


@pytest.mark.slow
def test_the_command_learns_and_measures_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["--train.epochs", "12", "--train.eval_every", "3", "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert " 12/12 loss" in shown and "NC4 disagreement with nearest mean" in shown
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy"] > 75 and summary["few"] > 45 and summary["nc4"] < 0.05
    assert summary["class_counts"] == [120, 86, 61, 44, 31, 22, 16, 11, 8, 6]
    for name in ("medium", "many", "nc1", "nc2_means", "nc2_weights", "nc3", "seconds", "images_per_second"):
        assert summary[name] >= 0
    assert {"torch", "allnc"} <= set(summary["versions"]) and "commit" in summary and summary["seed"] == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["accuracy"] == summary["accuracy"]
    for pattern in ("config.yaml", "last.safetensors", "state.pt", "events.*", "plots/*.png"):
        assert list(folder.glob(pattern))

    assert evaluate.main([str(folder)]) == 0
    table = capsys.readouterr().out
    for name in ("accuracy", "few", "nc1", "nc2_means", "nc3"):
        digits = 1 if name in ("accuracy", "few") else 4
        assert f"{summary[name]:.{digits}f}" in table
    config, epoch, weights = load_weights(folder)
    run = loop.Run(config)
    run.model.load_state_dict(weights)
    measured, _ = run.measure()
    assert epoch == 12 and measured == {name: summary[name] for name in measured}
