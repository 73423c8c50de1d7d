"""A finished run as whoever uses it wants it: configuration and weights, its files where they lie now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from allnc.config import Config
from allnc.trainer.checkpoint import Weights, Which, load_weights


def finished_run(
    folder: Path,
    which: Which | None = None,
    *,
    root: str | None = None,
    crops: int | None = None,
    pretrained: str | None = None,
    device: str | None = None,
) -> tuple[Config, int, Weights]:
    """Return configuration, epochs done and weights of a run; None takes what the run has.

    Args:
        folder: run folder, or one with last.safetensors alone.
        which: as `load_weights`.
        root: its images (`data.root`).
        crops: `data.test_crops`.
        pretrained: file of the pretrained weights that it holds no copy of (`model.weights`).
        device: `train.device`.

    Raises:
        ValueError: as `load_weights`, or pretrained weights for a run that holds every weight.
    """
    config, epoch, weights = load_weights(folder, which)
    if pretrained is not None and weights.frozen is None:
        raise ValueError(f"--model.weights would be ignored: {folder} holds every weight; remove it")
    data, model, train = config.data, weights.model(config.model), config.train
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(data, root=root or data.root, test_crops=crops or data.test_crops),
        model=dataclasses.replace(model, weights=pretrained or model.weights),
        train=dataclasses.replace(train, device=device or train.device),  # pyright: ignore[reportArgumentType]
    )
    return config, epoch, weights
