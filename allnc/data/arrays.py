"""Sets of small images in one file: what `data.name arrays` reads.

    images, test_images    [n, H, W] or [n, H, W, c] uint8, all of one size; without test_images and test_labels, a
                           share of each class is held out (data.test_share)
    labels, test_labels    [n] integers, 0 to C - 1; every class has a training image
    classes                [C] names of the classes; optional
    groups                 [n] integers; optional: images with the same number stay together where a share of them is
                           held out, such as those of one font, patient or video
    source                 text on where the images come from; optional, not read

The file is a .npz of numpy, or a .safetensors, whose names of the classes are a JSON list in the metadata (`classes`).
Nothing is unpickled.

Legend: n images, H, W height and width, c channels, C classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from allnc.config import DataConfig
from allnc.data.array_files import TESTED, Array, read_file
from allnc.data.images import shown
from allnc.data.own.split import draw_groups
from allnc.data.sources import ImageSet

MOST_CLASSES = 2**31 - 1
_FROM_ONE = "subtract 1 from labels and test_labels, which begin at 1"


def read_arrays(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set in the file data.root.

    Mean and deviation of the pixels are those of all its training images. Where the file has no test images, they are a
    share of each class: at least one of a class of two images, and of a group, or else of images with the same pixels,
    all or none.

    Args:
        config: of which root, a .npz or .safetensors file, test_share, subset_seed and augmentation are read.

    Returns:
        Two sets with images [n, c, H, W] uint8.

    Raises:
        ValueError: the file is missing, damaged or of another kind, lacks an array or has one that is not known, or an
            array has another type, size or range than it must, or images that the augmentation cannot take. The
            message is one line and starts with the path, or with data.root or data.augmentation.
    """
    path = config.root
    assert path  # DataConfig has checked
    if not os.path.isfile(path):
        raise ValueError(f"data.root must be a .npz or .safetensors file; got {shown(path)}, which is no file")
    try:
        train, test = _sets(read_file(path), config)
    except ValueError as error:
        raise ValueError(f"{shown(path)} {error}") from error
    channels, height, width = train.shape(config)
    if config.augmentation == "autoaugment" and (channels not in (1, 3) or height != width):
        raise ValueError(
            f"data.augmentation autoaugment needs square images of 1 or 3 channels; got {height} x {width} with "
            f"{channels}: take crop_flip_cutout, shift_rotate or none"
        )
    return train, test


def read_labelled(path: str) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Return the labelled images of a file: its test images, or, where there are none, all that it has.

    Args:
        path: a .npz or .safetensors file, of training and test images as `read_arrays` takes it, or with `images`,
            `labels` and `classes` (optional) alone.

    Returns:
        Images [n, c, H, W] uint8, labels [n] int64 >= 0, and the names of the classes, () where they have none.

    Raises:
        ValueError: as `read_arrays`.
    """
    try:
        arrays = read_file(path, trained_on=False)
        part = "test_" if {*TESTED} <= {*arrays} else ""
        images = _images(f"{part}images", arrays[f"{part}images"])
        labels = _integers(f"{part}labels", arrays[f"{part}labels"], len(images), f"{part}images")
        classes = _class_names(arrays.get("classes"), MOST_CLASSES)
        largest = len(classes) - 1 if classes else MOST_CLASSES
        if labels.min() < 0 or labels.max() > largest:
            raise ValueError(f"must have {part}labels in 0 to {largest}; got {labels.min()} to {labels.max()}")
    except ValueError as error:
        raise ValueError(f"{shown(path)} {error}") from error
    return _channels_first(images), torch.from_numpy(labels), classes


def _sets(arrays: Mapping[str, Array], config: DataConfig) -> tuple[ImageSet, ImageSet]:
    images = _images("images", arrays["images"])
    labels = _integers("labels", arrays["labels"], len(images), "images")
    classes = _class_names(arrays.get("classes"), len(labels))
    num_classes = _number_of_classes(labels, classes)
    groups = arrays.get("groups")
    groups = None if groups is None else _integers("groups", groups, len(images), "images")
    notes: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    if TESTED[0] in arrays:
        tests = _images("test_images", arrays["test_images"])
        if images.shape[1:] != tests.shape[1:]:
            raise ValueError(
                f"must have test_images of the size of images, {_size(images)}; got {_size(tests)}: resize one of them"
            )
        test_labels = _integers("test_labels", arrays["test_labels"], len(tests), "test_images")
        if test_labels.min() < 0 or test_labels.max() >= num_classes:
            raise ValueError(
                f"must have test_labels in 0 to {num_classes - 1}, as labels; got {test_labels.min()} to "
                f"{test_labels.max()}"
            )
    else:
        held = _drawn(images, labels, groups, config)
        tests, test_labels = images[held], labels[held]
        images, labels, groups = images[~held], labels[~held], None if groups is None else groups[~held]
        without = num_classes - len(np.unique(test_labels))
        notes = (f"{without} of {num_classes} classes have no test image",) if without else ()
        drawn = (
            f"the file has no test images: {config.test_share:.0%} of each class are tested, drawn by data.subset_seed "
            f"{config.subset_seed}",
        )
    mean, std = statistics(images)
    common: dict[str, Any] = {"num_classes": num_classes, "mean": mean, "std": std, "classes": classes}
    train = ImageSet(
        labels=torch.from_numpy(labels),
        images=_channels_first(images),
        groups=None if groups is None else torch.from_numpy(groups),
        notes=drawn,
        **common,
    )
    test = ImageSet(labels=torch.from_numpy(test_labels), images=_channels_first(tests), notes=notes, **common)
    return train, test


def _drawn(
    images: Array, labels: npt.NDArray[np.int64], groups: npt.NDArray[np.int64] | None, config: DataConfig
) -> npt.NDArray[np.bool_]:
    """Return which images of a file without test images are these, [n]."""
    together = first_copies(images) if groups is None else groups.tolist()
    held = np.zeros(len(labels), np.bool_)
    held[sorted(draw_groups(labels.tolist(), together, config.test_share, config.subset_seed, least=1))] = True
    if not held.any():
        raise ValueError(
            f"must have images to test on; got none, and none can be held out of {len(labels)}: each class has one "
            f"image, copy or group alone; add {' and '.join(TESTED)}"
        )
    return held


def first_copies(images: Array) -> list[int]:
    """Return for each of some images [n, ...] the position of the first one with the same pixels."""
    first: dict[bytes, int] = {}
    sums = (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
    return [first.setdefault(digest, position) for position, digest in enumerate(sums)]


def _images(name: str, images: Array) -> Array:
    """Return images as [n, H, W, c]."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"must have {name} [n, H, W] or [n, H, W, c] of type uint8 (0 to 255), none of which is 0; got "
            f"{list(images.shape)} of type {images.dtype}{_scaled(name, images)}"
        )
    if images.ndim == 3:
        return images[..., None]
    if images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise ValueError(
            f"must have {name} with the channels last, [n, H, W, c]; got {list(images.shape)}: move them with "
            f"{name}.transpose(0, 2, 3, 1)"
        )
    return images


