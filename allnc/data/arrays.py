"""Sets of small images in one file: what `data.name arrays` reads.

    images, test_images    [n, H, W] or [n, H, W, c] uint8, all of one size
    labels, test_labels    [n] integers, 0 to C - 1; every class has a training image
    classes                [C] names of the classes; optional
    groups                 [n] integers; optional: training images with the same number stay together where a share of
                           them is held out, such as those of one font, patient or video
    source                 text on where the images come from; optional, not read

The file is a .npz of numpy, or a .safetensors, whose names of the classes are a JSON list in the metadata (`classes`).
Nothing is unpickled.

Legend: n images, H, W height and width, c channels, C classes.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from allnc.config import DataConfig
from allnc.data.images import shown
from allnc.data.sources import ImageSet

NEEDED = ("images", "labels", "test_images", "test_labels")
LABELLED = ("images", "labels")  # of a file that is measured on only
OPTIONAL = ("classes", "groups", "source")
MOST_CLASSES = 2**31 - 1
Array = npt.NDArray[Any]


def read_arrays(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set in the file data.root.

    Mean and deviation of the pixels are those of all its training images.

    Args:
        config: of which root, a .npz or .safetensors file, and augmentation are read.

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
        arrays = _read(path, NEEDED)
        train, test = _sets(arrays)
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
        arrays = _read(path, LABELLED)
        part = "test_" if {"test_images", "test_labels"} <= set(arrays) else ""
        images = _images(f"{part}images", arrays[f"{part}images"])
        labels = _integers(f"{part}labels", arrays[f"{part}labels"], len(images), f"{part}images")
        classes = _class_names(arrays.get("classes"), MOST_CLASSES)
        largest = len(classes) - 1 if classes else MOST_CLASSES
        if labels.min() < 0 or labels.max() > largest:
            raise ValueError(f"must have {part}labels in 0 to {largest}; got {labels.min()} to {labels.max()}")
    except ValueError as error:
        raise ValueError(f"{shown(path)} {error}") from error
    return _channels_first(images), torch.from_numpy(labels), classes


def _read(path: str, needed: tuple[str, ...]) -> dict[str, Array]:
    return (_read_safetensors if path.lower().endswith(".safetensors") else _read_npz)(path, needed)


def _read_npz(path: str, needed: tuple[str, ...]) -> dict[str, Array]:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # what damaged bytes drive a reader to, here and below
        raise ValueError(f"must be a whole .npz file, as numpy.savez writes it; got: {_reason(error)}") from error
    with archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        _check_names(names, needed)
        return {name: _read_npy(archive, name) for name in sorted(set(names) - {"source"})}


def _read_npy(archive: zipfile.ZipFile, name: str) -> Array:
    try:
        with warnings.catch_warnings(), archive.open(f"{name}.npy") as file:
            warnings.simplefilter("ignore")  # numpy's on headers that other versions wrote
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # and reading to the end makes zipfile compare the checksum
                raise ValueError("it has more bytes than its shape tells")
            return array
    except Exception as error:
        if "Object arrays" in str(error):
            raise ValueError(
                f"must hold plain arrays; {name} is one of Python objects, which is not unpickled: save numbers, or "
                "for classes strings (numpy.array(names, dtype=str))"
            ) from error
        raise ValueError(f"must be a whole .npz file; {name} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if line.isprintable() else ascii(line)


def _read_safetensors(path: str, needed: tuple[str, ...]) -> dict[str, Array]:
    try:
        with safe_open(path, "pt") as file:  # numpy would not know bfloat16
            tensors = {name: file.get_tensor(name) for name in set(file.keys()) - {"source"}}
            classes = (file.metadata() or {}).get("classes")
    except Exception as error:
        raise ValueError(f"must be a whole .safetensors file; got: {_reason(error)}") from error
    _check_names([*tensors], needed)
    arrays: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"must have {name} of integers; got {list(tensor.shape)} of type {tensor.dtype}")
        arrays[name] = tensor.clone().numpy()  # not the file's own bytes, which others may change
    if classes is not None:
        arrays["classes"] = _listed(classes)
    return arrays


def _listed(text: str) -> Array:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"must name its classes in a JSON list of strings; got {text[:40]!r}")
    return np.array(names, dtype=str)


def _check_names(names: list[str], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"must hold {', '.join(needed)}; {', '.join(missing)} missing")
    unknown = sorted(set(names) - {*NEEDED, *OPTIONAL})
    if unknown:
        raise ValueError(
            f"must hold no more than {', '.join((*NEEDED, *OPTIONAL))}; got {', '.join(map(ascii, unknown))}, too"
        )


def _sets(arrays: Mapping[str, Array]) -> tuple[ImageSet, ImageSet]:
    images, tests = (_images(name, arrays[name]) for name in ("images", "test_images"))
    if images.shape[1:] != tests.shape[1:]:
        raise ValueError(
            f"must have test_images of the size of images, {_size(images)}; got {_size(tests)}: resize one of them"
        )
    labels = _integers("labels", arrays["labels"], len(images), "images")
    test_labels = _integers("test_labels", arrays["test_labels"], len(tests), "test_images")
    classes = _class_names(arrays.get("classes"), len(labels))
    num_classes = _number_of_classes(labels, classes)
    if test_labels.min() < 0 or test_labels.max() >= num_classes:
        raise ValueError(
            f"must have test_labels in 0 to {num_classes - 1}, as labels; got {test_labels.min()} to "
            f"{test_labels.max()}"
        )
    groups = arrays.get("groups")
    mean, std = statistics(images)
    common: dict[str, Any] = {"num_classes": num_classes, "mean": mean, "std": std, "classes": classes}
    train = ImageSet(
        labels=torch.from_numpy(labels),
        images=_channels_first(images),
        groups=None if groups is None else torch.from_numpy(_integers("groups", groups, len(images), "images")),
        **common,
    )
    return train, ImageSet(labels=torch.from_numpy(test_labels), images=_channels_first(tests), **common)


def _images(name: str, images: Array) -> Array:
    """Return images as [n, H, W, c]."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"must have {name} [n, H, W] or [n, H, W, c] of type uint8 (0 to 255), none of which is 0; got "
            f"{list(images.shape)} of type {images.dtype}"
        )
    if images.ndim == 3:
        return images[..., None]
    if images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise ValueError(
            f"must have {name} with the channels last, [n, H, W, c]; got {list(images.shape)}: move them with "
            f"{name}.transpose(0, 2, 3, 1)"
        )
    return images


def _integers(name: str, values: Array, number: int, counted: str) -> npt.NDArray[np.int64]:
    if values.dtype.kind not in "iu" or values.shape != (number,):
        raise ValueError(
            f"must have {name} [{number}] of integers, one for each of {counted}; got {list(values.shape)} of type "
            f"{values.dtype}"
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
        raise ValueError(f"must have labels in 0 to {num_classes - 1}{by}; got {found[0]} to {found[-1]}")
    if len(found) != num_classes:
        gap = int(np.flatnonzero(found != np.arange(len(found)))[0]) if found[-1] >= len(found) else len(found)
        raise ValueError(
            f"must have an image of every class in 0 to {num_classes - 1}; class {gap} has none: number the classes "
            "without gaps"
        )
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
