"""Pictures of the theory, without pyplot, in colours and markers that are safe for colour-blind readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from allnc.metrics.plots import appearance, new_figure, save
from allnc.metrics.plots.style import BLUE, GREEN, RED
from allnc.theory.closed_form import focal_convex_from, focal_family, focal_window
from allnc.theory.equality import DIFFERENT, EQUAL, Comparison
from allnc.theory.imbalance import Regularised
from allnc.theory.landscape import CriticalPoint, Window


def plot_landscape(
    points: Sequence[CriticalPoint], focal: Sequence[Window], num_classes: int, gamma: float, path: Path
) -> None:
    """Draw the Hessians' eigenvalues at each critical point, and the branches of the focal loss's window.

    Args:
        points: of `survey`, all losses.
        focal: of `focal_bistability`.
        num_classes, gamma: of the focal loss.
        path: PNG file to write.
    """
    figure = new_figure(12.5, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    kinds = list(dict.fromkeys(point.kind for point in points))
    losses = list(dict.fromkeys(point.loss for point in points))
    for point in points:
        position = kinds.index(point.kind) + 0.16 * (losses.index(point.loss) - (len(losses) - 1) / 2)
        look = appearance(losses.index(point.loss))
        values = np.array(point.eigenvalues)
        left.scatter(np.full(len(values), position), values, s=9, color=look["color"], alpha=0.35, linewidths=0)
        left.scatter(
            [position],
            [point.curvature],
            s=46,
            **look,
            label=point.loss if point.kind == kinds[0] else None,
        )
        if point.curvature_predicted is not None:
            left.plot(position + np.array([-0.07, 0.07]), [point.curvature_predicted] * 2, color="black", linewidth=1.4)
    left.axhline(0, color="0.5", linewidth=0.8)
    left.set_yscale("symlog", linthresh=0.02)
    left.set_xticks(range(len(kinds)), kinds)
    left.set_ylabel("eigenvalues of the Hessian")
    left.set_title("Curvature at the critical points (large: smallest; bar: predicted)", fontsize=11)
    left.legend(fontsize=9, loc="lower left", title="loss", title_fontsize=9)

    bounds = focal_window(num_classes, gamma)
    assert bounds is not None
    grid = np.linspace(bounds[0] - 1.2 * (bounds[1] - bounds[0]), bounds[1] + (bounds[1] - bounds[0]), 400)
    branches: dict[str, list[tuple[float, float]]] = {"simplex": [], "barrier": []}
    for kc in grid:
        family = [1 / (1 + (num_classes - 1) * np.exp(-a)) for a in focal_family(num_classes, gamma, kc / num_classes)]
        if family:
            branches["simplex"].append((kc, family[-1]))
        if len(family) == 2:
            branches["barrier"].append((kc, family[0]))
    right.axvspan(*bounds, color="0.92", label="window, predicted")
    right.plot(*np.transpose(branches["simplex"]), color=BLUE, label="simplex, predicted")
    right.plot(*np.transpose(branches["barrier"]), color=RED, linestyle="--", label="barrier, predicted")
    flat = 1 / num_classes
    right.plot([bounds[0], grid[-1]], [flat] * 2, color="black", label="origin, a minimum")
    right.plot([grid[0], bounds[0]], [flat] * 2, color="black", linestyle=":", label="origin, a saddle")
    for window in focal:
        if window.probability is not None:
            right.plot(window.kc, window.probability, marker="o", color=BLUE, markersize=7)
        if 0 in window.separated:
            right.plot(window.kc, flat, marker="s", color="black", markersize=6)
    right.axhline(focal_convex_from(gamma), color=GREEN, linestyle="-.", linewidth=1, label="p*, convex above")
    right.set_xlabel(r"$K\,c = K \sqrt{n\,\lambda_W \lambda_H}$")
    right.set_ylabel("probability of the own class")
    right.set_title(f"Focal loss, γ = {gamma:g}, K = {num_classes} (markers: ends of starts)", fontsize=11)
    right.legend(fontsize=8)
    save(figure, path)


def plot_minority(
    panels: Mapping[str, tuple[Tensor, Sequence[float] | None]],
    ratios: Sequence[int],
    roots: Sequence[float],
    rows: Sequence[Regularised],
    path: Path,
) -> None:
    """Draw the phase diagrams of minority collapse, and the distance to the simplex over P2P's weight.

    Args:
        panels: by title, cosines [len(roots), len(ratios)] and the predicted threshold at each ratio, or None.
        ratios: samples of a majority class for one of a minority class.
        roots: sqrt(λ_W λ_H).
        rows: of `regularised`; those with three equal weights and the squared target are drawn.
        path: PNG file to write.
    """
    figure = new_figure(13, 7.6)
    axes = figure.subplots(2, 3)
    places = [axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]]
    image = None
    for axis, (title, (cosines, line)) in zip(places, panels.items(), strict=True):
        axis.set_facecolor("0.8")
        image = axis.pcolormesh(_edges(ratios), _edges(roots), cosines.numpy(), cmap="cividis", vmin=-1, vmax=1)
        if line is not None:
            axis.plot(ratios, line, color="white", linewidth=3.2)
            axis.plot(ratios, line, color=RED, linewidth=1.8, label="predicted threshold")
            axis.legend(fontsize=8, loc="lower left")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(_edges(ratios)[[0, -1]])
        axis.set_ylim(_edges(roots)[[0, -1]])
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("imbalance ratio")
        axis.set_ylabel(r"$\sqrt{\lambda_W \lambda_H}$")
    assert image is not None
    bar = figure.colorbar(image, ax=axes[:, :2], fraction=0.03)
    bar.set_label("cosine of two minority vectors (1: collapsed; grey: vanished)")
    for axis, classifier in zip(axes[:, 2], ("linear", "normalised"), strict=True):
        lines = {(row.loss, part) for row in rows for part in ("means", "weights")}
        for loss, part in sorted(lines):
            drawn = [
                (row.p2p[0], getattr(row, f"{part}_off"))
                for row in rows
                if (row.classifier, row.loss, row.p2p_target) == (classifier, loss, "etf")
                and len(set(row.p2p)) == 1
                and row.p2p[0] > 0
            ]
            number = ("ce", "logit_adjusted").index(loss)
            axis.plot(
                *np.transpose(drawn),
                **appearance(number),
                linestyle="-" if part == "means" else "--",
                label=f"{loss}, {part}",
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("weight of each P2P term")
        axis.set_ylabel("largest |cosine + 1/(K-1)|")
        axis.set_title(f"{classifier}: distance to the simplex", fontsize=11)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    save(figure, path)


def plot_equality(rows: Sequence[Comparison], baseline: str, margin: float, path: Path) -> None:
    """Draw |difference to the baseline| over width and epochs, a line of panels for a data set, a panel for a loss.

    In a cell stand the difference with its sign, and below it `=` where it is equal to the baseline within the margin,
    or `≠` where it is not; neither where it is open.

    Args:
        rows: of `compare`; those of means over cells are left out.
        baseline: the loss that the others are compared with.
        margin: in points.
        path: PNG or SVG file to write.
    """
    rows = [row for row in rows if row.width is not None and row.loss != baseline]
    data, losses = (list(dict.fromkeys(names)) for names in ([r.data for r in rows], [r.loss for r in rows]))
    figure = new_figure(2.2 * max(2, len(losses)) + 1.6, 2.5 * max(1, len(data)) + 0.4)
    panels = figure.subplots(max(1, len(data)), max(1, len(losses)), squeeze=False)
    top = max([margin, *(abs(row.difference) for row in rows)])
    marks = {EQUAL: "\n=", DIFFERENT: "\n≠"}
    image = None
    for name, line in zip(data, panels, strict=False):
        own = [row for row in rows if row.data == name]
        widths, epochs = sorted({row.width or 0 for row in own}), sorted({row.epochs or 0 for row in own})
        for loss, axes in zip(losses, line, strict=True):
            cells = {(row.width or 0, row.epochs or 0): row for row in own if row.loss == loss}
            sizes = [[abs(cells[w, e].difference) if (w, e) in cells else np.nan for e in epochs] for w in widths]
            image = axes.imshow(sizes, cmap="cividis", vmin=0, vmax=top, origin="lower", aspect="auto")
            axes.set_facecolor("0.8")
            for (width, length), row in cells.items():
                axes.text(
                    epochs.index(length),
                    widths.index(width),
                    f"{round(row.difference, 1) + 0.0:+.1f}{marks.get(row.verdict or '', '')}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if abs(row.difference) < 0.5 * top else "black",
                )
            axes.set_title(loss if len(data) == 1 else f"{name}: {loss}", fontsize=9)
            axes.set_xticks(range(len(epochs)), [str(e) for e in epochs])
            axes.set_yticks(range(len(widths)), [str(w) for w in widths])
            axes.set_xlabel("epochs", fontsize=8)
        line[0].set_ylabel("width", fontsize=8)
    if image is not None:
        bar = figure.colorbar(image, ax=panels, fraction=0.03)
        bar.set_label(f"|accuracy - {baseline}'s|, points", fontsize=8)
        bar.ax.axhline(margin, color=RED, linewidth=2)
    save(figure, path)


def _edges(centres: Sequence[float]) -> np.ndarray:
    """Borders of cells around positive centres, half-way between them on a logarithmic scale."""
    logs = np.log(np.asarray(centres, dtype=float))
    middle = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]]))
