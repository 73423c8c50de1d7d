"""The records of runs over the epochs: all of one run, or chosen measures of several runs in the same panels."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from allnc.metrics.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    MARKERS,
    ORANGE,
    RED,
    SEQUENTIAL,
    appearance,
    new_figure,
    save,
)

Record = Mapping[str, Any]


class Panel(NamedTuple):
    """What an axis shows, and how: title, unit of the vertical axis, whether it is logarithmic, and a factor."""

    title: str
    unit: str
    logarithmic: bool = False
    factor: float = 1.0


_LOSS = Panel("Training loss", "mean over the epoch")
# Panels of one run, with their lines: a key of the records, a label, a colour and a marker each.
_OF_ONE: dict[Panel, tuple[tuple[str, str, str, str], ...]] = {
    Panel("Accuracy", "%"): (
        ("accuracy", "all", BLACK, "o"),
        ("many", "many-shot", BLUE, "^"),
        ("medium", "medium-shot", ORANGE, "s"),
        ("few", "few-shot", RED, "v"),
    ),
    _LOSS: (("loss", "total", BLACK, "o"),),
    Panel("NC1: spread within classes (ideal 0)", "ratio, log scale", logarithmic=True): (
        ("nc1", r"tr($\Sigma_W\,\Sigma_B^+$)/C", BLUE, "o"),
        ("trace_ratio", r"tr $\Sigma_W$ / tr $\Sigma_B$", ORANGE, "s"),
        ("cdnv", "CDNV", GREEN, "^"),
    ),
    Panel("NC2: distance to the simplex ETF (ideal 0)", "Frobenius norm"): (
        ("nc2_means", "class means", BLUE, "o"),
        ("nc2_weights", "classifier", RED, "s"),
    ),
    Panel("NC3: classifier against means (ideal 0)", "Frobenius norm"): (
        ("nc3", "‖W/‖W‖ - M/‖M‖‖", BLUE, "o"),
        ("nc3_product", "‖WMᵀ/‖WMᵀ‖ - E‖", GREEN, "s"),
    ),
    Panel("NC4: not the nearest class mean (ideal 0)", "% of training images", factor=100): (
        ("nc4", "disagreement", BLUE, "o"),
    ),
}

# Panels of several runs: one measure each, by its key in the records.
COSINES = {
    "cosine_std_means": Panel("Std of cosines, class means (ideal 0)", "std over all pairs"),
    "cosine_std_weights": Panel("Std of cosines, classifier (ideal 0)", "std over all pairs"),
}
DRIFT = {
    "drift": Panel("Drift of the class means (ideal 0)", "of their length, log scale", logarithmic=True),
    "drift_aligned": Panel("The same, best rotated (ideal 0)", "of their length, log scale", logarithmic=True),
}
DUALITY = {
    "nc3": Panel("NC3: ‖W/‖W‖ - M/‖M‖‖ (ideal 0)", "Frobenius norm"),
    "nc3_cosine": Panel("Self-duality of directions (ideal 0)", r"mean of 1 - cos(w$_c$, m$_c$)"),
}
GEOMETRY = {
    "accuracy": Panel("Accuracy", "% of test images"),
    "few": Panel("Accuracy of few-shot classes", "% of test images"),
    "cdnv": Panel("NC1: CDNV (ideal 0)", "ratio, log scale", logarithmic=True),
    "nc1": Panel(r"NC1: tr($\Sigma_W\,\Sigma_B^+$)/C (ideal 0)", "ratio, log scale", logarithmic=True),
    "trace_ratio": Panel(r"NC1: tr $\Sigma_W$ / tr $\Sigma_B$ (ideal 0)", "ratio, log scale", logarithmic=True),
    "nc2_means": Panel("NC2: class means to simplex (ideal 0)", "Frobenius norm"),
    "nc2_weights": Panel("NC2: classifier to simplex (ideal 0)", "Frobenius norm"),
    "nc3": Panel("NC3: classifier to means (ideal 0)", "Frobenius norm"),
    "nc4": Panel("NC4: not the nearest class mean (ideal 0)", "% of training images", factor=100),
}
_OF_LAYERS = {key: GEOMETRY[key] for key in ("trace_ratio", "cdnv", "nc1", "nc2_means")}
_OF_LAYERS["cosine_std_means"] = COSINES["cosine_std_means"]
_OF_LAYERS["nc4"] = GEOMETRY["nc4"]
_OF_DEPTH = {key: GEOMETRY[key] for key in ("trace_ratio", "nc2_means", "nc3", "nc4")}  # over the epochs


def plot_curves(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Draw accuracy, loss and NC1 to NC4 of one run over the epochs.

    Args:
        records: one mapping per epoch, with "epoch" and any of "accuracy", "many", "medium", "few"
            (percent), "loss", "eta", "nc1", "trace_ratio", "cdnv", "nc2_means", "nc2_weights", "nc3",
            "nc3_product", "nc4" (share). Missing keys, None and numbers that are not finite leave a gap;
            panels without any number are left out.
        path: .png or .svg file to write.

    Raises:
        ValueError: no record has a number to draw.
    """
    panels = {panel: lines for panel, lines in _OF_ONE.items() if any(_series(records, key)[0] for key, *_ in lines)}
    if not panels:
        raise ValueError(f"records must hold a number to draw; got {len(records)} records without one")
    figure, axes = _grid(len(panels))
    for axis, (panel, lines) in zip(axes, panels.items(), strict=True):
        for key, label, colour, marker in lines:
            _draw(axis, panel, records, key, label=label, color=colour, marker=marker)
        _finish(axis, panel)
        if panel is _LOSS:
            _draw_share(axis, records)
        if len(axis.lines) > 1:
            axis.legend(fontsize=9, framealpha=0.8)
    save(figure, path)


