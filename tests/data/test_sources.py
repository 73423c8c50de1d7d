"""Sources: real digits and Fashion-MNIST, files made on the spot, and what is missing."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allnc.config import Config, DataConfig
from allnc.data import ImageSet, load
from allnc.data.sources import FASHION_FOLDERS
from allnc.trainer.options import ignored_options


def test_digits_are_long_tailed_with_a_balanced_test() -> None:
    train, test = load(DataConfig(imbalance_ratio=20, max_per_class=120))
    assert train.class_counts.tolist() == [120, 86, 61, 44, 31, 22, 16, 11, 8, 6]
    assert test.class_counts.tolist() == [50] * 10
    assert train.images is not None and test.images is not None
    assert train.images.shape == (405, 1, 8, 8) and train.images.dtype == torch.uint8
    assert train.images.max() == 255


def test_digits_of_training_and_test_are_different_images() -> None:
    train, test = load(DataConfig(imbalance="none"))
    assert len(train) + len(test) == 1797
    assert train.images is not None and test.images is not None
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_the_subset_seed_chooses_the_images() -> None:
    first, again, other = (load(DataConfig(subset_seed=s))[0].images for s in (0, 0, 1))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_statistics_are_those_of_the_pixels() -> None:
    train, _ = load(DataConfig(imbalance="none"))
    assert train.images is not None
    pixels = train.images.float() / 255
    assert abs(float(pixels.mean()) - train.mean[0]) < 0.01 and abs(float(pixels.std()) - train.std[0]) < 0.01


def _idx(path: Path, values: np.ndarray, packed: bool) -> None:
    raw = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(raw, mtime=0) if packed else raw)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_idx_files(packed: bool, tmp_path: Path) -> None:
    labels = np.arange(40, dtype=np.uint8) % 10
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        _idx(tmp_path / f"{part}-images-idx3-ubyte", images, packed)
        _idx(tmp_path / f"{part}-labels-idx1-ubyte", labels, packed)
    config = DataConfig(name="fashion_mnist", root=str(tmp_path), imbalance="none", augmentation="none")
    train, test = load(config)
    assert train.images is not None and np.array_equal(train.images[:, 0].numpy(), images)
    assert test.labels.tolist() == labels.tolist()
    (tmp_path / f"t10k-labels-idx1-ubyte{'.gz' * packed}").unlink()
    with pytest.raises(ValueError, match="Fashion-MNIST's four idx files"):
        load(config)


def test_broken_idx_file(tmp_path: Path) -> None:
    for part in ("train", "t10k"):
        _idx(tmp_path / f"{part}-images-idx3-ubyte", np.zeros((2, 28, 28), np.uint8), False)
        _idx(tmp_path / f"{part}-labels-idx1-ubyte", np.zeros(2, np.uint8), False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="must hold 1568 bytes; got 1563: download it again"):
        load(DataConfig(name="fashion_mnist", root=str(tmp_path), augmentation="none"))


@pytest.mark.skipif(not Path(FASHION_FOLDERS[0]).is_dir(), reason="no dataset-fashion-mnist package here")
def test_fashion_mnist_long_tailed() -> None:
    config = DataConfig(name="fashion_mnist", imbalance_ratio=100, max_per_class=1500, augmentation="crop_flip_cutout")
    train, test = load(config)
    assert train.class_counts.tolist() == [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]
    assert test.class_counts.tolist() == [1000] * 10


def test_cifar_through_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    class Fake:
        classes = ("a", "b")
        base_folder, meta = "cifar", {"filename": "meta", "md5": "0"}
        train_list, test_list = (("batch", "0"),), ()

        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            if root == "empty":
                raise RuntimeError("Dataset not found or corrupted")
            self.data = np.zeros((6, 32, 32, 3), np.uint8)
            self.data[..., 1] = 7
            self.targets = [0, 1, 0, 1, 0, 1]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    config = DataConfig(name="cifar10", root="x", imbalance_ratio=3, augmentation="autoaugment")
    train, test = load(config)
    assert train.class_counts.tolist() == [3, 1] and len(test) == 6
    assert train.images is not None and train.images.shape == (4, 3, 32, 32)
    assert train.images[0, :, 0, 0].tolist() == [0, 7, 0]
    with pytest.raises(ValueError, match=r"give data\.root or pass --data.download true"):
        load(DataConfig(name="cifar10", root="empty", augmentation="autoaugment"))


def _fashion(folder: Path, images: np.ndarray | None = None, labels: np.ndarray | None = None) -> DataConfig:
    """Four idx files; the training part's can be given."""
    images = np.zeros((20, 28, 28), np.uint8) if images is None else images
    labels = np.arange(20, dtype=np.uint8) % 10 if labels is None else labels
    _idx(folder / "train-images-idx3-ubyte", images, False)
    _idx(folder / "train-labels-idx1-ubyte", labels, True)
    _idx(folder / "t10k-images-idx3-ubyte", np.zeros((10, 28, 28), np.uint8), False)
    _idx(folder / "t10k-labels-idx1-ubyte", np.arange(10, dtype=np.uint8), False)
    return DataConfig(name="fashion_mnist", root=str(folder), augmentation="none", imbalance="none")


