"""What a model predicts for every image of a set: from logits, batch by batch, to measures and to predictions.npz.

Nothing of the size images x classes is kept: with thousands of classes that would be gigabytes.

Legend: n images, C classes.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allnc.data import ImageSet
from allnc.metrics import calibration_error, per_class, shot_accuracy, shot_groups
from allnc.trainer.folder import write_whole

TOP = 5  # of top-5 accuracy


class Predictions(NamedTuple):
    """What is kept of the logits of n images, on the CPU, in the order of the set.

    Attributes:
        labels: [n] int64, true classes.
        predicted: [n] int64, classes of the largest logit, the first one where several are level.
        confidence: [n] float32, softmax probability of the predicted class.
        second: [n] int64, the class that comes next.
        second_confidence: [n] float32, its probability.
        true_confidence: [n] float32, probability of the label.
        nll: [n] float32, minus the natural logarithm of it, which also holds where the probability is too small for
            float32.
        in_top: [n] bool, whether the label is among the five classes of the largest logits.
    """

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    second: Tensor
    second_confidence: Tensor
    true_confidence: Tensor
    nll: Tensor
    in_top: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Predictions:
        """Return what is kept of logits [n, C], C >= 2, at labels [n]."""
        predicted = logits.argmax(1)
        log_p = logits.log_softmax(1)
        top = log_p.topk(min(TOP, log_p.shape[1])).indices  # [n, 5], whichever first where several are level
        second = top[:, 0].where(top[:, 0] != predicted, top[:, 1])
        own = log_p.gather(1, torch.stack([predicted, second, labels], dim=1)).float()  # [n, 3]
        confidence, second_confidence, true_confidence = own.exp().unbind(1)
        in_top = (top == labels[:, None]).any(1)
        kept = (labels, predicted, confidence, second, second_confidence, true_confidence, -own[:, 2], in_top)
        return cls(*(values.cpu() for values in kept))

    @classmethod
    def joined(cls, parts: list[Predictions]) -> Predictions:
        """Return the predictions of several parts of a set, one part after the other."""
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True)))


def scores(
    predictions: Predictions, class_counts: Tensor, *, many: int, few: int, prior: Tensor | None = None
) -> dict[str, float | None]:
    """Return accuracy by shot, macro-F1, top-5 accuracy, log-likelihood and calibration.

    Args:
        predictions: of the images that are measured, at least one.
        class_counts: [C] training images of each class.
        many, few: limits of the shot groups, as in `shot_accuracy`.
        prior: [C] float, >= 0: measure as if classes were as frequent as this says: each class counts with its share
            in it instead of its number of images (classes without an image are left out of it). None: as they are.

    Returns:
        accuracy, balanced, many, medium, few, macro_f1, top5 (None for at most five classes), ece, ece_equal_mass,
        ece_many, ece_medium and ece_few in percent; nll, the mean in nats. None for a group without a measured class.

    Raises:
        ValueError: the prior gives every measured class 0.
    """
    labels, right = predictions.labels, predictions.predicted == predictions.labels
    result = shot_accuracy(predictions.predicted, labels, class_counts, many=many, few=few)
    weight = None if prior is None else _image_weights(labels, prior, len(class_counts))  # [n]
    if weight is not None:
        result["accuracy"] = 100 * _mean(right, weight)
    result["macro_f1"] = 100 * per_class(predictions.predicted, labels, len(class_counts), weight).macro_f1
    result["top5"] = 100 * _mean(predictions.in_top, weight) if len(class_counts) > TOP else None
    result["nll"] = _mean(predictions.nll, weight)
    confidence = predictions.confidence
    result["ece"] = calibration_error(confidence, right, weight=weight)
    result["ece_equal_mass"] = calibration_error(confidence, right, equal_mass=True, weight=weight)
    for name, group in shot_groups(class_counts, many=many, few=few).items():
        own = group[labels] if weight is None else group[labels] & (weight > 0)
        weights = None if weight is None else weight[own]
        error = calibration_error(confidence[own], right[own], weight=weights) if bool(own.any()) else None
        result[f"ece_{name}"] = error
    return result


def _image_weights(labels: Tensor, prior: Tensor, num_classes: int) -> Tensor:
    measured = torch.bincount(labels, minlength=num_classes)
    weight = (prior.cpu().double() / measured.clamp(min=1))[labels]  # [n]
    if float(weight.sum()) <= 0:
        raise ValueError("the class prior must give a class with measured images more than 0; it gives all of them 0")
    return weight / weight.sum()


def _mean(values: Tensor, weight: Tensor | None) -> float:
    if weight is None:
        return float(values.double().mean())
    counted = weight > 0  # an image that cannot be has an infinite loss, and no weight
    return float((values[counted].double() * weight[counted]).sum() / weight[counted].sum())


# What predictions.npz holds for each image, beside `paths`.
_OF_IMAGES = ("labels", "predicted", "confidence", "second", "second_confidence", "true_confidence", "positions")


def write_predictions(
    path: Path, predictions: Predictions, images: ImageSet, class_counts: Tensor, *, measured_on: str, root: str | None
) -> None:
    """Write predictions.npz whole: what the model predicts for every image of the measured set, in its order.

    Its arrays are labels, predicted and second (int32 [n]), confidence, second_confidence and true_confidence (float32
    [n], softmax probabilities of the predicted class, of the second one and of the label), positions (int64 [n], place
    in the measured set), paths (strings [n], relative to `root` where they lie in it; only of images in files), classes
    (strings [C]), class_counts (int64 [C], training images) and measured_on ("test" or "validation").

    Args:
        path: the file.
        predictions: of all images of the set.
        images: the set.
        class_counts: [C] training images of each class.
        measured_on: which images they are.
        root: folder of the images.
    """
    values = {name: array.numpy() for name, array in predictions._asdict().items()}
    arrays: dict[str, np.ndarray] = {name: values[name].astype(np.int32) for name in ("labels", "predicted", "second")}
    arrays |= {name: values[name] for name in ("confidence", "second_confidence", "true_confidence")}
    arrays["positions"] = np.arange(len(predictions.labels), dtype=np.int64)
    if len(images.paths) == len(images):
        arrays["paths"] = np.array([_relative(file, root) for file in images.paths], dtype=np.str_)
    arrays["classes"] = np.array(class_names(images), dtype=np.str_)
    arrays["class_counts"] = class_counts.cpu().numpy().astype(np.int64)
    arrays["measured_on"] = np.array(measured_on)
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # pyright: ignore[reportArgumentType]
    write_whole(path, data.getvalue())


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a predictions.npz by name, see `write_predictions`.

    Raises:
        ValueError: there is no such file, it is damaged, or its arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: python -m allnc.evaluate {path.parent} --predictions writes it") from None
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be a predictions.npz; it cannot be read: {error}") from None
    absent = [name for name in (*_OF_IMAGES, "classes", "class_counts", "measured_on") if name not in arrays]
    if absent:
        raise ValueError(f"{path} must be a predictions.npz; it has no {', '.join(absent)}")
    number, num_classes = arrays["labels"].shape, arrays["classes"].shape
    of_images = [name for name in (*_OF_IMAGES, "paths") if name in arrays and arrays[name].shape != number]
    if of_images or arrays["class_counts"].shape != num_classes or len(number) != 1:
        raise ValueError(f"{path} must have an entry for each image and each class; it has others: damaged")
    used = [arrays[name] for name in ("labels", "predicted", "second")]
    if number[0] and not (min(a.min() for a in used) >= 0 and max(a.max() for a in used) < num_classes[0]):
        raise ValueError(f"{path} must name classes 0 to {num_classes[0] - 1}; it names others: damaged")
    return arrays


def class_names(images: ImageSet) -> list[str]:
    """Return the names of the classes, which are their numbers where they have none."""
    return list(images.classes) or [str(number) for number in range(images.num_classes)]


def _relative(file: str, root: str | None) -> str:
    """Return a path from the root, or as it is where it lies elsewhere."""
    if root is None:
        return file
    inside = os.path.join(os.path.expanduser(root), "")
    return file.removeprefix(inside)
