"""docs/tutorial.md from its first command to its last, on fewer images of as many classes."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import allnc
from allnc.__main__ import main

ROOT = Path(__file__).parent.parent
SHORT = ["--train.epochs", "2", "--train.threads", "1", "--model.width", "4"]


def folder_maker() -> object:
    spec = importlib.util.spec_from_file_location("glyph_folder", ROOT / "docs" / "examples" / "glyph_folder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_from_a_folder_to_a_model_in_use(
    grey: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = folder_maker()
    number = maker.make(tmp_path / "letters", most=12, least=5, grey=grey)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.chdir(tmp_path)
    assert main(["train", "letters", "--out", "runs/letters", "--report", *SHORT]) == 0
    said = capsys.readouterr().out
    assert f"letters: {number} images of 40 classes, 32 x 32 pixels ({number} {'L' if grey else 'RGB'})" in said
    page = (tmp_path / "runs" / "letters" / "report.html").read_text()
    assert "Ж" in page and "Δ" in page and "<svg" in page

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    images = sorted((tmp_path / "letters" / "Ж").glob("*.png"))[:3]
    assert main(["predict", "../runs/letters", *map(str, images), "--format", "csv", "--out", "out.csv"]) == 0
    with open("out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    run = allnc.load("../runs/letters")
    probabilities = run(images)
    assert [row["class_1"] for row in rows] == [run.classes[i] for i in probabilities.argmax(1)]
    assert [float(row["probability_1"]) for row in rows] == pytest.approx(probabilities.amax(1).tolist(), rel=1e-4)

    assert main(["export", "../runs/letters", "--format", "onnx", "--raw"]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "runs" / "letters" / "model.onnx"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in images])
    pixels = pixels[:, None] if grey else pixels.transpose(0, 3, 1, 2)
    logits = np.asarray(session.run(["logits"], {"images": pixels})[0])
    np.testing.assert_allclose(logits, run.logits(images).numpy(), rtol=1e-4, atol=1e-4)

    capsys.readouterr()
    assert main(["evaluate", "../runs/letters", "--data", "../letters"]) == 0
    assert f"{number} images of 40 of 40 classes" in capsys.readouterr().out
