"""Pictures of collapse as PNG files: inter-class angles, and the measures over the epochs.

Colours are safe for colour-blind readers (Okabe-Ito lines, a purple-orange map), and lines differ in their
markers as well. Figures are drawn without pyplot, so that no display and no global state is touched.

Legend: C classes, F features.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from allnc.metrics.accuracy import shot_groups
from allnc.metrics.angles import AngleMap, angle_map, check_finite, ideal_angle, pairwise_angles
from allnc.ops._common import check_floating, check_shape

_DPI = 130
_ANNOTATED_CLASSES = 12  # up to so many classes every cell carries its angle
_LABELLED_CLASSES = 30  # up to so many classes every row is named
_MOST_CELLS = 200  # of a row: of more classes cells are means over groups, as a picture has no room for each

_BLUE, _ORANGE, _GREEN, _RED, _BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"

# Panels of the curves: title, unit of the vertical axis, whether it is logarithmic, factor, and lines: a key
# of the records, a label, a colour and a marker each.
_PANELS: tuple[tuple[str, str, bool, float, tuple[tuple[str, str, str, str], ...]], ...] = (
    (
        "Accuracy",
        "%",
        False,
        1,
        (
            ("accuracy", "all", _BLACK, "o"),
            ("many", "many-shot", _BLUE, "^"),
            ("medium", "medium-shot", _ORANGE, "s"),
            ("few", "few-shot", _RED, "v"),
        ),
    ),
    (
        "Training loss",
        "mean over the epoch",
        False,
        1,
        (("loss", "total", _BLACK, "o"), ("eta", "η", _ORANGE, "")),
    ),
    (
        "NC1: spread within classes (ideal 0)",
        "ratio, log scale",
        True,
        1,
        (
            ("nc1", r"tr($\Sigma_W\,\Sigma_B^+$)/C", _BLUE, "o"),
            ("trace_ratio", r"tr $\Sigma_W$ / tr $\Sigma_B$", _ORANGE, "s"),
            ("cdnv", "CDNV", _GREEN, "^"),
        ),
    ),
    (
        "NC2: distance to the simplex ETF (ideal 0)",
        "Frobenius norm",
        False,
        1,
        (("nc2_means", "class means", _BLUE, "o"), ("nc2_weights", "classifier", _RED, "s")),
    ),
    (
        "NC3: classifier against means (ideal 0)",
        "Frobenius norm",
        False,
        1,
        (("nc3", "‖W/‖W‖ - M/‖M‖‖", _BLUE, "o"), ("nc3_product", "‖WMᵀ/‖WMᵀ‖ - E‖", _GREEN, "s")),
    ),
    (
        "NC4: not the nearest class mean (ideal 0)",
        "% of training images",
        False,
        100,
        (("nc4", "disagreement", _BLUE, "o"),),
    ),
)


def plot_angles(
    means: Tensor,
    weight: Tensor,
    path: str | os.PathLike[str],
    *,
    class_counts: Tensor | Sequence[int] | None = None,
    many: int = 100,
    few: int = 20,
) -> None:
    """Draw the inter-class angles of class means (centred) and classifier vectors as heat maps.

    White is the ideal angle of a simplex ETF, purple is closer together, orange further apart. Of more than 200 classes
    a cell is the mean over two groups of classes that are neighbours in the picture's order; the numbers in the titles
    are over all pairs.

    Args:
        means: [C, F] floating; a row of zeros stands for a class without a mean,
            which stays grey in both maps.
        weight: [C, F] floating, classifier weight.
        path: PNG file to write.
        class_counts: [C] training images of each class; orders the classes from many to few and marks the
            groups.
        many: classes with more training images than this are many-shot.
        few: classes with fewer training images than this are few-shot.

    Raises:
        TypeError, ValueError: shapes that do not fit, entries that are not finite, or fewer than two classes.

    Source: AllNC (arXiv 2408.07253), inter-class pairwise angles.
    """
    check_floating("means", means)
    check_shape("means", means, ("C", "F"))
    check_floating("weight", weight)
    check_shape("weight", weight, tuple(means.shape))
    num_classes = len(means)
    there = (means != 0).any(1)  # [C]
    ideal = ideal_angle(int(there.sum()))
    order, borders = torch.arange(num_classes), []
    if class_counts is not None:
        counts = torch.as_tensor(class_counts).cpu()
        check_shape("class_counts", counts, (num_classes,))
        order = torch.argsort(counts, descending=True, stable=True)
        groups = shot_groups(counts, many=many, few=few)
        borders = [(name, int(mask.sum())) for name, mask in groups.items() if bool(mask.any())]

    panels = {
        "Class means, centred": _map_of(means, order, centre=True, name="means"),
        "Classifier vectors": _map_of(weight.where(there[:, None], 0), order, centre=False, name="weight"),
    }
    far = max(float((panel.cells - ideal).abs().nan_to_num(0).max()) for panel in panels.values())
    norm = TwoSlopeNorm(ideal, ideal - max(far, 5), ideal + max(far, 5))
    figure = Figure(figsize=(12, 5.6), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    images = []
    end = num_classes - 0.5
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        shown = {"cmap": "PuOr_r", "norm": norm, "interpolation": "nearest", "extent": (-0.5, end, end, -0.5)}
        images.append(axis.imshow(panel.cells.numpy(), **shown))
        axis.set_facecolor("0.85")
        numbers = f"mean {panel.mean:.1f}°, std {panel.std:.1f}° (ideal {ideal:.1f}°, 0°)"
        if num_classes > _MOST_CELLS:
            size = round(num_classes / _MOST_CELLS)
            title += f"; cells are means of about {size} x {size} classes"
        axis.set_title(f"{title}\n{numbers}", fontsize=12 if num_classes <= _MOST_CELLS else 10)
        _label_classes(axis, order.tolist(), borders)
        if num_classes <= _ANNOTATED_CLASSES:
            _annotate(axis, panel.cells, norm)
    bar = figure.colorbar(images[0], ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("angle between two classes [degrees]", fontsize=11)
    bar.ax.axhline(ideal, color="black", linewidth=1.5)
    to_bar = bar.ax.get_yaxis_transform()
    bar.ax.text(-0.15, ideal, "ideal", ha="right", va="center", fontsize=10, transform=to_bar)
    figure.savefig(path)


def _map_of(vectors: Tensor, order: Tensor, *, centre: bool, name: str) -> AngleMap:
    """Angles in the order of the picture, NaN on the diagonal; of many classes, means over groups of them."""
    if len(order) > _MOST_CELLS:
        return angle_map(vectors, order, _MOST_CELLS, centre=centre, name=name)
    check_finite(name, vectors)
    angles = pairwise_angles(vectors, centre=centre)
    diagonal = torch.eye(len(angles), dtype=torch.bool)
    values = angles[~diagonal & ~angles.isnan()]
    cells = angles[order][:, order].masked_fill(diagonal, torch.nan)
    if not len(values):
        return AngleMap(cells, math.nan, math.nan)
    return AngleMap(cells, float(values.mean()), float(values.std(correction=0)))


def plot_curves(records: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw accuracy, loss and NC1 to NC4 over the epochs.

    Args:
        records: one mapping per epoch, with "epoch" and any of "accuracy", "many", "medium", "few"
            (percent), "loss", "eta", "nc1", "trace_ratio", "cdnv", "nc2_means", "nc2_weights", "nc3",
            "nc3_product", "nc4" (share). Missing keys, None and numbers that are not finite leave a gap;
            panels without any number are left out.
        path: PNG file to write.

    Raises:
        ValueError: no record has a number to draw.
    """
    panels = [p for p in _PANELS if any(_series(records, key)[0] for key, *_ in p[4])]
    if not panels:
        raise ValueError(f"records must hold a number to draw; got {len(records)} records without one")
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(4.6 * num_columns, 3.5 * num_rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axis, (title, unit, logarithmic, factor, lines) in zip(axes, panels, strict=False):
        for key, label, colour, marker in lines:
            epochs, values = _series(records, key)
            if logarithmic:
                epochs, values = _positive(epochs, values)
            if not epochs:
                continue
            crowded = len(epochs) > 1 and max(1, len(epochs) // 10)
            axis.plot(
                epochs,
                [factor * v for v in values],
                label=label,
                color=colour,
                linestyle="--" if key == "eta" else "-",
                marker=marker or None,
                markevery=crowded or None,
                markersize=5,
                linewidth=1.6,
            )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("epoch")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.3)
        if logarithmic:
            axis.set_yscale("log")
        elif "ideal 0" in title:
            axis.set_ylim(bottom=0)
        if len(axis.lines) > 1:
            axis.legend(fontsize=9, framealpha=0.8)
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(path)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values at which a key has a finite number."""
    points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
    return [float(e) for e, _ in points], [float(v) for _, v in points]


def _positive(epochs: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    points = [(e, v) for e, v in zip(epochs, values, strict=True) if v > 0]
    return [e for e, _ in points], [v for _, v in points]


def _label_classes(axis: Axes, order: list[int], borders: list[tuple[str, int]]) -> None:
    axis.set_xlabel("class")
    axis.set_ylabel("class")
    if len(order) <= _LABELLED_CLASSES:
        axis.set_xticks(range(len(order)), [str(c) for c in order])
        axis.set_yticks(range(len(order)), [str(c) for c in order])
    elif borders:  # positions, not class numbers, once the classes are sorted
        axis.set_xlabel("rank of the class by training images")
        axis.set_ylabel("rank of the class by training images")
    start, before, shift = 0, -math.inf, 0.0
    for name, size in borders:
        if start:
            axis.axhline(start - 0.5, color="black", linewidth=1.2)
            axis.axvline(start - 0.5, color="black", linewidth=1.2)
        middle = start + (size - 1) / 2
        shift = 0.035 - shift if middle - before < 0.13 * len(order) else 0.0  # beside a name that is too near
        before = middle
        axis.annotate(
            name,
            (1.01 + shift, middle),
            xycoords=("axes fraction", "data"),
            rotation=-90,
            ha="left",
            va="center",
            fontsize=10,
            annotation_clip=False,
        )
        start += size


def _annotate(axis: Axes, angles: Tensor, norm: TwoSlopeNorm) -> None:
    for row, values in enumerate(angles.tolist()):
        for column, angle in enumerate(values):
            if not math.isnan(angle):
                dark = abs(float(norm(angle)) - 0.5) > 0.3
                axis.text(
                    column,
                    row,
                    f"{angle:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
