"""Plots: files appear and hold what they should; gaps and absent classes are drawn around; runs share their scales."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure
from PIL import Image

from allnc.metrics import ideal_angle, pairwise_angles
from allnc.metrics.plots import (
    COSINES,
    ClassVectors,
    Scene,
    animate_scenes,
    appearance,
    compare_curves,
    plot_angles,
    plot_class_sizes,
    plot_curves,
    plot_layer_curves,
    plot_layers,
    plot_scenes,
    save,
)
from allnc.metrics.plots.simplex import nearest_simplex
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
    plot_angles([ClassVectors(means, 2 * simplex(10, 16), class_counts=counts)], tmp_path / "angles.png")
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
    plot_angles([ClassVectors(means, torch.randn(10, 16))], tmp_path / "angles.png")
    axis = figures[0].axes[0]
    assert "mean 97.2°, std 0.0° (ideal 97.2°" in axis.get_title()
    assert len(axis.texts) == 9 * 8


def test_many_classes(tmp_path: Path) -> None:
    run = ClassVectors(torch.randn(120, 16), torch.randn(120, 16), class_counts=range(1, 121))
    plot_angles([run], tmp_path / "angles.png")
    assert (tmp_path / "angles.png").stat().st_size > 10_000


def test_thousands_of_classes_are_drawn_by_groups(tmp_path: Path, figures: list[Figure]) -> None:
    """Numbers are over all pairs, cells over groups in the order of size."""
    num_classes, counts = 1001, torch.randint(1, 200, (1001,))
    means, weight = torch.randn(2, num_classes, 16).unbind()
    means[::7] = 0
    plot_angles([ClassVectors(means, weight, class_counts=counts)], tmp_path / "angles.png")
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
            plot_angles([ClassVectors(means, weight)], tmp_path / "angles.png")
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


def test_the_share_of_a_branch_is_on_no_axis_of_losses(tmp_path: Path, figures: list[Figure]) -> None:
    records = [{"epoch": e, "loss": 5.0 / e, "eta": 1 - e / 4} for e in (1, 2, 3)]
    plot_curves(records, tmp_path / "curves.png")
    left, right = figures[0].axes
    assert left.get_title() == "Training loss" and len(left.lines) == 1
    assert np.asarray(right.lines[0].get_ydata()).tolist() == [0.75, 0.5, 0.25]
    assert right.get_ylim() == (0, 1.05) and right.get_ylabel().startswith("η")


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records must hold a number to draw; got 1 records"):
        plot_curves([{"epoch": 1, "lr": 0.1}], tmp_path / "curves.png")
    with pytest.raises(ValueError, match=r"weight must have shape \[3, 4\]; got \[2, 4\]"):
        plot_angles([ClassVectors(torch.randn(3, 4), torch.randn(2, 4))], tmp_path / "angles.png")
    with pytest.raises(ValueError, match="runs must hold at least one run; got none"):
        plot_angles([], tmp_path / "angles.png")


def vectors(label: str, counts: list[int], dim: int = 8) -> ClassVectors:
    means, weight = torch.randn(2, len(counts), dim).unbind()
    return ClassVectors(means, weight, label, counts)


def test_angles_of_several_runs_have_one_scale_and_one_order(tmp_path: Path, figures: list[Figure]) -> None:
    """The scale reaches as far as the furthest of all angles; the order is that of the most imbalanced run."""
    long_tailed = vectors("b", [5, 300, 50, 200, 10])
    even = ClassVectors(simplex(5, 8), simplex(5, 8), "a", [200] * 5)
    plot_angles([even, long_tailed], tmp_path / "angles.png")
    panels = [axis for axis in figures[0].axes if axis.images]
    assert [panel.get_title().split(":")[0] for panel in panels] == ["a", "b", "a", "b"]
    limits = {panel.images[0].get_clim() for panel in panels}
    assert len(limits) == 1
    low, high = limits.pop()
    drawn = np.concatenate([np.asarray(panel.images[0].get_array()).ravel() for panel in panels])
    far = np.nanmax(np.abs(drawn - ideal_angle(5)))
    assert (low, high) == pytest.approx((ideal_angle(5) - far, ideal_angle(5) + far), rel=1e-6)
    for panel in panels:
        assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "3", "2", "4", "0"]
    angles = pairwise_angles(long_tailed.means, centre=True)
    shown = np.asarray(panels[1].images[0].get_array())
    assert shown[0, 1] == pytest.approx(float(angles[1, 3])) and shown[4, 2] == pytest.approx(float(angles[0, 2]))


def test_groups_that_another_order_tears_apart_are_not_marked(tmp_path: Path, figures: list[Figure]) -> None:
    plot_angles([vectors("a", [300, 50, 5, 5]), vectors("b", [5, 40, 5, 90])], tmp_path / "angles.png")
    texts = [[text.get_text() for text in axis.texts] for axis in figures[0].axes if axis.images]
    assert "many" in texts[0] and "many" in texts[2]
    assert not {"many", "medium", "few"} & {*texts[1], *texts[3]}


@pytest.mark.parametrize("plot", [plot_angles, plot_class_sizes])
def test_runs_of_other_classes_are_refused(plot, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"same number of classes; got 5 in a, 4 in b: draw them apart"):
        plot([vectors("a", [1] * 5), vectors("b", [1] * 4)], tmp_path / "x.png")
    less = vectors("b", [1] * 5)
    less.means[2] = 0
    with pytest.raises(ValueError, match=r"classes that have a mean; got 5 in a, 4 in b"):
        plot([vectors("a", [1] * 5), less], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_curves_of_several_runs_share_their_panels(tmp_path: Path, figures: list[Figure]) -> None:
    runs = {
        "a": [{"epoch": e, "cosine_std_means": 0.1 * e, "cosine_std_weights": 0.2} for e in (1, 2, 3)],
        "b": [{"epoch": e, "cosine_std_means": 0.5} for e in (2, 4)],
    }
    compare_curves(runs, tmp_path / "cosines.png", COSINES)
    means, weights = figures[0].axes
    assert [line.get_label() for line in means.lines] == ["a", "b"]
    assert np.asarray(means.lines[1].get_xdata()).tolist() == [2, 4]
    assert [line.get_label() for line in weights.lines] == ["a"]
    assert means.lines[0].get_color() != means.lines[1].get_color() == appearance(1)["color"]
    assert means.lines[0].get_marker() != means.lines[1].get_marker()
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    runs["b"] = [{"epoch": 1, "accuracy": 3.0}]
    with pytest.raises(ValueError, match="the records of b must hold one of cosine_std_means, cosine_std_weights; got"):
        compare_curves(runs, tmp_path / "cosines.png", COSINES)


def test_a_simplex_has_equal_lengths_and_angles_at_every_class_size(tmp_path: Path, figures: list[Figure]) -> None:
    run = ClassVectors(3 + simplex(6, 8), 2 * simplex(6, 8), "a", [100, 50, 20, 10, 5, 2])
    plot_class_sizes([run], tmp_path / "sizes.svg")
    for number, axis in enumerate(figures[0].axes):
        points, ideal = axis.lines
        assert np.asarray(points.get_xdata()).tolist() == [100, 50, 20, 10, 5, 2]
        wanted = 1.0 if number < 2 else ideal_angle(6)
        assert np.asarray(points.get_ydata()) == pytest.approx(np.full(6, wanted), rel=1e-5)
        assert np.asarray(ideal.get_ydata()) == pytest.approx(wanted)


def test_angles_over_class_sizes_are_means_and_minima(
    tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allnc.metrics.plots.sizes._BLOCK_ENTRIES", 14)  # two rows at a time
    run = vectors("a", [9, 8, 7, 6, 5, 4, 3])
    run.means[2] = 0
    plot_class_sizes([run], tmp_path / "sizes.png")
    there = run.there
    for column, (rows, centre) in enumerate(((run.means, True), (run.weight * there[:, None], False))):
        angles = pairwise_angles(rows, centre=centre)[there][:, there]
        off = angles + torch.diag(torch.full((6,), torch.inf, dtype=torch.float64))
        mean, least = (np.asarray(figures[0].axes[row + column].lines[0].get_ydata()) for row in (2, 4))
        assert mean == pytest.approx((angles.sum(1) / 5).numpy())
        assert least == pytest.approx(off.amin(1).numpy())
    with pytest.raises(ValueError, match="class_counts of a must be given; got None"):
        plot_class_sizes([run._replace(class_counts=None)], tmp_path / "sizes.png")


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 2), (3, 2), (3, 3), (4, 3), (5, 9)])
def test_the_nearest_simplex_is_one_and_the_nearest(num_classes: int, dim: int) -> None:
    means = torch.randn(num_classes, dim, dtype=torch.float64)
    found = nearest_simplex(means)
    assert found is not None
    wanted = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(found @ found.T, wanted)
    for _ in range(50):  # no small turn of it is nearer
        turn, _ = torch.linalg.qr(torch.eye(dim, dtype=torch.float64) + 0.1 * torch.randn(dim, dim).double())
        turn = turn * turn.diagonal().sign()
        assert (found @ turn * means).sum() <= (found * means).sum() + 1e-12
    own = 5 * found + torch.randn(dim).double()  # a simplex elsewhere is its own nearest
    torch.testing.assert_close(nearest_simplex(own), found)


def test_no_simplex_fits_in_too_few_dimensions() -> None:
    assert nearest_simplex(torch.randn(4, 2)) is None


def scene(dim: int, title: str = "a", num_classes: int = 3) -> Scene:
    labels = torch.arange(num_classes).repeat_interleave(10)
    features = torch.randn(num_classes, dim)[labels] + 0.1 * torch.randn(len(labels), dim)
    return Scene(features, labels, torch.randn(num_classes, dim), title, "note", ("x", "y", "z"))


@pytest.mark.parametrize("dim", [2, 3])
def test_scenes_show_means_weights_and_the_simplex(dim: int, tmp_path: Path, figures: list[Figure]) -> None:
    shown = scene(dim)
    plot_scenes([shown, scene(dim, "b")], tmp_path / "simplex.png")
    axis = figures[0].axes[0]
    assert axis.get_title() == "a\nnote"
    points = [line for line in axis.lines if len(np.asarray(line.get_xdata())) == 1]
    assert [line.get_marker() for line in points] == ["o", "*", "s", "*", "^", "*"]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()][-3:] == ["x: 10 images", "y: 10 images", "z: 10 images"]
    if dim == 2:  # the means, centred, with mean square length 1
        means = torch.stack([shown.features[shown.labels == c].mean(0) for c in range(3)])
        means = means - means.mean(0)
        means = means / means.square().sum(1).mean().sqrt()
        drawn = np.array(
            [np.concatenate([np.ravel(line.get_xdata()), np.ravel(line.get_ydata())]) for line in points[::2]]
        )
        assert drawn == pytest.approx(means.numpy(), abs=1e-5)


def test_scenes_move(tmp_path: Path) -> None:
    animate_scenes([(f"epoch {e}", [scene(2), scene(2)]) for e in range(3)], tmp_path / "a.gif", milliseconds=50)
    with Image.open(tmp_path / "a.gif") as film:
        assert getattr(film, "n_frames", 1) == 3
        assert film.info["duration"] == 50
        film.seek(2)
        assert film.info["duration"] == 1000
    with pytest.raises(ValueError, match="frames must hold at least one moment"):
        animate_scenes([], tmp_path / "a.gif")


def test_scenes_that_cannot_be_drawn_are_named(tmp_path: Path) -> None:
    def fails(*scenes: Scene) -> str:
        with pytest.raises(ValueError) as error:
            plot_scenes(scenes, tmp_path / "x.png")
        return str(error.value)

    assert "features of a must have 2 or 3 dimensions to be drawn; got 4" in fails(scene(4))
    assert "same number of features; got 2 in a, 3 in b" in fails(scene(2), scene(3, "b"))
    assert "weight must have shape [C, 2]; got [3, 3]" in fails(scene(2)._replace(weight=torch.randn(3, 3)))
    assert "got [10, 10, 10, 0] features" in fails(scene(2)._replace(weight=torch.randn(4, 2)))
    assert "must hold at least one run" in fails()


def test_svg_is_the_same_each_time(tmp_path: Path) -> None:
    run = vectors("a", [30, 20, 10])
    for name in ("a.svg", "b.svg"):
        plot_angles([run], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_a_palette_keeps_the_colours_of_a_heat_map(tmp_path: Path, figures: list[Figure]) -> None:
    plot_angles([vectors(name, [9] * 12) for name in "ab"], tmp_path / "angles.png")
    figure = figures[0]
    save(figure, tmp_path / "angles.png")  # again: the panels' places settle at the second drawing
    figure.savefig(tmp_path / "whole.png")
    with Image.open(tmp_path / "whole.png") as whole:
        wanted = np.asarray(whole.convert("RGB")).astype(int)
    with Image.open(tmp_path / "angles.png") as written:
        assert written.mode == "P"
        error = np.abs(np.asarray(written.convert("RGB")).astype(int) - wanted).max(2)
    assert error.mean() < 1 and np.percentile(error, 99) < 16  # of 255; an octree's mean is 3


def test_layers_are_drawn_in_their_order(tmp_path: Path, figures: list[Figure]) -> None:
    layers = {
        "conv": {"cdnv": 2.0, "nc4": 0.5},
        "stage": {"cdnv": None, "nc4": 0.25},
        "features": {"cdnv": 0.5, "nc4": 0.0},
    }
    plot_layers({"a": layers, "b": layers}, tmp_path / "layers.png")
    by_title = {axis.get_title().split(" ")[1]: axis for axis in figures[0].axes if axis.lines}
    assert set(by_title) == {"CDNV", "not"}
    first = by_title["not"].lines[0]
    assert np.asarray(first.get_ydata()).tolist() == [50, 25, 0]
    assert [label.get_text() for label in by_title["not"].get_xticklabels()] == ["conv", "stage", "features"]
    assert np.asarray(by_title["CDNV"].lines[0].get_xdata()).tolist() == [0, 2]
    with pytest.raises(ValueError, match="same layers; got conv, stage, features in a, conv in b: draw them apart"):
        plot_layers({"a": layers, "b": {"conv": layers["conv"]}}, tmp_path / "layers.png")
    with pytest.raises(ValueError, match="at least one run with a layer; got none"):
        plot_layers({}, tmp_path / "layers.png")


def test_layers_over_the_epochs_have_a_row_for_each_run(tmp_path: Path, figures: list[Figure]) -> None:
    def records(factor: float) -> list[dict]:
        return [
            {"epoch": 1, "layers": {"conv": {"nc4": factor, "nc3": None}, "features": {"nc4": factor / 2}}},
            {"epoch": 2},
            {"epoch": 3, "layers": {"conv": {"nc4": factor / 4}, "features": {"nc4": 0.0}}},
        ]

    plot_layer_curves({"a": records(1), "b": records(0.5)}, tmp_path / "layers.png")
    upper, lower = figures[0].axes
    assert upper.get_title().startswith("NC4") and not lower.title.get_visible()
    assert [line.get_label() for line in lower.lines] == ["conv", "features"]
    assert np.asarray(lower.lines[0].get_xdata()).tolist() == [1, 3]
    assert np.asarray(lower.lines[0].get_ydata()).tolist() == [50, 12.5]
    assert upper.lines[0].get_color() == lower.lines[0].get_color() != upper.lines[1].get_color()
    assert upper.get_ylim() == lower.get_ylim() and lower.get_ylabel().startswith("b\n")
    with pytest.raises(ValueError, match="records of b must hold measures of layers; got none: train with"):
        plot_layer_curves({"a": records(1), "b": [{"epoch": 1}]}, tmp_path / "layers.png")
    with pytest.raises(ValueError, match="at least one run with a layer; got none"):
        plot_layer_curves({}, tmp_path / "layers.png")
    with pytest.raises(ValueError, match="same layers; got conv, features in a, conv in b: draw them apart"):
        plot_layer_curves({"a": records(1), "b": [{"epoch": 1, "layers": {"conv": {"nc4": 1.0}}}]}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="layers must have a number to draw, such as trace_ratio"):
        plot_layer_curves({"a": [{"epoch": 1, "layers": {"conv": {"nc4": None}}}]}, tmp_path / "layers.png")
