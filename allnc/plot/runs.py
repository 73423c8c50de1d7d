"""What pictures show of a run: the records that it has written, and what its last weights make of its training images.

Legend: N images, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from allnc.metrics.plots import ClassVectors, Scene
from allnc.trainer.collapse_report import measure_layers
from allnc.trainer.finished import finished_run
from allnc.trainer.folder import METRICS
from allnc.trainer.measure import blocks_of, outputs, short_name
from allnc.trainer.run import Run
from allnc.trainer.runlog import Record, read_lines


class MeasuredRun(NamedTuple):
    """A run with its last weights, and the class means of its training images."""

    run: Run
    vectors: ClassVectors

    def scene(self) -> Scene:
        """Return the picture of its features.

        Raises:
            ValueError: they have other than two or three dimensions.
        """
        dim, label = self.vectors.means.shape[1], self.vectors.label
        if dim not in (2, 3):
            raise ValueError(
                f"--kind simplex needs runs with 2 or 3 features; {label} has {dim}: train one with "
                "--model.feature_dim 2, or see python -m allnc.plot.simplex"
            )
        return scene_of(self.run, title=label, note=f"accuracy {self.run.measure_accuracy()['accuracy']:.1f} %")

    def layers(self, names: Sequence[str] | Literal["all"] | None) -> dict[str, dict[str, float | None]]:
        """Return the measures of layers by name; None takes the blocks of the encoder, and the encoder.

        Raises:
            ValueError: a layer that is not there or cannot be measured.
        """
        try:
            found = measure_layers(self.run, names or blocks_of(self.run.measured.encoder))["layers"]
        except ValueError as error:
            raise ValueError(f"{self.vectors.label}: {error}; name layers by --layers") from error
        return {short_name(name): layer["measures"] for name, layer in found.items()}


def records_of(folder: Path) -> list[Record]:
    """Return the records of the epochs of a run.

    Raises:
        ValueError: it has none.
    """
    records = [line.record for line in read_lines(folder / METRICS) if line.record is not None]
    if not records:
        raise ValueError(f"RUN must have records of its epochs in {METRICS}; {folder} has none")
    return records


def measured(folder: Path, label: str, *, root: str | None, device: str | None) -> MeasuredRun:
    """Return a run with its last weights, and the class means that they give.

    Args:
        folder: of the run.
        label: its name in the pictures.
        root: folder of its images; None for the run's own.
        device: auto, cpu or cuda; None for the run's own.

    Raises:
        ValueError: it has no weights, they are damaged, or its images or its device are not there.
    """
    try:
        config, epoch, weights = finished_run(folder, root=root, device=device)
        run = Run(config)
        run.load_model(weights, epoch)
        _, means = run.measure_collapse()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    vectors = ClassVectors(
        means.cpu(),
        run.measured.predicting_vectors.detach().cpu().float(),
        label,
        run.counts,
        many=run.config.data.many,
        few=run.config.data.few,
    )
    return MeasuredRun(run, vectors)


def scene_of(run: Run, *, title: str, note: str) -> Scene:
    """Return the features of the training images, their labels and the classifier as they are now."""
    found: list[tuple[Tensor, Tensor]] = [
        (output.features.float().cpu(), labels.cpu())
        for output, labels in outputs(run.measured, run.train_set, run.config.data, run.device)
    ]
    features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    weight = run.measured.predicting_vectors.detach().float().cpu()
    return Scene(features, labels, weight, title, note, run.train_set.classes)
