"""`python -m allnc.theory` in small: tables, files and pictures."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allnc.theory.__main__ import main
from allnc.theory.landscape import CriticalPoint, Window
from allnc.theory.plot import plot_landscape, plot_minority
from allnc.theory.report import write_results


def test_files_hold_the_tables(tmp_path: Path) -> None:
    window = Window(1.2, [0, 30], 0.1, None, 1e-3, float("nan"), None, None, -1e-3)
    write_results(tmp_path / "new", {"focal_window": [window]})
    (record,) = json.loads((tmp_path / "new" / "results.json").read_text())["focal_window"]
    assert record["separated"] == [0, 30] and record["simplex_curvature"] is None
    with (tmp_path / "new" / "focal_window.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["probability"]) == 0.1 and row["probability_predicted"] == ""


def test_pictures_are_written(tmp_path: Path) -> None:
    point = CriticalPoint("ce", "origin", 1.0, 0.0, None, -0.1, -0.1, 0, None, 12.0, 0.0, [-0.1, 0.2])
    window = Window(1.23, [0, 30], 0.08, 0.08, 1e-3, 0.0, None, -1e-3, -1e-3)
    plot_landscape([point], [window], 30, 3.0, tmp_path / "a.png")
    panels = {str(k): (torch.rand(2, 3).double(), [0.1, 0.05, 0.01]) for k in range(4)}
    plot_minority(panels, [1, 10, 100], [0.01, 0.1], [], tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("landscape --focal_classes 10", "--focal_classes must be >= 18"),
        ("landscape --classes 1", "--classes must be >= 2; got 1"),
        ("landscape --samples 1", "--samples must be >= 2; got 1"),
        ("landscape --dim 2", "--dim must be >= 3; got 2"),
        ("landscape --samples 1000", "must be at most 5000"),
        ("landscape --focal_classes 1000", "--focal_classes at most 100"),
        ("landscape --starts 0", "--starts must be >= 1; got 0"),
        ("minority --starts 0", "--starts must be >= 1; got 0"),
        ("minority --counts 10 9 8", "two of them the smallest"),
        ("minority --counts 10 0 0", "--counts must be >= 1; got 0"),
        ("minority --cells 1", "--cells must be >= 2; got 1"),
        ("minority --out {file}/x", "Not a directory"),
    ],
)
def test_a_mistake_is_one_line_at_once(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(words.format(file=tmp_path / "file").split()) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and told.out == ""


def test_help_needs_no_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import allnc.theory.__main__ as m; m.main(['--help'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and "landscape" in result.stdout, result.stderr
