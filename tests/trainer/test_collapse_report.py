"""`allnc.evaluate RUN --collapse`: tables, collapse.json, the same numbers as the run's own, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allnc import evaluate
from allnc.trainer import loop
from allnc.trainer.collapse_report import layers_of
from tests.trainer.test_training import TINY, changed, quiet

EPOCH = {"epochs": 1, "eval_every": 1}


def report(folder: Path, *words: str) -> dict[str, Any]:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "collapse.json"}
    assert evaluate.main([str(folder), "--collapse", *words]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "collapse.json"}
    assert after == before, "nothing else is written"
    return json.loads((folder / "collapse.json").read_text())


@pytest.mark.parametrize("classifier", ["linear", "normalised"])
def test_numbers_are_the_run_s_own(classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(TINY, train=EPOCH, data={"validation": 0.3}, model={"classifier": classifier})
    summary = loop.train(config, tmp_path / "run", quiet())
    found = report(tmp_path / "run")
    assert list(found["layers"]) == ["encoder"] and found["epochs"] == 1
    assert found["class_counts"] == summary["class_counts"] and found["images"] == sum(summary["class_counts"])
    for name, value in found["layers"]["encoder"]["measures"].items():
        if name in summary:  # the rest are spectral
            assert math.isclose(value, summary[name], rel_tol=1e-6, abs_tol=1e-9), name
    assert {"nc4", "nc3", "vci", "mir", "effective_rank_weights"} <= found["layers"]["encoder"]["measures"].keys()
    shots = found["layers"]["encoder"]["by_shot"]
    assert sum(shots[name]["classes"] for name in ("many", "medium", "few")) == 10
    out = capsys.readouterr().out
    for text in ("classifier, which reads encoder", "few-few", "ideal angle 96.4", "collapse.json"):
        assert text in out
    assert f"{found['layers']['encoder']['measures']['nc1']:.3f}" in out


def test_layers_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    loop.train(changed(TINY, train=EPOCH), folder, quiet())
    found = report(folder, "--layers", "encoder.stages.1,encoder.conv")["layers"]
    assert list(found) == ["encoder.conv", "encoder.stages.1"] and "nc3" not in found["encoder.conv"]["measures"]
    assert "classifier" not in capsys.readouterr().out
    every = report(folder, "--layers", "all")["layers"]
    assert {"encoder.conv", "encoder.stages.1", "encoder", "classifier"} <= every.keys()
    assert found["encoder.conv"] == every["encoder.conv"]
    for line in capsys.readouterr().out.splitlines()[:-1]:  # which names the folder
        assert len(line.rstrip()) <= 80 and "…" not in line
    loop.train(changed(TINY, train=EPOCH), folder, quiet(), mode="overwrite")
    assert not (folder / "collapse.json").exists(), "it was of the model before"


def test_more_classes_than_a_simplex_has_room_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(changed(TINY, train=EPOCH, model={"width": 1}), tmp_path / "run", quiet())
    measures = report(tmp_path / "run")["layers"]["encoder"]["measures"]
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "RMS cosine of class vectors" in line)
    floor = math.sqrt((10 - 4) / (4 * 9))
    assert line.split()[-2:] == [f"{measures['cosine_rms_weights']:.3f}", f"{floor:.3f}"]
    assert next(line for line in out.splitlines() if "NC2 class vectors" in line).split()[-1] == "-"


def test_images_of_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "run", tmp_path / "other.npz"
    loop.train(changed(TINY, train=EPOCH), folder, quiet())
    pixels = np.random.RandomState(0).randint(0, 256, (12, 8, 8), dtype=np.uint8)
    labels = np.arange(12) % 3
    np.savez(file, images=pixels, labels=labels, test_images=pixels, test_labels=labels)
    found = report(folder, "--ood", str(file))
    assert 0 < found["layers"]["encoder"]["measures"]["nc5"] <= 1 and found["ood"] == str(file)
    assert "NC5" in capsys.readouterr().out
    np.savez(file, images=pixels, labels=labels)  # none to train on, and none to hold out: all are measured
    assert report(folder, "--ood", str(file)) == found
    capsys.readouterr()
    np.savez(file, images=pixels[:, 1:], labels=labels, test_images=pixels[:, 1:], test_labels=labels)
    for wrong, message in (
        (file, "size of the run's, 1 x 8 x 8; got 1 x 7 x 8"),
        (tmp_path / "no", "which is no file"),
    ):
        assert evaluate.main([str(folder), "--collapse", "--ood", str(wrong)]) == 2
        assert message in capsys.readouterr().err


MISTAKES = [
    (["--layers", "encoder"], "--layers would be ignored without --collapse"),
    (["--ood", "x.npz"], "--ood would be ignored without --collapse"),
    (["--collapse", "--on", "test"], "--on would be ignored with --collapse"),
    (["--collapse", "--data.test_crops", "5"], "--data.test_crops would be ignored with --collapse"),
    (["--collapse", "--layers", "encoder.stage.1"], "got 'encoder.stage.1'. Near it: 'encoder.stages.1'"),
]


def test_mistakes_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(changed(TINY, train={"epochs": 1}), tmp_path / "run", quiet())
    for words, message in MISTAKES:
        assert evaluate.main([str(tmp_path / "run"), *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "collapse.json").exists()


def test_names_of_layers() -> None:
    assert layers_of("all") == "all" and layers_of("encoder,encoder.conv") == ["encoder", "encoder.conv"]
    for text in ("", "encoder,,encoder.conv", "encoder,"):
        with pytest.raises(ValueError, match="--layers must be names with one comma"):
            layers_of(text)
