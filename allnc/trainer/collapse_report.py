"""Collapse of a finished run, layer by layer and by shot group: what `allnc.evaluate --collapse` prints and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from allnc.metrics import by_shot, collapse_of, ideal_angle, ideal_mir
from allnc.trainer.measure import plain_images
from allnc.trainer.run import Run
from allnc.trainer.runlog import finite

ENCODER, CLASSIFIER = "encoder", "classifier"  # names in LongTailModel


class _PlainImages:
    """Training images of a run without augmentation, with their labels, again and again."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        run = self.run
        return plain_images(run.measured, run.train_set, run.config.data, run.device)


def measure_layers(run: Run, layers: Sequence[str] | Literal["all"]) -> dict[str, Any]:
    """Return the collapse of layers of a run's model on its training images, as collapse.json holds it.

    Args:
        run: with the weights loaded.
        layers: names in the model, as `collapse_of` takes them.

    Raises:
        ValueError: a layer that is not there or cannot be measured.
    """
    model, data = run.measured, run.config.data
    found = collapse_of(
        model,
        _PlainImages(run),
        layers=layers,
        class_counts=run.counts,
        classifier=CLASSIFIER,
        weight=model.predicting_vectors,
        logits=lambda output: output.logits_rebalance,
    )
    return {
        "epochs": run.epoch,
        "measured_on": "training",
        "images": len(run.train_set),
        "class_counts": run.counts.tolist(),
        "many_above": data.many,
        "few_below": data.few,
        "center": "class",
        "within": "classes",
        "positions": "mean",
        "layers": {
            name: {
                "features": layer.moments.means.shape[1],
                "measures": {key: finite(value) for key, value in layer.measures.items()},
                "by_shot": {
                    group: {key: finite(value) for key, value in values.items()}
                    for group, values in by_shot(
                        layer.moments, run.counts, weight=layer.weight, many=data.many, few=data.few
                    ).items()
                },
            }
            for name, layer in found.items()
        },
    }


def tables(report: dict[str, Any]) -> list[Table]:
    """Return a report's layers, the classifier where one was measured, and the shot groups of the layer before it.

    Args:
        report: of `measure_layers`.
    """
    layers: dict[str, dict[str, Any]] = report["layers"]
    read = [name for name, layer in layers.items() if "nc3" in layer["measures"]]
    shown = read[-1] if read else list(layers)[-1]
    measures, groups = layers[shown]["measures"], layers[shown]["by_shot"]
    by_layer = _table(f"collapse of {report['images']} training images by layer, epoch {report['epochs']}", _OF_LAYERS)
    for name, layer in layers.items():
        _add(by_layer, name, {"features": layer["features"], **layer["measures"]}, _OF_LAYERS)
    limits = f"many > {report['many_above']}, few < {report['few_below']} training images"
    by_group = _table(f"classes of {shown} by shot ({limits})", _of(groups["many"], _OF_GROUPS))
    pairs = _table(
        f"pairs of classes of {shown} by shot; ideal angle {ideal_angle(int(measures['classes'])):.1f} degrees",
        _of(groups["many-many"], _OF_PAIRS),
    )
    for name, values in groups.items():
        columns = _OF_PAIRS if "-" in name else _OF_GROUPS
        _add(pairs if "-" in name else by_group, name, values, _of(values, columns))
    return [by_layer, *([_classifier_table(measures, shown)] if read else []), by_group, pairs]


class _Column(NamedTuple):
    heading: str
    measure: str
    digits: int = 3  # that count


_OF_LAYERS = (
    _Column("F", "features", 6),
    _Column("NC1", "nc1"),
    _Column("trace", "trace_ratio"),
    _Column("CDNV", "cdnv"),
    _Column("VCI", "vci"),
    _Column("NC2", "nc2_means"),
    _Column("NC4", "nc4"),
    _Column("rank W", "effective_rank_within"),
    _Column("rank B", "effective_rank_between"),
)
_OF_GROUPS = (
    _Column("classes", "classes", 6),
    _Column("mean norm", "norm_means"),
    _Column("weight norm", "norm_weights"),
    _Column("1 - cos(w, m)", "nc3_cosine"),
)
_OF_PAIRS = (
    _Column("pairs", "pairs", 9),
    _Column("trace", "trace_ratio"),
    _Column("CDNV", "cdnv"),
    _Column("angle of means", "angle_means", 4),
    _Column("of weights", "angle_weights", 4),
)
_OF_CLASSIFIER = {
    "nc2_weights": "NC2 class vectors to simplex",
    "nc3": "NC3 class vectors to means",
    "nc3_cosine": "  mean of 1 - cosine",
    "effective_rank_weights": "effective rank of W",
    "mir": "MIR with the means",
    "hdr": "HDR with the means",
}


def _classifier_table(measures: dict[str, Any], layer: str) -> Table:
    ideal = dict.fromkeys(_OF_CLASSIFIER, 0.0)
    ideal["effective_rank_weights"] = measures["classes"] - 1
    if "mir" in measures:
        ideal["mir"] = ideal_mir(int(measures["classes"]))
    columns = (_Column("value", "value", 4), _Column("ideal", "ideal", 4))
    table = _table(f"classifier, which reads {layer}", columns)
    for name, meaning in _OF_CLASSIFIER.items():
        if name in measures:
            _add(table, meaning, {"value": measures[name], "ideal": ideal[name]}, columns)
    return table


def _of(values: dict[str, Any], columns: Sequence[_Column]) -> list[_Column]:
    """Return the columns for which there are values: without a classifier none of the weight."""
    return [column for column in columns if column.measure in values]


def _table(title: str, columns: Sequence[_Column]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right")
    return table


def _add(table: Table, name: str, values: dict[str, Any], columns: Sequence[_Column]) -> None:
    cells = (values.get(column.measure) for column in columns)
    table.add_row(name, *("-" if x is None else f"{x:.{c.digits}g}" for x, c in zip(cells, columns, strict=True)))