@pytest.mark.parametrize(
    ("file", "raw", "message"),
    [
        ("train-images-idx3-ubyte", b"", "must be an idx file of type 00000803; got nothing: download it again"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x01" + bytes(99), "must be an idx file of type 00000803; got 00000801"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "must hold some bytes; got 0: download it again"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12 + b"123", "must hold 7922816245.* bytes; got 3:"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0\0\1\0\0\0\1\0\0\0\1ab", "must hold 1 bytes; got more:"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + bytes(12), "must hold some bytes; got 0"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0\0\1\0\0\0\1\0\0\0\1a", "must hold images of 28 x 28; got 1 x 1"),
        ("train-labels-idx1-ubyte.gz", b"", "must be an idx file of type 00000801; got nothing"),
        ("train-labels-idx1-ubyte.gz", b"not gzip", "must be a whole idx file; got: Not a gzipped file"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(bytes(99), mtime=0)[:-9], "must be .*idx file"),
        (
            "train-labels-idx1-ubyte.gz",
            gzip.compress(b"\0\0\x08\x01\0\0\0\x14" + bytes(20), mtime=0)[:-12],
            "must be a whole idx file",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            gzip.compress(b"\0\0\x08\x01\xff\xff\xff\xff" + bytes(20), mtime=0),
            "must hold 4294967295",
        ),
    ],
)
def test_damaged_idx_files_are_named(file: str, raw: bytes, message: str, tmp_path: Path) -> None:
    config = _fashion(tmp_path)
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(ValueError, match=f"{file} {message}"):
        load(config)


def test_a_flipped_bit_in_a_gzipped_file_is_found(tmp_path: Path) -> None:
    config = _fashion(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for at in range(10, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz must"):
            load(config)


def test_labels_and_images_of_idx_files_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz must have 20 labels, .*; got 19"):
        load(_fashion(tmp_path, labels=np.zeros(19, np.uint8)))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz must hold labels 0 to 9; got 77"):
        load(_fashion(tmp_path, labels=np.full(20, 77, np.uint8)))


def test_a_class_without_an_image_cannot_be_cut(tmp_path: Path) -> None:
    config = _fashion(tmp_path, labels=np.arange(20, dtype=np.uint8) % 9)
    with pytest.raises(ValueError, match="every class must have an image; class 9 has none"):
        load(dataclasses.replace(config, imbalance="auto"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_and_broken_cifar_files_are_named(name: str, tmp_path: Path) -> None:
    config = DataConfig(name=name, root=str(tmp_path), augmentation="autoaugment")  # pyright: ignore[reportArgumentType]
    folder, first = {"cifar10": ("cifar-10-batches-py", "data_batch_1"), "cifar100": ("cifar-100-python", "train")}[
        name
    ]
    with pytest.raises(ValueError, match=rf"{folder}/{first}, which is missing: give"):
        load(config)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / first).write_bytes(b"half a file")
    with pytest.raises(ValueError, match=rf"{folder}/{first}, which is damaged .*download"):
        load(config)
    (tmp_path / folder / first).unlink()
    (tmp_path / folder / first).mkdir()
    with pytest.raises(ValueError, match=rf"{folder}/{first}, which is damaged"):
        load(config)


def test_auto_cuts_balanced_sets_only() -> None:
    assert DataConfig().imbalance == "auto"
    for name in ("digits", "fashion_mnist", "cifar10", "cifar100"):
        assert DataConfig(name=name).profile == "exponential"
    files: dict[str, Any] = {"root": "x", "augmentation": "none"}
    folder = DataConfig(name="image_folder", **files)
    assert folder.profile == "none"
    assert DataConfig(name="image_list", train_list="a", test_list="b", **files).profile == "none"
    assert dataclasses.replace(folder, imbalance="step").profile == "step"
    assert DataConfig(imbalance="none").profile == "none"
    assert "data.imbalance_ratio" in ignored_options(Config(data=folder))
    assert "data.imbalance_ratio" not in ignored_options(Config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, r"labels must be \[3\], int64"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels must be 0 to 1; got 0 to 2"),
        ({"labels": torch.tensor([0, 1, -1])}, "labels must be 0 to 1; got -1 to 1"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "int64.*float32"),
        ({"images": torch.zeros(3, 1, 4, 4)}, "uint8; got .*float32"),
        ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, r"images must be \[n, channels, height, width\]"),
    ],
)
def test_an_image_set_fits_together(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {
        "labels": torch.tensor([0, 1, 1]),
        "images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        ImageSet(num_classes=2, mean=(0.5,), std=(0.5,), **values)


def test_a_cut_set_knows_what_it_was_cut_from() -> None:
    train, test = load(DataConfig(max_per_class=40, imbalance_ratio=4))
    assert train.count_text == f"{len(train)} of 1297" and test.count_text == "500"
    assert load(DataConfig(imbalance="none"))[0].count_text == "1297"


def test_validation_images_are_held_out_before_the_classes_are_cut() -> None:
    plain = DataConfig(name="digits", imbalance_ratio=10, max_per_class=50, validation=0.2)
    train, validation = load(plain)
    again, test = load(plain, tested=True)
    assert train.fingerprint() == again.fingerprint()
    assert int(validation.class_counts.min()) >= 20  # about a fifth of the 125 to 133 images that each class has
    assert train.class_counts.tolist()[0] == 50
    assert int(train.class_counts[-1]) == 5
    images = [part.images for part in (train, validation, test)]
    sets = [{bytes(image.numpy().tobytes()) for image in part} for part in images if part is not None]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert test.fingerprint() == load(DataConfig(name="digits"))[1].fingerprint()
