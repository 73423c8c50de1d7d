"""Angles between all pairs of classes as heat maps, of one run or of several on one colour scale.

Legend: C classes, F features.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from torch import Tensor

from allnc.metrics.accuracy import shot_groups
from allnc.metrics.angles import AngleMap, angle_map, ideal_angle
from allnc.metrics.plots.style import DIVERGING, new_figure, save
from allnc.metrics.plots.vectors import ClassVectors, check_vectors

_ANNOTATED_CLASSES = 12  # up to so many classes every cell carries its angle
_LABELLED_CLASSES = 30  # up to so many classes every row is named
_MOST_CELLS = 200  # of a row: of more classes cells are means over groups, as a picture has no room for each


def plot_angles(runs: Sequence[ClassVectors], path: str | os.PathLike[str]) -> None:
    """Draw the inter-class angles of class means (centred) and classifier vectors as heat maps.

    White is the ideal angle of a simplex ETF, purple is closer together, orange further apart. One run has its two maps
    side by side; of several, means stand above and classifiers below, all on one colour scale. Classes are in the order
    of their sizes, from many to few, in all runs that of the run with the largest imbalance. Of more than 200 classes
    a cell is the mean over two groups of classes that are neighbours in the picture's order; the numbers in the titles
    are over all pairs.

    Args:
        runs: means and classifiers; a class without a mean stays grey in both maps.
        path: .png or .svg file to write.

    Raises:
        TypeError, ValueError: shapes that do not fit or differ between runs, entries that are not finite, or fewer than
            two classes.

    Source: AllNC (arXiv 2408.07253), inter-class pairwise angles.
    """
    num_classes = check_vectors(runs)
    ideal = ideal_angle(int(runs[0].there.sum()))
    order = _shared_order(runs)
    means = [angle_map(run.means, order, _MOST_CELLS, centre=True) for run in runs]
    weights = [angle_map(run.weight.where(run.there[:, None], 0), order, _MOST_CELLS, centre=False) for run in runs]
    far = max(5.0, *(float((panel.cells - ideal).abs().nan_to_num(0).max()) for panel in (*means, *weights)))
    norm = TwoSlopeNorm(ideal, ideal - far, ideal + far)

    alone = len(runs) == 1
    width, height = (12.0, 5.6) if alone else (4.4 * len(runs) + 1.2, 9.4)
    figure = new_figure(width, height, square=True)
    grid = figure.subplots(*((1, 2) if alone else (2, len(runs))), squeeze=False)
    axes = list(grid[0]) if alone else [axis for column in grid.T for axis in column]
    image = None
    for number, axis in enumerate(axes):
        run, is_means = runs[number // 2], number % 2 == 0
        panel = (means if is_means else weights)[number // 2]
        end = num_classes - 0.5
        image = axis.imshow(
            panel.cells.numpy(), cmap=DIVERGING, norm=norm, interpolation="nearest", extent=(-0.5, end, end, -0.5)
        )
        axis.set_facecolor("0.85")
        axis.set_title(_title(run, panel, ideal, is_means=is_means, num_classes=num_classes), fontsize=10.5)
        _label_classes(axis, order.tolist(), _borders(run, order))
        if num_classes <= _ANNOTATED_CLASSES:
            _annotate(axis, panel.cells, norm)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("angle between two classes [degrees]", fontsize=11)
    bar.ax.axhline(ideal, color="black", linewidth=1.5)
    to_bar = bar.ax.get_yaxis_transform()
    bar.ax.text(-0.15, ideal, "ideal", ha="right", va="center", fontsize=10, transform=to_bar)
    save(figure, path)


def _title(run: ClassVectors, panel: AngleMap, ideal: float, *, is_means: bool, num_classes: int) -> str:
    title = "class means, centred" if is_means else "classifier vectors"
    title = f"{run.label}: {title}" if run.label else title.capitalize()
    if num_classes > _MOST_CELLS:
        size = round(num_classes / _MOST_CELLS)
        title += f"\ncells are means of about {size} x {size} classes"
    return f"{title}\nmean {panel.mean:.1f}°, std {panel.std:.1f}° (ideal {ideal:.1f}°, 0°)"


def _shared_order(runs: Sequence[ClassVectors]) -> Tensor:
    """[C] the classes from many to few images, by the run of the largest imbalance."""
    counts = max(runs, key=lambda run: run.imbalance).counts
    if counts is None:
        return torch.arange(len(runs[0].means))
    return torch.argsort(counts, descending=True, stable=True)


def _borders(run: ClassVectors, order: Tensor) -> list[tuple[str, int]]:
    """Names and sizes of the shot groups, where they lie side by side in the order of the picture."""
    if run.counts is None:
        return []
    groups = shot_groups(run.counts, many=run.many, few=run.few)
    group = torch.stack(list(groups.values())).int().argmax(0)[order]  # [C]
    if bool((group.diff() < 0).any()):
        return []
    return [(name, int(mask.sum())) for name, mask in groups.items() if bool(mask.any())]


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