def _scaled(name: str, images: Array) -> str:
    """Say how numbers of another type become what is wanted."""
    if images.dtype.kind == "f":
        return f": save (255 * {name}).round().astype('uint8') where they are 0 to 1"
    return f": save ({name} >> 8).astype('uint8') where they have 16 bits" if images.dtype == np.uint16 else ""


def _integers(name: str, values: Array, number: int, counted: str) -> npt.NDArray[np.int64]:
    if values.dtype.kind not in "iu" or values.shape != (number,):
        named = ": save classes, labels = numpy.unique(labels, return_inverse=True)" if values.dtype.kind == "U" else ""
        raise ValueError(
            f"must have {name} [{number}] of integers, one for each of {counted}; got {list(values.shape)} of type "
            f"{values.dtype}{named}"
        )
    if values.dtype == np.uint64 and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"must have {name} that int64 holds; got {values.max()}")
    return np.ascontiguousarray(values, dtype=np.int64)


def _class_names(names: Array | None, number: int) -> tuple[str, ...]:
    if names is None:
        return ()
    if names.dtype.kind != "U" or names.ndim != 1 or not 0 < len(names) <= number:
        raise ValueError(
            f"must have classes [C] of strings, with an image each; got {list(names.shape)} of type {names.dtype}"
        )
    texts = tuple(names.tolist())
    odd = next((text for text in texts if not text or not text.isprintable()), None)
    if odd is not None:
        raise ValueError(f"must have classes with names that can be printed; got {odd!r}")
    again = next((text for place, text in enumerate(texts) if text in texts[:place]), None)
    if again is not None:
        raise ValueError(f"must have classes with a name each; got {again!r} twice")
    return texts


def _number_of_classes(labels: npt.NDArray[np.int64], classes: tuple[str, ...]) -> int:
    """Return C, once every class from 0 to C - 1 has an image."""
    found = np.unique(labels)
    num_classes = len(classes) or int(found[-1]) + 1
    if found[0] < 0 or found[-1] >= num_classes:
        by = ", one for each of its classes" if classes else ""
        shifted = f": {_FROM_ONE}" if classes and found[0] == 1 and found[-1] == num_classes else ""
        raise ValueError(f"must have labels in 0 to {num_classes - 1}{by}; got {found[0]} to {found[-1]}{shifted}")
    if len(found) != num_classes:
        gap = int(np.flatnonzero(found != np.arange(len(found)))[0]) if found[-1] >= len(found) else len(found)
        remedy = _FROM_ONE if found[0] == 1 and len(found) == found[-1] else "number the classes without gaps"
        raise ValueError(f"must have an image of every class in 0 to {num_classes - 1}; class {gap} has none: {remedy}")
    return num_classes


def statistics(images: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel's pixels, scaled to [0, 1], which are counted by value.

    Args:
        images: [n, H, W, c], uint8.

    Raises:
        ValueError: a channel has one value only.
    """
    means, deviations = [], []
    values = np.arange(256) / 255
    for channel in range(images.shape[3]):
        counts = sum(np.bincount(part[..., channel].ravel(), minlength=256) for part in np.array_split(images, 16))
        shares = counts / np.sum(counts)
        mean = float(shares @ values)
        deviation = float(shares @ (values - mean) ** 2) ** 0.5
        if deviation == 0:
            raise ValueError(f"must have images of more than one brightness; channel {channel} has one only")
        means.append(mean)
        deviations.append(deviation)
    return tuple(means), tuple(deviations)


def _size(images: Array) -> str:
    return "{} x {} with {} channel(s)".format(*images.shape[1:])


def _channels_first(images: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))  # [n, c, H, W]
