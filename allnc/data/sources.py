"""Where images come from: digits, Fashion-MNIST, CIFAR, files of arrays, image lists, image folders.

Small sets are one uint8 tensor in memory; large ones are paths that worker processes decode. What is missing, damaged
or contradictory is said before a run starts.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allnc.config import DataConfig
from allnc.data.folders import read_folders
from allnc.data.images import shown
from allnc.data.lists import read_lists
from allnc.data.longtail import held_out, shuffled_by_class, sizes_within, subset
from allnc.data.own.index import Index
from allnc.data.paths import PathList

FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_GREY = ((0.449,), (0.226,))  # means of the three
MEAN_STD = {
    "digits": ((0.306,), (0.376,)),
    "fashion_mnist": ((0.286,), (0.353,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
DIGITS_TEST_PER_CLASS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """Images with labels, in memory or on disk.

    Args:
        labels: class of every image, [n], int64.
        num_classes: number of classes C.
        mean, std: of the pixels scaled to [0, 1], by channel.
        images: [n, channels, height, width], uint8; None when the images are on disk.
        paths: files of the images, [n]; empty when they never were files.
        classes: names of the classes, [C]; empty when they have none.
        groups: number of the group of every image, [n], int64; images of one group stay together where a share of the
            set is held out. None: no image belongs to another.
        available: images of the set from which this one was cut, >= n; None stands for n.
        notes: sentences for whoever starts a run: what was left out or looks wrong.

    Raises:
        ValueError: sizes that do not fit, or labels outside of 0 to C - 1.
    """

    labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: Tensor | None = None
    paths: PathList = field(default_factory=lambda: PathList.of(()))
    classes: tuple[str, ...] = ()
    groups: Tensor | None = None
    available: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number = len(self.paths) if self.images is None else len(self.images)
        if self.labels.shape != (number,) or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be [{number}], int64, one for each image; got {list(self.labels.shape)}, "
                f"{self.labels.dtype}"
            )
        if self.groups is not None and (self.groups.shape != (number,) or self.groups.dtype != torch.int64):
            raise ValueError(
                f"groups must be [{number}], int64, one for each image; got {list(self.groups.shape)}, "
                f"{self.groups.dtype}"
            )
        if number and not (int(self.labels.min()) >= 0 and int(self.labels.max()) < self.num_classes):
            raise ValueError(
                f"labels must be 0 to {self.num_classes - 1}; got {int(self.labels.min())} to {int(self.labels.max())}"
            )
        if self.images is not None and (self.images.dtype != torch.uint8 or self.images.ndim != 4):
            raise ValueError(
                f"images must be [n, channels, height, width], uint8; got {list(self.images.shape)}, "
                f"{self.images.dtype}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def shape(self, config: DataConfig) -> tuple[int, ...]:
        """Shape of an image as the model sees it."""
        if self.images is None:
            return (self.channels, config.image_size, config.image_size)
        return tuple(self.images.shape[1:])

    @property
    def class_counts(self) -> Tensor:
        return torch.bincount(self.labels, minlength=self.num_classes)  # [C]

    @property
    def count_text(self) -> str:
        """The number of images, as `186 of 520` when some were left out."""
        return f"{len(self)}" if self.available in (None, len(self)) else f"{len(self)} of {self.available}"

    def fingerprint(self) -> str:
        """Return the SHA-256 of labels, pixels in memory and file names, by which processes compare their sets."""
        sha = hashlib.sha256(self.labels.numpy().tobytes())
        if self.images is not None:
            sha.update(self.images.numpy().tobytes())
        for path in self.paths:
            sha.update(os.path.basename(path).encode(errors="surrogateescape") + b"\0")
        return sha.hexdigest()

    def select(self, positions: np.ndarray) -> ImageSet:
        """Return the set of the images at `positions`, in that order."""
        index = torch.from_numpy(np.asarray(positions, dtype=np.int64))
        return replace(
            self,
            labels=self.labels[index],
            groups=None if self.groups is None else self.groups[index],
            images=None if self.images is None else self.images[index],
            paths=self.paths.take(index.numpy()) if len(self.paths) else self.paths,
        )


def load(config: DataConfig, *, tested: bool = False, index: Index | None = None) -> tuple[ImageSet, ImageSet]:
    """Return the (long-tailed) training set that a configuration asks for, and the set on which it is measured.

    Args:
        config: what to load.
        tested: measure on the test set also where validation images are held out.
        index: table of the images of data.name own, where it is at hand.

    Returns:
        Training set, and the validation set where there is one and `tested` is False, else the test set.

    Raises:
        ValueError: files are missing or do not hold what they should; the message says what to do.
    """
    places = {name: getattr(config, name) for name in ("root", "train_list", "test_list")}
    config = replace(config, **{name: os.path.expanduser(place) for name, place in places.items() if place})
    if config.name == "digits":
        train, test = _digits(config.subset_seed)
    elif config.name == "fashion_mnist":
        train, test = _fashion_mnist(config)
    elif config.name in ("cifar10", "cifar100"):
        train, test = _cifar(config)
    elif config.name == "arrays":
        from allnc.data.arrays import read_arrays  # whose sets are of this module

        train, test = read_arrays(config)
    elif config.name == "image_list":
        train, test = _image_lists(config)
    elif config.name == "features":
        from allnc.data.features import read_features  # whose set is one of these

        train, test = read_features(config)
    elif config.name == "own":
        from allnc.data.own.sets import read_own  # whose sets are of this module

        train, test = read_own(config, index, tested=tested)
    else:
        train, test = _image_folder(config)
    return divided(train, test, config, tested=tested)


def divided(train: ImageSet, test: ImageSet, config: DataConfig, *, tested: bool = False) -> tuple[ImageSet, ImageSet]:
    """Hold validation images out of a training set and cut class sizes out of it, as `load` does.

    Args:
        train, test: all images of a data set.
        config: what is wanted of them.
        tested: as `load`.

    Returns:
        As `load`.

    Raises:
        ValueError: the classes have too few images.
    """
    if config.validation > 0 and config.name != "own":  # whose table says which
        kept, held = held_out(
            train.labels.numpy(),
            train.num_classes,
            config.validation,
            config.subset_seed,
            None if train.groups is None else train.groups.numpy(),
        )
        if not tested:
            test = replace(train.select(held), notes=_validation_notes(train, held))
        train = train.select(kept)
    if config.profile != "none":
        ratio = config.imbalance_ratio
        sizes = sizes_within(train.class_counts.tolist(), config.max_per_class, ratio, config.profile, train.classes)
        chosen = train.select(subset(train.labels.numpy(), sizes, config.subset_seed))
        train = replace(chosen, available=len(train))
    return train, test


def _validation_notes(images: ImageSet, held: np.ndarray) -> tuple[str, ...]:
    counts = torch.bincount(images.labels[torch.from_numpy(held)], minlength=images.num_classes)
    return untested_notes(counts, "validation")


def untested_notes(counts: torch.Tensor, split: str) -> tuple[str, ...]:
    """Say of how many classes, of which there are `counts` images [C], nothing is measured on test or validation."""
    without = int((counts == 0).sum())
    verb = "has" if without == 1 else "have"
    return (f"{without} of {len(counts)} classes {verb} no {split} image",) if without else ()


def _digits(seed: int) -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8))  # 0..16 as published
    mean, std = MEAN_STD["digits"]
    digits = ImageSet(labels=torch.from_numpy(labels).long(), num_classes=10, mean=mean, std=std, images=images)
    by_class = shuffled_by_class(labels, 10, seed)
    test = np.concatenate([positions[:DIGITS_TEST_PER_CLASS] for positions in by_class])
    train = np.concatenate([positions[DIGITS_TEST_PER_CLASS:] for positions in by_class])
    return digits.select(train), digits.select(test)


def _read_idx(path: Path, magic: bytes) -> np.ndarray:
    """Read one file of MNIST's idx format, gzipped or not."""
    packed = path.suffix == ".gz"
    rank = magic[3]
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(4 + 4 * rank)
            if head[:4] != magic:
                got = head[:4].hex() or "nothing"
                raise ValueError(f"{path} must be an idx file of type {magic.hex()}; got {got}: download it again")
            shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, len(head), 4)]
            wanted = math.prod(shape)
            # A damaged size can ask for more memory than there is; deflate packs 1,032 bytes into one at best.
            possible = path.stat().st_size * (1032 if packed else 1)
            raw = file.read(min(wanted, possible) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole idx file; got: {error}: download it again") from error
    if len(head) < 4 + 4 * rank or len(raw) != wanted or wanted == 0:
        got = f"{len(raw)}" if len(raw) <= wanted else "more"
        raise ValueError(f"{path} must hold {wanted or 'some'} bytes; got {got}: download it again")
    return np.frombuffer(raw, np.uint8).reshape(shape).copy()


def _idx_part(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the images [n, 1, 28, 28] and labels [n] of Fashion-MNIST's training or test part."""
    names = [folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"]
    image_file, label_file = [path if path.is_file() else path.with_name(f"{path.name}.gz") for path in names]
    images, labels = _read_idx(image_file, b"\x00\x00\x08\x03"), _read_idx(label_file, b"\x00\x00\x08\x01")
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{image_file} must hold images of 28 x 28; got {images.shape[1]} x {images.shape[2]}")
    if len(images) != len(labels):
        raise ValueError(
            f"{label_file} must have {len(images)} labels, one for each image of {image_file.name}; got {len(labels)}"
        )
    if labels.max() > 9:
        raise ValueError(f"{label_file} must hold labels 0 to 9; got {labels.max()}: download it again")
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def _fashion_mnist(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    folders = [Path(f) for f in FASHION_FOLDERS]
    if config.root:
        folders = [Path(config.root), Path(config.root) / "FashionMNIST" / "raw"]

    def complete(folder: Path) -> bool:
        return all((folder / n).is_file() or (folder / f"{n}.gz").is_file() for n in names)

    found = next((f for f in folders if complete(f)), None)
    if found is None and config.download:
        root = config.root or "data"
        _download("FashionMNIST", root)
        found = Path(root) / "FashionMNIST" / "raw"
    if found is None:
        raise ValueError(
            f"Fashion-MNIST's four idx files ({names[0]}[.gz] ...) must be in "
            f"{' or '.join(map(str, folders))}; got none: "
            "install the Debian package dataset-fashion-mnist, give data.root, or pass --data.download true"
        )
    mean, std = MEAN_STD["fashion_mnist"]
    sets = []
    for part in ("train", "t10k"):
        images, labels = _idx_part(found, part)
        sets.append(ImageSet(labels=labels, num_classes=10, mean=mean, std=std, images=images))
    return sets[0], sets[1]


def _download(dataset: str, root: str) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, dataset)(root, download=True)
    except Exception as error:  # torchvision raises whatever its mirrors and urllib raise
        problem = " ".join(str(error).split())
        raise ValueError(f"data.download could not fetch {dataset} into {shown(root)}: {problem}") from error


def _cifar(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets

    dataset = "CIFAR10" if config.name == "cifar10" else "CIFAR100"
    root = config.root or "data"
    if config.download:
        _download(dataset, root)
    mean, std = MEAN_STD[config.name]
    sets = []
    for is_train in (True, False):
        try:
            part = getattr(datasets, dataset)(root, train=is_train)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{dataset}'s Python files must be in {shown(root)}; got {_unsound_file(dataset, root)}: give "
                "data.root or pass --data.download true"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()  # [n, 3, 32, 32]
        labels = torch.tensor(part.targets)
        sets.append(ImageSet(labels=labels, num_classes=len(part.classes), mean=mean, std=std, images=images))
    return sets[0], sets[1]


def _unsound_file(dataset: str, root: str) -> str:
    """Name the first file of a CIFAR set whose checksum is not the published one."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    source = getattr(datasets, dataset)
    meta = (source.meta["filename"], source.meta["md5"])
    for name, checksum in (*source.train_list, *source.test_list, meta):
        path = os.path.join(root, source.base_folder, name)
        if not os.path.exists(path):
            return f"{shown(path)}, which is missing"
        if not (os.access(path, os.R_OK) and check_integrity(path, checksum)):
            return f"{shown(path)}, which is damaged or cannot be read"
    return "files that torchvision cannot read"


def _image_lists(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    assert config.root and config.train_list and config.test_list  # DataConfig has checked
    if not os.path.isdir(config.root):
        raise ValueError(f"data.root must be the folder of the images; got {shown(config.root)}, which is no folder")
    train, test, num_classes, notes = read_lists(config.train_list, config.test_list, config.root)
    sets = [on_disk(part.paths, part.labels, num_classes, config.channels) for part in (train, test)]
    return sets[0], replace(sets[1], notes=tuple(notes))


def _image_folder(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    assert config.root  # DataConfig has checked
    tests = [os.path.join(config.root, name) for name in ("test", "val")]
    folders = os.path.join(config.root, "train"), next((path for path in tests if os.path.isdir(path)), tests[-1])
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(
                f"data.root must hold train/ and val/ or test/ with a folder for each class; {shown(folder)} is missing"
            )
    train, test = read_folders(folders)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"{shown(test.folder)} must have the classes of {shown(train.folder)}; they differ in "
            f"{', '.join(map(shown, odd[:3]))}{' ...' if len(odd) > 3 else ''}"
        )
    sets = [
        on_disk(PathList.of(part.paths), np.array(part.labels), len(part.classes), config.channels)
        for part in (train, test)
    ]
    return (
        replace(sets[0], classes=train.classes, notes=tuple(train.notes)),
        replace(sets[1], classes=test.classes, notes=tuple(test.notes)),
    )


def on_disk(paths: PathList, labels: np.ndarray, num_classes: int, channels: int) -> ImageSet:
    """Return the set of images in files, [n], with their labels, [n]; pixels have the statistics of ImageNet."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else IMAGENET_GREY
    return ImageSet(
        labels=torch.from_numpy(labels.astype(np.int64)),
        num_classes=num_classes,
        mean=mean,
        std=std,
        paths=paths,
    )