def compare_curves(
    runs: Mapping[str, Sequence[Record]], path: str | os.PathLike[str], measures: Mapping[str, Panel] = GEOMETRY
) -> None:
    """Draw the same measures of several runs over the epochs, a panel for each measure and a colour for each run.

    Args:
        runs: records by the name of the run, as `plot_curves` takes them.
        path: .png or .svg file to write.
        measures: panels by the key of the records: `COSINES`, `DRIFT`, `DUALITY`, `GEOMETRY`, or others. Panels
            without any number are left out.

    Raises:
        ValueError: a run has no number to draw.

    Source: AllNC (arXiv 2408.07253), whose figures show the standard deviation of cosines and the self-duality.
    """
    for label, records in runs.items():
        if not any(_series(records, key)[0] for key in measures):
            raise ValueError(
                f"the records of {label} must hold one of {', '.join(measures)}; got none: train with "
                "train.collapse_every 1 to measure after every epoch"
            )
    drawn = {key: p for key, p in measures.items() if any(_series(records, key)[0] for records in runs.values())}
    figure, axes = _grid(len(drawn))
    handles: dict[str, Any] = {}
    for axis, (key, panel) in zip(axes, drawn.items(), strict=True):
        for number, (label, records) in enumerate(runs.items()):
            _draw(axis, panel, records, key, label=label, **appearance(number))
        _finish(axis, panel)
        handles |= {str(line.get_label()): line for line in axis.lines}
    _legend(figure, handles, list(runs), columns=2 if len(drawn) < 3 else 4)
    save(figure, path)


def plot_layers(runs: Mapping[str, Mapping[str, Mapping[str, float | None]]], path: str | os.PathLike[str]) -> None:
    """Draw NC1, NC2 and NC4 over the layers of networks, a panel for each measure and a colour for each run.

    Args:
        runs: by the name of the run, measures of its layers by name, in the order in which the layers run, as
            `allnc.metrics.collapse_of` returns them; None and numbers that are not finite leave a gap.
        path: .png or .svg file to write.

    Raises:
        ValueError: no run, or runs with different layers.

    Source: Papyan (JMLR 2020) and He & Su (PNAS 2023), who follow the collapse through the layers.
    """
    names = _names_of_all(runs)
    by_place = {
        label: [{"epoch": place, **measures} for place, measures in enumerate(layers.values())]
        for label, layers in runs.items()
    }
    drawn = {key: p for key, p in _OF_LAYERS.items() if any(_series(points, key)[0] for points in by_place.values())}
    figure, axes = _grid(len(drawn))
    handles: dict[str, Any] = {}
    for axis, (key, panel) in zip(axes, drawn.items(), strict=True):
        for number, (label, points) in enumerate(by_place.items()):
            _draw(axis, panel, points, key, label=label, **appearance(number))
        _finish(axis, panel)
        axis.set_xlabel("")
        turned = {} if len(names) <= 4 else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(len(names)), names, fontsize=8.5, **turned)
        handles |= {str(line.get_label()): line for line in axis.lines}
    _legend(figure, handles, list(runs), columns=4)
    save(figure, path)


