"""Accuracy over all test images and over the many-, medium- and few-shot classes.

Legend: N test images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allnc.ops._common import check_labels


def shot_groups(class_counts: Tensor | Sequence[int], *, many: int = 100, few: int = 20) -> dict[str, Tensor]:
    """Masks of the many-, medium- and few-shot classes by their number of training images.

    Args:
        class_counts: [C] training images of each class.
        many: classes with more images than this are many-shot.
        few: classes with fewer images than this are few-shot, 0 <= few <= many.

    Returns:
        {"many", "medium", "few"}: [C] bool on the CPU; together they hold each class once.

    Raises:
        ValueError: counts not one-dimensional, or few > many.

    Source: Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019.
    """
    counts = torch.as_tensor(class_counts).cpu()
    if counts.dim() != 1 or len(counts) == 0:
        raise ValueError(f"class_counts must have shape [C] with C >= 1; got {list(counts.shape)}")
    if not 0 <= few <= many:
        raise ValueError(f"few and many must satisfy 0 <= few <= many; got few={few}, many={many}")
    is_many, is_few = counts > many, counts < few
    return {"many": is_many, "medium": ~is_many & ~is_few, "few": is_few}


def shot_accuracy(
    predictions: Tensor,
    labels: Tensor,
    class_counts: Tensor | Sequence[int],
    *,
    many: int = 100,
    few: int = 20,
) -> dict[str, float | None]:
    """Accuracy in percent: over all images, over all classes, and over the classes of each shot group.

    A group's number, and that of all classes, is the mean of its classes' accuracies (on a balanced test set the same
    as the share of its images); classes without a test image are left out of it.

    Args:
        predictions: [N] int64 predicted classes.
        labels: [N] int64 true classes in [0, C).
        class_counts: [C] training images of each class.
        many: classes with more training images than this are many-shot.
        few: classes with fewer training images than this are few-shot.

    Returns:
        {"accuracy", "balanced", "many", "medium", "few"} in percent: "balanced" is the mean of all classes' accuracies;
        None for a group without a tested class.

    Raises:
        TypeError, ValueError: wrong types or shapes, no image, or a label out of range.

    Source: Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019.
    """
    check_labels(labels, labels.shape[0] if isinstance(labels, Tensor) and labels.dim() == 1 else -1)
    if not isinstance(predictions, Tensor) or predictions.dtype != torch.int64 or predictions.shape != labels.shape:
        got = f"{predictions.dtype} {list(predictions.shape)}" if isinstance(predictions, Tensor) else predictions
        raise ValueError(f"predictions must be int64 of shape {list(labels.shape)}; got {got}. Use logits.argmax(1)")
    if len(labels) == 0:
        raise ValueError("labels must hold at least one test image; got none")
    groups = shot_groups(class_counts, many=many, few=few)
    num_classes = len(groups["many"])
    predictions, labels = predictions.cpu(), labels.cpu()
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ValueError(f"labels must be in [0, {num_classes}), the length of class_counts; got {wrong}")
    right = (predictions == labels).double()
    tested = torch.bincount(labels, minlength=num_classes)  # [C]
    per_class = torch.bincount(labels, weights=right, minlength=num_classes) / tested.clamp(min=1)  # [C]
    result: dict[str, float | None] = {"accuracy": 100 * float(right.mean())}
    for name, mask in {"balanced": torch.ones_like(groups["few"]), **groups}.items():
        used = mask & (tested > 0)
        result[name] = 100 * float(per_class[used].mean()) if bool(used.any()) else None
    return result
