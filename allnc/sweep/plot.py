"""Accuracy against geometry: one point a method, one row of panels a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from allnc.metrics.plots import appearance, new_figure, save
from allnc.sweep.table import OVERALL, Row
from allnc.trainer.selection import SCORE

_GEOMETRY = {
    "nc2_means": "NC2 of the class means",
    "nc2_weights": "NC2 of the classifier",
    "nc3": "NC3, classifier to means",
}


def plot_geometry(rows: Sequence[Row], path: Path) -> None:
    """Draw the accuracy of each method over its distances to neural collapse (0 is collapse).

    Args:
        rows: of `rows_of`; methods without a measured geometry are left out.
        path: PNG file to write.
    """
    drawn = [row for row in rows if all(row.mean[name] is not None for name in (SCORE, *_GEOMETRY))]
    data = [name for name in dict.fromkeys(row.data for row in drawn) if name != OVERALL]
    methods = list(dict.fromkeys(row.method for row in drawn))
    if not data:
        return
    figure = new_figure(11, 2.9 * len(data) + 0.28 * (len(methods) // 4 + 1))
    panels = figure.subplots(len(data), len(_GEOMETRY), squeeze=False, sharey="row")
    for name, line in zip(data, panels, strict=True):
        for (measure, title), axes in zip(_GEOMETRY.items(), line, strict=True):
            for row in (row for row in drawn if row.data == name):
                axes.errorbar(
                    row.mean[measure],
                    row.mean[SCORE],
                    yerr=row.std,
                    linestyle="",
                    **appearance(methods.index(row.method)),
                    markersize=6,
                    elinewidth=0.8,
                    label=row.method,
                )
            axes.grid(alpha=0.3)
            axes.set_xlim(left=0)
            axes.set_xlabel(f"{title} (0: collapsed)", fontsize=8)
            axes.tick_params(labelsize=8)
        line[0].set_ylabel(f"{name}\naccuracy, % of classes' mean", fontsize=8)
    entries = {  # a method may be missing on some data sets
        label: handle for line in panels for handle, label in zip(*line[0].get_legend_handles_labels(), strict=True)
    }
    figure.legend([entries[name] for name in methods], methods, loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)
