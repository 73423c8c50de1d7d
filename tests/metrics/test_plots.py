"""Plots: files appear and hold what they should; gaps and absent classes are drawn around."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure

from allnc.metrics import pairwise_angles
from allnc.metrics.plots import plot_angles, plot_curves
from tests.ops.test_p2p import simplex


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look inside them."""
    saved: list[Figure] = []
    original = Figure.savefig

    def savefig(self: Figure, *args, **kwargs) -> None:
        saved.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_angles_are_drawn_in_order_of_size(tmp_path: Path, figures: list[Figure]) -> None:
    means = torch.randn(10, 16)
    counts = torch.tensor([5, 300, 50, 200, 10, 400, 30, 1, 60, 90])
    plot_angles(means, 2 * simplex(10, 16), tmp_path / "angles.png", class_counts=counts)
    assert image.imread(tmp_path / "angles.png").std() > 0.05
    means_axis, weights_axis = figures[0].axes[:2]
    assert "ideal 96.4°" in means_axis.get_title()
    assert "mean 96.4°, std 0.0°" in weights_axis.get_title()
    names = [label.get_text() for label in means_axis.get_xticklabels()]
    assert names == ["5", "1", "3", "9", "8", "2", "6", "4", "0", "7"]
    texts = [text.get_text() for text in means_axis.texts]
    assert {"many", "medium", "few"} <= set(texts)


def test_absent_classes_stay_grey(tmp_path: Path, figures: list[Figure]) -> None:
    means = torch.cat((simplex(9, 16), torch.zeros(1, 16)))
    plot_angles(means, torch.randn(10, 16), tmp_path / "angles.png")
    axis = figures[0].axes[0]
    assert "mean 97.2°, std 0.0° (ideal 97.2°" in axis.get_title()
    assert len(axis.texts) == 9 * 8


def test_many_classes(tmp_path: Path) -> None:
    plot_angles(torch.randn(120, 16), torch.randn(120, 16), tmp_path / "angles.png", class_counts=range(1, 121))
    assert (tmp_path / "angles.png").stat().st_size > 10_000


def test_thousands_of_classes_are_drawn_by_groups(tmp_path: Path, figures: list[Figure]) -> None:
    """Numbers are over all pairs, cells over groups in the order of size."""
    num_classes, counts = 1001, torch.randint(1, 200, (1001,))
    means, weight = torch.randn(2, num_classes, 16).unbind()
    means[::7] = 0
    plot_angles(means, weight, tmp_path / "angles.png", class_counts=counts)
    order = torch.argsort(counts, descending=True, stable=True)
    group = torch.arange(num_classes) * 200 // num_classes
    off = ~torch.eye(num_classes, dtype=torch.bool)
    there = (means != 0).any(1)
    for axis, vectors, centre in zip(figures[0].axes, (means, weight * there[:, None]), (True, False), strict=False):
        angles = pairwise_angles(vectors, centre=centre)
        values = angles[off & ~angles.isnan()]
        assert f"mean {values.mean():.1f}°, std {values.std(correction=0):.1f}°" in axis.get_title()
        shown = np.asarray(axis.images[0].get_array())
        assert shown.shape == (200, 200)
        ordered = angles[order][:, order].where(off, torch.nan)
        for first, second in ((0, 0), (0, 199), (199, 3), (120, 121), (57, 56)):
            want = ordered[group == first][:, group == second].nanmean()
            assert shown[first, second] == pytest.approx(float(want), abs=0.02)


@pytest.mark.parametrize("num_classes", [12, 300])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(tmp_path: Path, num_classes: int, value: float) -> None:
    means, weight = torch.randn(2, num_classes, 8).unbind()
    for name, bad in (("means", means), ("weight", weight)):
        bad[3, 2] = value
        with pytest.raises(ValueError, match=f"{name} must be finite; got NaN or infinity"):
            plot_angles(means, weight, tmp_path / "angles.png")
        bad[3, 2] = 0.0


def test_curves(tmp_path: Path, figures: list[Figure]) -> None:
    records = [{"epoch": e, "accuracy": 50.0 + e, "few": None, "loss": 1 / e, "lr": 0.1} for e in range(1, 8)]
    records[3]["loss"] = math.nan
    for record in records[::3]:
        record.update(nc1=0.0 if record["epoch"] == 1 else 2.0, nc2_means=0.5, nc4=0.25)
    plot_curves(records, tmp_path / "curves.png")
    assert image.imread(tmp_path / "curves.png").std() > 0.05
    lines = {axis.get_title().split(":")[0]: axis.lines for axis in figures[0].axes if axis.lines}
    assert set(lines) == {"Accuracy", "Training loss", "NC1", "NC2", "NC4"}
    assert np.asarray(lines["Training loss"][0].get_xdata()).tolist() == [1, 2, 3, 5, 6, 7]
    assert np.asarray(lines["NC1"][0].get_xdata()).tolist() == [
        4,
        7,
    ]  # zero has no place on a logarithmic axis
    assert np.asarray(lines["NC4"][0].get_ydata()).tolist() == [25, 25, 25]
    assert len(lines["Accuracy"]) == 1


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records must hold a number to draw; got 1 records"):
        plot_curves([{"epoch": 1, "lr": 0.1}], tmp_path / "curves.png")
    with pytest.raises(ValueError, match=r"weight must have shape \[3, 4\]; got \[2, 4\]"):
        plot_angles(torch.randn(3, 4), torch.randn(2, 4), tmp_path / "angles.png")
