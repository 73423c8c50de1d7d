"""Collapse of a finished run, layer by layer and by shot group: what `allnc.evaluate --collapse` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from allnc.data import ImageSet
from allnc.data.arrays import read_labelled
from allnc.data.images import shown
from allnc.metrics import by_shot, ideal_angle, ideal_mir
from allnc.trainer.measure import PlainImages, collapse_of_layers
from allnc.trainer.run import Run
from allnc.trainer.runlog import finite


def layers_of(text: str) -> Sequence[str] | Literal["all"]:
    """Return the layers that an option `--layers` names, with commas between them.

    Raises:
        ValueError: an empty name.
    """
    names = text.split(",")
    if not all(names):
        raise ValueError(f"--layers must be names with one comma between two of them, or all; got {text!r}")
    return "all" if text == "all" else names


def measure_layers(run: Run, layers: Sequence[str] | Literal["all"], ood: Path | None = None) -> dict[str, Any]:
    """Return the collapse of layers of a run's model on its training images, as collapse.json holds it.

    Args:
        run: with the weights loaded.
        layers: names in the model, as `collapse_of` takes them.
        ood: file of images of no class for NC5, as `read_labelled` reads it: its test images, or all where it has none.

    Raises:
        ValueError: a layer that is not there or cannot be measured, or images of another size.
    """
    model, data = run.measured, run.config.data
    outside = None if ood is None else PlainImages(model, _outside(run, ood), data, run.device)
    found = collapse_of_layers(model, run.train_set, data, run.device, run.processes, layers, outside)
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
        "ood": None if ood is None else str(ood),
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


def _outside(run: Run, file: Path) -> ImageSet:
    """The test images of a file, or all of one without, with the pixel statistics that the run's model has learnt."""
    try:
        if not file.is_file():
            raise ValueError(f"got {shown(str(file))}, which is no file")
        pixels, labels, _ = read_labelled(str(file))
    except ValueError as error:
        raise ValueError(f"--ood must be a file of images as data.name arrays has them: {error}") from error
    mean, std = run.train_set.mean, run.train_set.std
    images = ImageSet(labels=torch.zeros_like(labels), num_classes=1, mean=mean, std=std, images=pixels)
    wanted = run.train_set.shape(run.config.data)
    if images.shape(run.config.data) != wanted:
        got, want = (" x ".join(map(str, shape)) for shape in (images.shape(run.config.data), wanted))
        raise ValueError(f"--ood must have images of the size of the run's, {want}; got {got}")
    return images


def tables(report: dict[str, Any]) -> list[Table]:
    """Return a report's layers, the classifier where one was measured, and the shot groups of the layer before it.

    Args:
        report: of `measure_layers`.
    """
    layers: dict[str, dict[str, Any]] = report["layers"]
    read = [name for name, layer in layers.items() if "nc3" in layer["measures"]]
    shown = read[-1] if read else list(layers)[-1]
    measures, groups = layers[shown]["measures"], layers[shown]["by_shot"]
    title = f"collapse of {report['images']} training images by layer, epoch {report['epochs']}"
    of_layers = _of({"features": None, **measures}, _OF_LAYERS)
    by_layer = _table(title, of_layers)
    for name, layer in layers.items():
        _add(by_layer, name, {"features": layer["features"], **layer["measures"]}, of_layers)
    limits = f"many > {report['many_above']}, few < {report['few_below']} images"
    by_group = _table(f"by shot, {shown}: {limits}", _of(groups["many"], _OF_GROUPS))
    ideal = ideal_angle(int(measures["classes"]))
    pairs = _table(f"pairs of classes; ideal angle {ideal:.1f} degrees", _of(groups["many-many"], _OF_PAIRS))
    for name, values in groups.items():
        columns = _OF_PAIRS if "-" in name else _OF_GROUPS
        _add(pairs if "-" in name else by_group, name, values, _of(values, columns))
    return [by_layer, *([_classifier_table(measures, shown)] if read else []), by_group, pairs]


_OF_LAYERS = {
    "features": "F",
    "nc1": "NC1",
    "trace_ratio": "trace",
    "cdnv": "CDNV",
    "vci": "VCI",
    "nc2_means": "NC2",
    "nc4": "NC4",
    "nc5": "NC5",
    "effective_rank_within": "rankW",
    "effective_rank_between": "rankB",
}
_OF_GROUPS = {
    "classes": "classes",
    "norm_means": "mean norm",
    "norm_weights": "weight norm",
    "nc3_cosine": "1 - cos(w, m)",
}
_OF_PAIRS = {
    "pairs": "pairs",
    "trace_ratio": "trace",
    "cdnv": "CDNV",
    "angle_means": "angle of means",
    "angle_weights": "of weights",
}
_OF_CLASSIFIER = {
    "nc2_weights": "NC2 class vectors to simplex",
    "nc3": "NC3 class vectors to means",
    "nc3_cosine": "  mean of 1 - cosine",
    "effective_rank_weights": "effective rank of W",
    "mir": "MIR with the means",
    "hdr": "HDR with the means",
    "cosine_rms_means": "RMS cosine of means",  # this and the following where there is no room for a simplex
    "cosine_rms_weights": "RMS cosine of class vectors",
    "cosine_max_means": "largest cosine of means",
    "cosine_max_weights": "largest cosine of class vectors",
}


def _classifier_table(measures: dict[str, Any], layer: str) -> Table:
    num_classes = int(measures["classes"])
    ideal: dict[str, float | None] = {"nc3": 0, "nc3_cosine": 0, "hdr": 0}
    if "tight_frame_floor" in measures:
        ideal |= dict.fromkeys(("cosine_rms_means", "cosine_rms_weights"), measures["tight_frame_floor"])
    else:
        ideal |= {"nc2_weights": 0, "effective_rank_weights": num_classes - 1}
        ideal["mir"] = ideal_mir(num_classes) if "mir" in measures else None
    columns = {"value": "value", "ideal": "ideal"}
    table = _table(f"classifier, which reads {layer}", columns)
    for name, meaning in _OF_CLASSIFIER.items():
        if name in measures:
            _add(table, meaning, {"value": measures[name], "ideal": ideal.get(name)}, columns)
    return table


def _of(values: dict[str, Any], columns: dict[str, str]) -> dict[str, str]:
    """Return the columns for which there are values: none of the weight without a classifier, no NC5 without images."""
    return {name: heading for name, heading in columns.items() if name in values}


def _table(title: str, columns: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add(table: Table, name: str, values: dict[str, Any], columns: dict[str, str]) -> None:
    table.add_row(name, *(_number(values.get(column)) for column in columns))


def _number(value: float | None) -> str:
    """Return five characters or little more, so that a table of layers fits a terminal; "-" where there is none."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    size = abs(value)
    return f"{value:.0e}" if size < 0.00995 or size >= 1e4 else f"{value:.3f}" if size < 10 else f"{value:.1f}"
