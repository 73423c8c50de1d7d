"""A trained run: the report measures what its folder does not hold, and shows the images that it was wrong about."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.metrics.plots import ClassVectors
from allnc.report.__main__ import main
from allnc.report.angles import ANGLE_CELLS, angle_maps
from allnc.report.runs import read_run
from allnc.trainer import ending, loop

TINY = Config(
    data=DataConfig(name="arrays", root="four.npz", augmentation="none", views=1, many=10, few=5),
    model=ModelConfig(name="resnet8", width=2),
    loss=LossConfig(name="ce"),
    train=TrainConfig(epochs=2, batch_size=16, precision="fp32", device="cpu", threads=1, collapse_every=1),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on 60 images of noise, of which it knows little."""
    folder = tmp_path_factory.mktemp("runs")
    data = np.random.RandomState(0)
    images, labels = data.randint(0, 256, (60, 8, 8), np.uint8), np.arange(60) % 4
    np.savez(folder / "four.npz", images=images, labels=labels, test_images=images[:20], test_labels=labels[:20])
    config = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, root=str(folder / "four.npz")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "plot_angles", lambda *_: None)
        patch.setattr(ending, "plot_curves", lambda *_: None)
        patch.setattr(ending, "plot_confusion", lambda *_, **__: None)
        loop.train(config, folder / "run", Console(file=io.StringIO()))
    (folder / "run" / "predictions.npz").unlink(missing_ok=True)  # as in runs of older versions
    return folder / "run"


def test_a_run_without_predictions_is_measured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main([str(run), "--out", str(out)]) == 0
    assert "measuring the training images and test images" in capsys.readouterr().out
    page, summary = out.read_text(), json.loads((run / "summary.json").read_text())
    assert f"<td>{summary['accuracy']:.1f}</td>" in page and f"<td>{summary['nc3']:.3f}</td>" in page
    wrong = round(20 * (1 - summary["accuracy"] / 100))
    assert page.count('<img src="data:image/png;base64,') == wrong > 0
    assert "run: class means, centred" in page and "run: classifier vectors" in page
    assert "missing" not in re.sub(r"<script>.*?</script>", "", html.unescape(page), flags=re.DOTALL)


def test_data_that_are_gone_are_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main([str(run), "--out", str(out), "--data.root", str(tmp_path / "gone.npz")]) == 0
    said = capsys.readouterr().out
    assert "the angles between classes and all of the predictions are missing:" in said and "gone.npz" in said
    assert "Learning rate" in out.read_text() and "Confusions" not in out.read_text()


def test_angles_of_thousands_of_classes_are_drawn_by_groups(run: Path) -> None:
    torch.manual_seed(0)
    counts = (1000 / torch.arange(1, 3001)).ceil()
    vectors = ClassVectors(torch.randn(3000, 16), torch.randn(3000, 16), "run", counts)
    bare = read_run(run, "run", measure=False, root=None, device=None, say=lambda line: None)
    figures = angle_maps([dataclasses.replace(bare, vectors=vectors)])
    assert [figure.title for figure in figures] == ["run: class means, centred", "run: classifier vectors"]
    assert "Cells are means over groups of about 30 classes." in figures[0].note
    cells = re.search(r'data-cells="\[([^"]*)\]"', str(figures[0].svg))
    assert cells is not None and len(cells[1].split(",")) == ANGLE_CELLS**2
