"""Lengths of class means and classifier vectors, and their angles to the other classes, against the size of the class.

Legend: C classes, F features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from torch import Tensor

from allnc.metrics.angles import directions, ideal_angle
from allnc.metrics.plots.style import appearance, new_figure, save
from allnc.metrics.plots.vectors import ClassVectors, check_vectors

_BLOCK_ENTRIES = 1 << 24  # cosines at a time, 128 MB: of thousands of classes, all pairs would crowd the memory
_DENSE = 200  # of more classes, points are small, and pixels instead of outlines in an SVG file


def plot_class_sizes(runs: Sequence[ClassVectors], path: str | os.PathLike[str]) -> None:
    """Draw, for each class over its number of training images, how long and how far from the others its vectors are.

    Above: lengths of the centred class means and of the classifier vectors, each divided by their mean over the
    classes, so that runs of different scales can be compared; neural collapse makes all of them 1. Below: the mean
    angle to the vectors of the other classes, and the angle to the nearest of them, beside that of a simplex ETF.

    Args:
        runs: means, classifiers and class counts, which all runs must have; classes without a mean are left out.
        path: .png or .svg file to write.

    Raises:
        TypeError, ValueError: as `plot_angles`, or a run without class counts.

    Source: the lengths after Kang et al., Decoupling (ICLR 2020), figure 2; the angles ours.
    """
    num_classes = check_vectors(runs)
    for run in runs:
        if run.counts is None:
            raise ValueError(f"class_counts of {run.label} must be given; got None")
    ideal = ideal_angle(int(runs[0].there.sum()))
    figure = new_figure(11, 10)
    axes = figure.subplots(3, 2, sharex=True, sharey="row")
    for column, (name, centre) in enumerate((("class means, centred", True), ("classifier vectors", False))):
        for number, run in enumerate(runs):
            there, counts = run.there.cpu(), run.counts
            assert counts is not None
            vectors = (run.means if centre else run.weight.where(run.there[:, None], 0)).detach().double().cpu()
            style = {
                **appearance(number),
                "linestyle": "",
                "alpha": 0.75,
                "markersize": 6 if num_classes <= _DENSE else 2.5,
                "markeredgewidth": 0,
                "rasterized": num_classes > _DENSE,
                "label": run.label,
            }
            mean, least = _angles_to_others(vectors, centre=centre)
            for axis, values in zip(
                axes[:, column],
                (_relative_lengths(vectors, there, centre=centre), mean[there], least[there]),
                strict=True,
            ):
                axis.plot(counts[there], values, **style)
        for axis, wanted in zip(axes[:, column], (1.0, ideal, ideal), strict=True):
            axis.axhline(wanted, color="0.3", linestyle=":", linewidth=1.4, label="neural collapse")
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which="both")
        axes[0, column].set_title(name, fontsize=12)
        axes[2, column].set_xlabel("training images of the class")
    axes[0, 0].set_ylabel("length / mean length of all classes")
    axes[1, 0].set_ylabel("mean angle to the other classes [degrees]")
    axes[2, 0].set_ylabel("angle to the nearest class [degrees]")
    for row in axes:
        row[0].margins(y=0.08)
    axes[0, 0].set_ylim(bottom=0)
    low, high = _decades(torch.cat([run.counts[run.there.cpu()] for run in runs if run.counts is not None]))
    axes[0, 0].set_xlim(low, high)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=10)
    save(figure, path)


def _relative_lengths(vectors: Tensor, there: Tensor, *, centre: bool) -> Tensor:
    """Lengths of the rows that are there over their mean, [number of these]."""
    rows = vectors[there]
    lengths = torch.linalg.vector_norm(rows - rows.mean(0) if centre else rows, dim=1)
    return lengths / lengths.mean().clamp(min=torch.finfo(lengths.dtype).tiny)


def _angles_to_others(vectors: Tensor, *, centre: bool) -> tuple[Tensor, Tensor]:
    """Mean and least angle in degrees of each row to all others, [C] float64; NaN where a row has no direction."""
    unit = directions(vectors, centre=centre)  # [C, F]
    known = ~unit[:, 0].isnan()
    step = max(1, _BLOCK_ENTRIES // len(unit))
    means, least = torch.full((2, len(unit)), torch.nan, dtype=torch.float64)
    for start in range(0, len(unit), step):
        rows = slice(start, start + step)
        angles = (unit[rows] @ unit.T).clamp(-1, 1).arccos().rad2deg()  # [rows, C]
        angles[:, rows].fill_diagonal_(torch.nan)
        others = (angles >= 0).sum(1)
        means[rows] = angles.nansum(1) / others
        least[rows] = angles.nan_to_num(torch.inf).amin(1)
    return means.where(known, torch.nan), least.where(known & least.isfinite(), torch.nan)


def _decades(counts: Tensor) -> tuple[float, float]:
    """Limits of a logarithmic axis: a third more than the counts on both sides, and at least a decade."""
    low, high = float(counts.min()) / 1.3, float(counts.max()) * 1.3
    return min(low, high / 10), high
