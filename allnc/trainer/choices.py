"""What a set of one's own images asks for: size, augmentation, network, length; and the line that says it.

Neither torch nor numpy is imported.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from allnc.config import TEST, TRAIN, VALIDATION, Config

if TYPE_CHECKING:
    from allnc.data.own import Index

SMALL = 64  # pixels: longest side of images that are seen whole and held in memory
STEPS = 1300  # of training, where the number of epochs allows
EPOCHS, EPOCHS_PRETRAINED = (20, 200), (10, 40)  # least and most
LARGEST_BATCH = 64
MEMORY = 2 * 2**30  # bytes of images that are held in memory
PHOTOGRAPH = 160  # pixels: median of the shorter side from which on images are seen at 224, else at 128
PRETRAINED = 224  # pixels: what most pretrained networks were trained at
PRETRAINED_NETWORK = "timm:resnet50"
NOT_MIRRORED = ("none", "shift_rotate")  # augmentations that mirror nothing


def of_files(config: Config, index: Index, number: int, given: Collection[str]) -> dict[str, Any]:
    """Return what images in files ask for, as dotted options; those that were given are taken into account.

    Args:
        config: with the options that were given.
        index: the table of the images.
        number: training images, once class sizes were cut out of them.
        given: names of options.
    """
    data, model = config.data, config.model
    seen_at = _image_size(index)
    size = data.image_size if "data.image_size" in given else PRETRAINED if model.pretrained else seen_at
    channels = 1 if index.all_grey and not model.pretrained else 3
    small = min(size, seen_at) <= SMALL
    bytes_in_memory = channels * size**2 * sum(1 for row in index.rows if row.split)
    cropped = "data.fit" in given and data.fit == "crop"
    gentle = small and not cropped
    augmentation = data.augmentation if "data.augmentation" in given else "shift_rotate" if gentle else "resized_crop"
    whole = small or augmentation in ("shift_rotate", "crop_flip_cutout", "autoaugment")
    return {
        "data.image_size": size,
        "data.fit": "whole" if whole else "crop",
        "data.channels": channels,
        "data.in_memory": size <= SMALL and bytes_in_memory <= MEMORY and not cropped,
        "data.augmentation": augmentation,
        "data.flip": not index.all_grey and augmentation not in NOT_MIRRORED,
        "data.validation": (validation := len(index.of(VALIDATION))) / (validation + len(index.of(TRAIN))),
        **_of_any(config, number, len(index.classes), size, given),
    }


def of_arrays(
    config: Config, number: int, num_classes: int, shape: tuple[int, ...], given: Collection[str], *, colour: bool
) -> dict[str, Any]:
    """Return what images in one file ask for, which keep their size; otherwise as `of_files`.

    Args:
        config: with the options that were given.
        number: training images, once validation images and class sizes were cut out of them.
        num_classes: number of classes C.
        shape: of an image, (c, H, W).
        given: names of options.
        colour: whether they have colours.
    """
    side = max(shape[1:])
    augmentation = "crop_flip_cutout" if colour and side > SMALL else "shift_rotate"
    if "data.augmentation" in given:
        augmentation = config.data.augmentation
    return {
        "data.augmentation": augmentation,
        "data.flip": colour and augmentation not in NOT_MIRRORED,
        **_of_any(config, number, num_classes, side, given),
    }


def _of_any(config: Config, number: int, num_classes: int, size: int, given: Collection[str]) -> dict[str, Any]:
    """Return network and training for `number` images of a side."""
    pretrained = config.model.pretrained
    batch = min(LARGEST_BATCH, 2 ** max(1, (number // 2).bit_length() - 1))
    batch = config.train.batch_size if "train.batch_size" in given else batch
    least, most = EPOCHS_PRETRAINED if pretrained else EPOCHS
    epochs = min(most, max(least, round(STEPS / max(1, number // batch))))
    epochs = config.train.epochs if "train.epochs" in given else epochs
    network = "resnet8" if size <= SMALL else "timm:resnet18"
    return {
        "data.workers": min(config.data.workers, len(os.sched_getaffinity(0))),
        "model.name": PRETRAINED_NETWORK if pretrained else network,
        "model.width": 16 if num_classes <= 100 else 32,  # features are 4 x as many: room between the classes
        "train.batch_size": batch,
        "train.epochs": epochs,
        "train.lr": (0.02 if pretrained else 0.1) * batch / LARGEST_BATCH,
        "train.warmup_epochs": epochs / 20,
    }


def _image_size(index: Index) -> int:
    """Return the side that nearly all small images fit into, or for photographs 224 or 128."""
    rows = [row for row in index.rows if row.split]
    longer = sorted(max(row.width, row.height) for row in rows)[int(0.95 * (len(rows) - 1))]
    if longer <= SMALL:
        return max(8, -(-longer // 4) * 4)
    shorter = sorted(min(row.width, row.height) for row in rows)[len(rows) // 2]
    return 224 if shorter >= PHOTOGRAPH else 128


def check_rate(config: Config, given: Collection[str]) -> None:
    """Raise ValueError where no rate was given, and the one that is chosen does not fit."""
    if "train.lr" not in given and (config.train.optimizer != "sgd" or config.train.lr_scaling != "none"):
        raise ValueError(
            f"--train.lr must be given with train.optimizer {config.train.optimizer} and train.lr_scaling "
            f"{config.train.lr_scaling}: the rate that is chosen is SGD's for the batch that is chosen"
        )


def check_batch(config: Config, number: int) -> None:
    """Raise ValueError unless there are as many training images as a batch has."""
    if config.train.batch_size > number:
        raise ValueError(
            f"--train.batch_size must be at most {number}, the number of training images; got {config.train.batch_size}"
        )


def sizes_line(name: str, number: int, counts: Mapping[str, int] | Collection[int], looks: str) -> str:
    """Return the line on what there is.

    Args:
        name: of the folder, list or file.
        number: images, those that are tested among them.
        counts: training images of each class, >= 1.
        looks: size and kind of the images.
    """
    sizes = [*counts.values()] if isinstance(counts, Mapping) else [*counts]
    most, least = max(sizes), min(sizes)
    return (
        f"{name}: {number:,} images of {len(sizes)} classes, {looks}; {most:,} to {least:,} training images a class, "
        f"ratio {most / least:.3g}"
    )


def plan_line(config: Config, number: int, size: str, kind: str) -> str:
    """Return the line on what will be done.

    Args:
        config: of the run.
        number: training images.
        size: of an image as the network sees it.
        kind: colour, grey ...
    """
    data, train = config.data, config.train
    mirrored = data.augmentation not in NOT_MIRRORED and data.flip
    mirror = "mirrored (--data.flip false if left and right differ)" if mirrored else "not mirrored"
    where = "in memory" if data.in_memory or data.name == "arrays" else "from disk"
    measured_on = VALIDATION if data.validation else TEST
    return (
        f"plan: {size} pixels, {kind}, {where}, augmented by {data.augmentation}, {mirror}; {config.model.name}; loss "
        f"{config.loss.name}; {train.epochs} epochs of {number // train.batch_size} batches of {train.batch_size}; "
        f"measured on the {measured_on} images"
    )
