"""Sources: real digits and Fashion-MNIST, files made on the spot, and what is missing."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from allnc.config import DataConfig
from allnc.data import load
from allnc.data.sources import FASHION_FOLDERS


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
    path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(raw) if packed else raw)


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


def _picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value, 0, 0)).save(path)


def _lists(folder: Path, train: str, test: str) -> DataConfig:
    (folder / "train.txt").write_text(train)
    (folder / "test.txt").write_text(test)
    return DataConfig(
        name="image_list",
        root=str(folder),
        train_list=str(folder / "train.txt"),
        test_list=str(folder / "test.txt"),
        imbalance="none",
        augmentation="none",
    )


def test_image_lists(tmp_path: Path) -> None:
    _picture(tmp_path / "a/one two.png", 1)
    _picture(tmp_path / "b/three.png", 2)
    train, test = load(_lists(tmp_path, "a/one two.png 0\nb/three.png 1\n\n", "b/three.png 1\n"))
    assert train.paths == (str(tmp_path / "a/one two.png"), str(tmp_path / "b/three.png"))
    assert (train.labels.tolist(), test.labels.tolist(), train.num_classes) == ([0, 1], [1], 2)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("a.png 0\ngone.png 1\n", "a.png 0\n", "gone.png, which is missing: data.root must be the folder"),
        ("a.png\n", "a.png 0\n", r"train.txt:1 must be `relative/path label`; got 'a.png'"),
        ("", "a.png 0\n", "data.train_list must name images; got the empty list"),
        ("a.png 0\n", "a.png 1\n", "data.test_list must have labels below 1, as data.train_list; got 1"),
    ],
)
def test_broken_lists_are_refused_before_training(train: str, test: str, message: str, tmp_path: Path) -> None:
    _picture(tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match=message):
        load(_lists(tmp_path, train, test))


def test_image_folder(tmp_path: Path) -> None:
    config = DataConfig(name="image_folder", root=str(tmp_path), imbalance="none", augmentation="none")
    with pytest.raises(ValueError, match="train is missing"):
        load(config)
    for part, label, number in (
        ("train", "cat", 3),
        ("train", "dog", 2),
        ("val", "cat", 1),
        ("val", "dog", 1),
    ):
        for i in range(number):
            _picture(tmp_path / part / label / f"{i}.png", i)
    train, test = load(config)
    assert train.class_counts.tolist() == [3, 2] and test.class_counts.tolist() == [1, 1]
    _picture(tmp_path / "val" / "emu" / "0.png", 0)
    with pytest.raises(ValueError, match="they differ in emu"):
        load(config)
