"""Where images come from: digits, Fashion-MNIST, CIFAR, image lists, image folders.

Small sets are one uint8 tensor in memory; large ones are paths that worker processes decode. What is
missing is said before a run starts.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allnc.config import DataConfig
from allnc.data.longtail import class_sizes, shuffled_by_class, subset

FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_STD = {
    "digits": ((0.306,), (0.376,)),
    "fashion_mnist": ((0.286,), (0.353,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
DIGITS_TEST_PER_CLASS = 50
CHECKED_FILES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """Images with labels, in memory or on disk.

    Args:
        labels: class of every image, [n], int64.
        num_classes: number of classes C.
        mean, std: of the pixels scaled to [0, 1], by channel.
        images: [n, channels, height, width], uint8; None when the images are on disk.
        paths: files of the images; empty when they are in memory.
    """

    labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: Tensor | None = None
    paths: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def class_counts(self) -> Tensor:
        return torch.bincount(self.labels, minlength=self.num_classes)  # [C]

    def select(self, positions: np.ndarray) -> ImageSet:
        """Return the set of the images at `positions`, in that order."""
        index = torch.from_numpy(np.asarray(positions, dtype=np.int64))
        return ImageSet(
            labels=self.labels[index],
            num_classes=self.num_classes,
            mean=self.mean,
            std=self.std,
            images=None if self.images is None else self.images[index],
            paths=tuple(self.paths[i] for i in index.tolist()) if self.paths else (),
        )


def load(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Return the (long-tailed) training set and the test set that a configuration asks for.

    Raises:
        ValueError: files are missing or do not hold what they should; the message says what to do.
    """
    if config.name == "digits":
        train, test = _digits(config.subset_seed)
    elif config.name == "fashion_mnist":
        train, test = _fashion_mnist(config)
    elif config.name in ("cifar10", "cifar100"):
        train, test = _cifar(config)
    elif config.name == "image_list":
        train, test = _image_lists(config)
    else:
        train, test = _image_folder(config)
    if config.imbalance != "none":
        available = int(train.class_counts.min())
        largest = config.max_per_class if config.max_per_class is not None else available
        sizes = class_sizes(train.num_classes, largest, config.imbalance_ratio, config.imbalance)
        train = train.select(subset(train.labels.numpy(), sizes, config.subset_seed))
    return train, test


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


def _read_idx(folder: Path, name: str, magic: bytes) -> np.ndarray:
    """Read one file of MNIST's idx format, gzipped or not."""
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:4] != magic:
        raise ValueError(f"{path} must be an idx file of type {magic.hex()}; got {raw[:4].hex()}: download it again")
    rank = magic[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4).astype(int)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if values.size != shape.prod():
        raise ValueError(f"{path} must hold {shape.prod()} bytes; got {values.size}: download it again")
    return values.reshape(shape).copy()


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
        images = torch.from_numpy(_read_idx(found, f"{part}-images-idx3-ubyte", b"\x00\x00\x08\x03"))[:, None]
        labels = torch.from_numpy(_read_idx(found, f"{part}-labels-idx1-ubyte", b"\x00\x00\x08\x01")).long()
        sets.append(ImageSet(labels=labels, num_classes=10, mean=mean, std=std, images=images))
    return sets[0], sets[1]


def _download(dataset: str, root: str) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, dataset)(root, download=True)
    except Exception as error:  # torchvision raises whatever its mirrors and urllib raise
        raise ValueError(f"data.download could not fetch {dataset} into {root}: {error}") from error


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
        except RuntimeError as error:
            raise ValueError(
                f"{dataset}'s Python files must be in {root}; got none or broken ones: give data.root or "
                "pass --data.download true"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()  # [n, 3, 32, 32]
        labels = torch.tensor(part.targets)
        sets.append(ImageSet(labels=labels, num_classes=len(part.classes), mean=mean, std=std, images=images))
    return sets[0], sets[1]


def _read_list(option: str, list_path: str, root: Path) -> tuple[list[str], list[int]]:
    """Read `relative/path label` lines; a path may hold spaces."""
    if not Path(list_path).is_file():
        raise ValueError(
            f"{option} must be a text file of `relative/path label` lines; got {list_path}, which is missing"
        )
    paths, labels = [], []
    for number, line in enumerate(Path(list_path).read_text().splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise ValueError(f"{list_path}:{number} must be `relative/path label`; got {line!r}")
        paths.append(str(root / path))
        labels.append(int(label))
    if not paths:
        raise ValueError(f"{option} must name images; got the empty list {list_path}")
    # One look at every file of a million would take minutes on a network disk.
    for path in paths[:: max(1, len(paths) // CHECKED_FILES)]:
        if not Path(path).is_file():
            raise ValueError(
                f"{option} names {path}, which is missing: data.root must be the folder its paths start "
                f"from; got {root}"
            )
    return paths, labels


def _image_lists(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    assert config.root and config.train_list and config.test_list  # DataConfig has checked
    root = Path(config.root)
    if not root.is_dir():
        raise ValueError(f"data.root must be the folder of the images; got {root}, which is missing")
    train_paths, train_labels = _read_list("data.train_list", config.train_list, root)
    test_paths, test_labels = _read_list("data.test_list", config.test_list, root)
    num_classes = max(train_labels) + 1
    if max(test_labels) >= num_classes:
        raise ValueError(
            f"data.test_list must have labels below {num_classes}, as data.train_list; got {max(test_labels)}"
        )
    return _on_disk(train_paths, train_labels, num_classes), _on_disk(test_paths, test_labels, num_classes)


def _image_folder(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    from torchvision.datasets import ImageFolder

    assert config.root  # DataConfig has checked
    root = Path(config.root)
    test_folder = next((root / n for n in ("test", "val") if (root / n).is_dir()), root / "val")
    for folder in (root / "train", test_folder):
        if not folder.is_dir():
            raise ValueError(
                f"data.root must hold train/ and val/ or test/ with a folder for each class; {folder} is missing"
            )
    try:
        train, test = ImageFolder(str(root / "train")), ImageFolder(str(test_folder))
    except FileNotFoundError as error:  # no class folders, or a class without an image
        raise ValueError(f"data.root must hold a folder of images for each class; got {root}: {error}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[:3]
        raise ValueError(
            f"{test_folder} must have the classes of {root / 'train'}; they differ in {', '.join(odd)} ..."
        )
    num_classes = len(train.classes)
    train_paths, test_paths = [p for p, _ in train.samples], [p for p, _ in test.samples]
    return _on_disk(train_paths, train.targets, num_classes), _on_disk(test_paths, test.targets, num_classes)


def _on_disk(paths: list[str], labels: list[int], num_classes: int) -> ImageSet:
    return ImageSet(
        labels=torch.tensor(labels),
        num_classes=num_classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        paths=tuple(paths),
    )