def plot_layer_curves(runs: Mapping[str, Sequence[Record]], path: str | os.PathLike[str]) -> None:
    """Draw NC1 to NC4 of the layers of networks over the epochs: a row for each run, a colour for each layer.

    Args:
        runs: records by the name of the run; "layers" of a record has measures by the name of the layer, in the order
            in which the layers run. Numbers that are None or not finite leave a gap.
        path: .png or .svg file to write.

    Raises:
        ValueError: no run, one without measures of layers or without any number, or runs with different layers.

    Source: Papyan (JMLR 2020) and He & Su (PNAS 2023), who follow the collapse through the layers.
    """
    by_layer: dict[str, dict[str, list[Record]]] = {}
    for label, records in runs.items():
        own: dict[str, list[Record]] = {}
        for record in records:
            for name, measures in (record.get("layers") or {}).items():
                own.setdefault(name, []).append({"epoch": record["epoch"], **measures})
        if not own:
            raise ValueError(
                f"the records of {label} must hold measures of layers; got none: train with "
                "--train.collapse_layers true, and train.collapse_every 1 to measure after every epoch"
            )
        by_layer[label] = own
    names = _names_of_all(by_layer)
    colours = {name: SEQUENTIAL(0.9 * place / max(1, len(names) - 1)) for place, name in enumerate(names)}
    drawn = {
        key: panel
        for key, panel in _OF_DEPTH.items()
        if any(_series(points, key)[0] for own in by_layer.values() for points in own.values())
    }
    if not drawn:
        raise ValueError(f"the layers must have a number to draw, such as {', '.join(_OF_DEPTH)}; got none")
    figure = new_figure(4.2 * len(drawn), 3.1 * len(runs) + 0.25 + 0.25 * math.ceil(len(names) / 6))
    grid = figure.subplots(len(runs), len(drawn), squeeze=False, sharex=True, sharey="col")
    handles: dict[str, Any] = {}
    for number, (label, own) in enumerate(by_layer.items()):
        for axis, (key, panel) in zip(grid[number], drawn.items(), strict=True):
            for name, points in own.items():
                marker = MARKERS[names.index(name) % len(MARKERS)]
                _draw(axis, panel, points, key, label=name, color=colours[name], marker=marker)
            _finish(axis, panel)
            axis.title.set_visible(number == 0)
            axis.xaxis.label.set_visible(number == len(runs) - 1)
            handles |= {str(line.get_label()): line for line in axis.lines}
        if len(runs) > 1:
            grid[number][0].set_ylabel(f"{label}\n{grid[number][0].get_ylabel()}")
    _legend(figure, handles, names, columns=6)
    save(figure, path)


def _names_of_all(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The layers that runs have, by the name of the run; they must be the same."""
    names = [list(layers) for layers in runs.values()]
    if not names or not names[0]:
        raise ValueError("runs must hold at least one run with a layer; got none")
    for label, own in zip(runs, names, strict=True):
        if own != names[0]:
            raise ValueError(
                f"runs in one picture must have the same layers; got {', '.join(names[0])} in {next(iter(runs))}, "
                f"{', '.join(own)} in {label}: draw them apart"
            )
    return names[0]


def _legend(figure: Figure, handles: Mapping[str, Any], labels: Sequence[str], *, columns: int) -> None:
    """The runs beneath all panels, in their order."""
    names = [label for label in labels if label in handles]
    columns = min(len(names), columns)
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=columns, fontsize=10)


def _grid(number: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many axes, at most three beside each other."""
    num_columns = min(3, number)
    num_rows = math.ceil(number / num_columns)
    figure = new_figure(4.6 * num_columns, 3.5 * num_rows + 0.3)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.set_axis_off()
    return figure, axes[:number]


def _draw(axis: Axes, panel: Panel, records: Sequence[Record], key: str, **line: Any) -> None:
    epochs, values = _series(records, key)
    if panel.logarithmic:
        epochs, values = _positive(epochs, values)
    if not epochs:
        return
    every = max(1, len(epochs) // 10) if line["marker"] else None
    axis.plot(epochs, [panel.factor * v for v in values], markevery=every, markersize=5, linewidth=1.6, **line)


def _draw_share(axis: Axes, records: Sequence[Record]) -> None:
    """Draw η, the share of the uniform branch, on an axis of its own at the right: it is no loss."""
    epochs, values = _series(records, "eta")
    if epochs:
        right = axis.twinx()
        right.plot(epochs, values, color=ORANGE, linestyle="--", linewidth=1.6)
        right.set_ylim(0, 1.05)
        right.set_ylabel("η, share of the uniform branch", color=ORANGE)


def _finish(axis: Axes, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("epoch")
    axis.set_ylabel(panel.unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.grid(alpha=0.3)
    if panel.logarithmic:
        axis.set_yscale("log")
    elif "ideal 0" in panel.title:
        axis.set_ylim(bottom=0)


def _series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values at which a key has a finite number."""
    points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
    return [float(e) for e, _ in points], [float(v) for _, v in points]


def _positive(epochs: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    points = [(e, v) for e, v in zip(epochs, values, strict=True) if v > 0]
    return [e for e, _ in points], [v for _, v in points]
