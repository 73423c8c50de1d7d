"""Angles between classes as heat maps, of all runs on one scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allnc.metrics.angles import AngleMap, angle_map, ideal_angle
from allnc.report import numbers
from allnc.report.charts import Figure
from allnc.report.heatmaps import ORANGE, PURPLE, angle_colours, borders_of, heat_map, row_names, scale_bar
from allnc.report.runs import ReportedRun, limits_of

ANGLE_CELLS = 100  # of a row of an angle map; of more classes cells are means over groups


def angle_maps(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Return heat maps of the angles between classes, all on one scale: class means and classifier of each run.

    No colour is the ideal angle of a simplex ETF; classes are in the order of the run with the largest imbalance.
    """
    import torch  # a page without angles needs none

    found = [(run, run.vectors) for run in runs if run.vectors is not None]
    if not found:
        return []
    maps: list[tuple[ReportedRun, str, AngleMap, float, list[np.ndarray]]] = []
    for run, vectors in found:
        same = [v for _, v in found if len(v.means) == len(vectors.means)]
        counts = max(same, key=lambda v: v.imbalance).counts
        assert counts is not None  # a measured run has them
        order = numbers.by_size(counts.numpy())
        ideal = ideal_angle(int(vectors.there.sum()))
        for what, rows, centre in (
            ("class means, centred", vectors.means, True),
            ("classifier vectors", vectors.weight.where(vectors.there[:, None], 0), False),
        ):
            panel = angle_map(rows, torch.from_numpy(order), ANGLE_CELLS, centre=centre)
            maps.append((run, what, panel, ideal, _groups(order)))
    far = max(5.0, *(float((m.cells - ideal).abs().nan_to_num(0).max()) for _, _, m, ideal, _ in maps))
    figures = []
    for run, what, panel, ideal, groups in maps:
        vectors = run.vectors
        assert vectors is not None and vectors.counts is not None
        counts = vectors.counts.numpy()
        classes = run.told.classes if run.told is not None else tuple(map(str, range(len(counts))))
        cells = panel.cells.numpy()
        grouped = len(groups) < len(counts)
        what_rows = "classes by training images" if grouped else "class"
        labels = [f"{ideal - far:.0f}°", f"ideal {ideal:.1f}°", f"{ideal + far:.0f}°"]
        figures.append(
            heat_map(
                f"{run.label}: {what}",
                cells,
                angle_colours(cells, ideal, far),
                rows=row_names(groups, classes, counts),
                borders=borders_of(groups, numbers.shot_masks(counts, *limits_of(run))),
                sentence="{row} and {column}: {value}°" + (" on average" if grouped else ""),
                axes=(what_rows, what_rows),
                note=f"Mean {panel.mean:.1f}°, standard deviation {panel.std:.1f}° over all pairs."
                + (
                    f" Cells are means over groups of about {len(counts) / len(groups):.0f} classes." if grouped else ""
                ),
                scale=scale_bar(f"rgb{PURPLE},transparent,rgb{ORANGE}", labels),
            )
        )
    return figures


def _groups(order: np.ndarray) -> list[np.ndarray]:
    """The classes of each row of an angle map; `angle_map` cuts them so."""
    num_groups = min(len(order), ANGLE_CELLS)
    group = np.arange(len(order)) * num_groups // len(order)
    return [order[group == number] for number in range(num_groups)]
