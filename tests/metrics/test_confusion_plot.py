"""The confusion matrix as a picture: its cells, its order, its names, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from allnc.metrics.plots import MOST_CLASSES, plot_confusion
from allnc.metrics.plots.style import BLUE, RED


def test_cells_names_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr("allnc.metrics.plots.confusion.save", lambda figure, path: saved.append(figure))
    labels, predicted = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    plot_confusion(labels, predicted, "", class_counts=[5, 9, 1], classes=["a$b$", "x" * 30, "c"])
    (axis,) = saved[0].axes
    cells = np.asarray(axis.images[0].get_array())  # classes 1, 0, 2 by size
    np.testing.assert_allclose(cells[0, 0], [*to_rgb(BLUE), 1])
    np.testing.assert_allclose(cells[1, 1], [*to_rgb(BLUE), 0.75])
    np.testing.assert_allclose(cells[1, 0], [*to_rgb(RED), 0.5])
    assert not cells[2, :, 3].any()
    assert [t.get_text() for t in axis.get_yticklabels()] == ["x" * 15 + "…", r"a\$b\$", "c"]
    assert sorted(t.get_text() for t in axis.texts) == ["100", "25", "75"]
    saved[0].savefig(tmp_path / "names.png")  # the names are no formulas


@pytest.mark.filterwarnings("error")
def test_names_that_no_font_has(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, line ends and rare letters, as names of folders have them."""
    labels = torch.arange(4)
    names = ["bad\udcff", "new\nline", "tab\there", "😀"]
    plot_confusion(labels, labels, tmp_path / "odd.png", class_counts=[1, 1, 1, 1], classes=names)
    assert (tmp_path / "odd.png").is_file()


def test_many_classes_fit_and_more_are_refused(tmp_path: Path) -> None:
    labels = torch.arange(MOST_CLASSES)
    plot_confusion(labels, labels, tmp_path / "large.png", class_counts=torch.ones(MOST_CLASSES))
    assert (tmp_path / "large.png").stat().st_size > 2_000
    with pytest.raises(ValueError, match="at most 100 classes for one picture; got 101"):
        plot_confusion(labels, labels, tmp_path / "x.png", class_counts=torch.ones(101))
    with pytest.raises(ValueError, match=r"same shape \[N\]; got \[100\], \[99\]"):
        plot_confusion(labels, labels[1:], tmp_path / "x.png", class_counts=torch.ones(100))
    with pytest.raises(ValueError, match=r"must be in \[0, 99\)"):
        plot_confusion(labels, labels, tmp_path / "x.png", class_counts=torch.ones(99))
