"""What a checkpoint of an older version, which has no card, tells of its training images all the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from allnc.config import FEATURE_MODELS, Config
from allnc.data.arrays import read_arrays
from allnc.data.sources import IMAGENET_MEAN, IMAGENET_STD, MEAN_STD
from allnc.trainer.card import Card
from allnc.trainer.checkpoint import Weights
from allnc.trainer.folder import SUMMARY

SIDES = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32}


def guessed_card(config: Config, weights: Weights, folder: Path) -> Card:
    """Return the card that the run would have written; classes have no names, and no sizes without a summary.

    Args:
        config: of the run.
        weights: of its checkpoint.
        folder: of the run.

    Raises:
        ValueError: the weights have no classifier; or the run is one on a file of arrays, which is needed for the mean
            and deviation of the pixels, and is not there.
    """
    data, vectors = config.data, weights.get("classifier.weight")
    if vectors is None:
        raise ValueError(f"{folder} must hold the weights of a classifier; they have none")
    counts = _counts(folder, len(vectors))
    if config.model.name in FEATURE_MODELS:
        width = vectors.shape[1]
        return Card(classes=None, class_counts=counts, mean=(), std=(), channels=width, shape=(width,))
    given = None if data.mean is None or data.std is None else (data.mean, data.std)
    if data.name == "arrays":
        try:
            card = Card.of(read_arrays(data)[0], data)
        except ValueError as error:
            raise ValueError(
                f"{folder} must know the mean and deviation of its pixels, which its version of allnc took from the "
                f"file of the images ({error}): name that file by --data.root"
            ) from error
        mean, std = given or (card.mean, card.std)
        return dataclasses.replace(card, class_counts=counts, mean=mean, std=std)
    mean, std = given or MEAN_STD.get(data.name, (IMAGENET_MEAN, IMAGENET_STD))
    side, channels = SIDES.get(data.name, data.image_size), len(mean)
    return Card(classes=None, class_counts=counts, mean=mean, std=std, channels=channels, shape=(channels, side, side))


def _counts(folder: Path, num_classes: int) -> tuple[int, ...]:
    """Return the training images of each class that summary.json names; 0 for each where there is none."""
    try:
        counts = json.loads((folder / SUMMARY).read_text())["class_counts"]
    except (OSError, ValueError, KeyError, TypeError):
        counts = []
    whole = isinstance(counts, list) and len(counts) == num_classes and all(isinstance(n, int) for n in counts)
    return tuple(counts) if whole else (0,) * num_classes
