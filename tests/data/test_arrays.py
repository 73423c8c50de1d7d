"""Files of arrays: what they hold is what is trained on, and whatever is wrong with one is said in a line."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import save_file

from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.data import ImageSet, load
from allnc.trainer import ending, loop
from allnc.trainer.options import ignored_options

N, C = 12, 3


def arrays(*size: int, seed: int = 0) -> dict[str, Any]:
    """12 training and 6 test images of three classes, in groups of two."""
    random = np.random.default_rng(seed)
    size = size or (6, 8)
    return {
        "images": random.integers(0, 256, (N, *size), dtype=np.uint8),
        "labels": np.arange(N, dtype=np.uint8) % C,
        "test_images": random.integers(0, 256, (6, *size), dtype=np.uint8),
        "test_labels": np.arange(6) % C,
        "classes": np.array(["а", "б", "в"]),
        "groups": np.arange(N) // 2,
        "source": np.array("drawn at random"),
    }


def written(folder: Path, values: Mapping[str, Any]) -> DataConfig:
    np.savez(folder / "set.npz", **values)  # pyright: ignore[reportArgumentType]
    return DataConfig(name="arrays", root=str(folder / "set.npz"))


def pixels(images: ImageSet) -> np.ndarray:
    """Return images as they stand in a file, [n, H, W, c]."""
    assert images.images is not None
    return images.images.permute(0, 2, 3, 1).numpy()


def test_a_set_is_what_the_file_holds(tmp_path: Path) -> None:
    values = arrays(6, 8, 3)
    train, test = load(written(tmp_path, values))
    assert np.array_equal(pixels(train), values["images"]) and np.array_equal(pixels(test), values["test_images"])
    assert train.labels.tolist() == [0, 1, 2] * 4 and test.labels.tolist() == [0, 1, 2] * 2
    assert train.groups is not None and train.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert train.classes == test.classes == ("а", "б", "в") and test.groups is None
    assert train.shape(DataConfig()) == (3, 6, 8)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    values = arrays(6, 8)
    del values["classes"], values["groups"], values["source"]
    train, _ = load(written(tmp_path, values))
    assert np.array_equal(pixels(train)[..., 0], values["images"])
    assert (train.num_classes, train.classes, train.groups) == (3, (), None)


def test_safetensors_hold_the_same(tmp_path: Path) -> None:
    values = arrays(6, 8, 3)
    wanted = load(written(tmp_path, values))
    tensors = {name: value for name, value in values.items() if name not in ("classes", "source")}
    path = tmp_path / "set.safetensors"
    save_file(tensors, path, {"classes": json.dumps(values["classes"].tolist()), "source": "drawn at random"})
    for found, part in zip(load(DataConfig(name="arrays", root=str(path))), wanted, strict=True):
        assert found.fingerprint() == part.fingerprint() and (found.mean, found.std) == (part.mean, part.std)
        assert found.classes == part.classes and str(found.groups) == str(part.groups)


def test_mean_and_deviation_are_those_of_all_training_images(tmp_path: Path) -> None:
    values = arrays(6, 8, 3)
    values["images"][..., 1] //= 4
    config = dataclasses.replace(written(tmp_path, values), imbalance="exponential", imbalance_ratio=4.0)
    train, test = load(config)
    scaled = values["images"].reshape(-1, 3) / 255
    assert train.mean == test.mean == pytest.approx(scaled.mean(0)) and train.std == pytest.approx(scaled.std(0))


def test_class_sizes_are_the_file_s_own_unless_a_profile_is_asked_for(tmp_path: Path) -> None:
    values = arrays()
    config = written(tmp_path, values)
    assert config.profile == "none" and load(config)[0].class_counts.tolist() == [4, 4, 4]
    assert "data.imbalance_ratio" in ignored_options(Config(data=config))
    train, _ = load(dataclasses.replace(config, imbalance="exponential", imbalance_ratio=4.0))
    assert train.class_counts.tolist() == [4, 2, 1] and train.available == N
    # Labels, pixels and groups are those of the same images.
    assert train.groups is not None
    for image, label, group in zip(pixels(train)[..., 0], train.labels, train.groups, strict=True):
        (place,) = (place for place in range(N) if np.array_equal(values["images"][place], image))
        assert (place % C, place // 2) == (int(label), int(group))


def test_classes_without_test_images_are_known(tmp_path: Path) -> None:
    values = arrays() | {"test_labels": np.zeros(6, np.int64)}
    assert load(written(tmp_path, values))[1].class_counts.tolist() == [6, 0, 0]


F32, I64 = np.float32, np.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "must hold images, labels, test_images, test_labels; images missing; got 'labels', '"),
        ({"test_labels": None, "labels": None}, "labels, test_labels missing"),
        ({"test_images": None, "labels": None}, "must hold images, labels, test_.*; labels, test_images missing"),
        (
            {"images": np.ones((N, 6, 8))},
            r"float64: save \(255 \* images\)\.round\(\)\.astype\('uint8'\) where",
        ),
        ({"images": np.ones((N, 6, 8), np.uint16)}, r"of type uint16: save \(images >> 8\)\.astype\('uint8'\) where"),
        ({"labels": np.array(list("abc") * 4)}, r"type <U1: save classes, labels = numpy\.unique\(labels, return_inv"),
        ({"labels": np.arange(N) % C + 1}, "classes; got 1 to 3: subtract 1 from labels and test_labels, which begin"),
        ({"labels": np.arange(N) % C + 1, "classes": None}, "class 0 has none: subtract 1 from labels and test_lab"),
        ({"group": np.arange(N)}, "must hold no more than images, .*, source; got 'group', too"),
        ({"images": np.zeros((N, 6, 8), F32)}, r"must have images \[n, H, W\] or .* uint8 .*got \[12, 6, 8\].*float32"),
        ({"test_images": np.zeros((6, 48), np.uint8)}, r"must have test_images \[n, H, W\].*got \[6, 48\]"),
        ({"images": np.zeros((0, 6, 8), np.uint8)}, r"must have images .*got \[0, 6, 8\]"),
        ({"images": np.zeros((N, 3, 6, 8), np.uint8)}, r"images with the channels last.*got \[12, 3, 6, 8\]"),
        ({"test_images": np.zeros((6, 8, 8), np.uint8)}, r"size of images, 6 x 8 with 1 .*; got 8 x 8 with 1 .*: res"),
        ({"images": np.full((N, 6, 8), 9, np.uint8)}, "more than one brightness; channel 0 has one only"),
        ({"labels": np.zeros(5, I64)}, r"must have labels \[12\] of integers, one for each of images; got \[5\]"),
        ({"labels": np.zeros(N, F32)}, r"must have labels \[12\] of integers.*of type float32"),
        ({"labels": np.arange(N) % C - 1}, "must have labels in 0 to 2, one for each of its classes; got -1 to 1"),
        ({"labels": np.arange(N) % 5}, "must have labels in 0 to 2, one for each of its classes; got 0 to 4"),
        ({"labels": np.arange(N) % 2}, "image of every class in 0 to 2; class 2 has none: number the classes without"),
        ({"labels": np.arange(N) % C * 2, "classes": None}, "image of every class in 0 to 4; class 1 has none"),
        ({"labels": np.arange(N) % C - 1, "classes": None}, "must have labels in 0 to 1; got -1 to 1"),
        ({"labels": np.full(N, 2**64 - 1, np.uint64)}, "must have labels that int64 holds; got 18446744073709551615"),
        ({"test_labels": np.full(6, 3)}, "must have test_labels in 0 to 2, as labels; got 3 to 3"),
        ({"test_labels": np.full(6, -1)}, "must have test_labels in 0 to 2, as labels; got -1 to -1"),
        ({"groups": np.arange(6)}, r"must have groups \[12\] of integers, one for each of images; got \[6\]"),
        ({"classes": np.arange(3)}, r"must have classes \[C\] of strings, .* got \[3\] of type int64"),
        ({"classes": np.array(list("abca"))}, "must have classes with a name each; got 'a' twice"),
        ({"classes": np.array(["a", "b\n", "c"])}, r"must have classes with names that can be printed; got 'b\\n'"),
        ({"classes": np.array(list("abcdefghijklm"))}, r"must have classes .* with an image each; got \[13\]"),
        ({"classes": np.array(["a", "b", "c"], object)}, "classes is one of Python objects, which is not unpickled"),
    ],
)
def test_mistakes_in_a_file_are_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {name: value for name, value in (arrays() | change).items() if value is not None}
    with pytest.raises(ValueError, match=rf"^/.*set\.npz .*{message}") as caught:
        load(written(tmp_path, values))
    assert str(caught.value).isprintable()


def test_a_file_of_which_nothing_can_be_held_out_is_refused(tmp_path: Path) -> None:
    values = {"images": np.arange(48, dtype=np.uint8).reshape(2, 4, 6), "labels": np.arange(2)}
    with pytest.raises(ValueError, match="must have images to test on; got none, and none can be held out of 2: each"):
        load(written(tmp_path, values))


def test_files_that_are_none_or_damaged_are_named(tmp_path: Path) -> None:
    config = written(tmp_path, arrays())
    path = Path(config.root or "")
    whole = path.read_bytes()

    def refused(raw: bytes, message: str) -> None:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=rf"^/.*set\.npz must be a whole \.npz file{message}"):
            load(config)

    refused(b"", ", as numpy.savez writes it; got: File is not a zip file")
    refused(whole[: len(whole) // 2], ", as numpy.savez writes it")
    at = whole.index(arrays()["images"].tobytes()) + 5
    refused(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "; images cannot be read: Bad CRC-32")
    memory, member = io.BytesIO(), io.BytesIO()
    np.save(member, arrays()["labels"])
    with zipfile.ZipFile(memory, "w") as archive, zipfile.ZipFile(io.BytesIO(whole)) as before:
        for name in before.namelist():
            archive.writestr(name, member.getvalue() + b"?" if name == "labels.npy" else before.read(name))
    refused(memory.getvalue(), "; labels cannot be read: it has more bytes than its shape tells")
    with pytest.raises(ValueError, match=r"^data\.root must be a \.npz or .* file; got .*, which is no file"):
        load(dataclasses.replace(config, root=str(tmp_path)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "must be a whole .safetensors file; got: "),
        ({"images": np.zeros((2, 2), F32)}, "must hold images, labels; labels "),
        (arrays() | {"images": np.zeros((N, 6, 8), F32)}, "must have images of integers; got .12, 6, 8. of type "),
        (arrays(), "must name its classes in a JSON list of strings; got '.1, 2, 3.'"),
    ],
)
def test_damaged_safetensors_are_named(raw: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    if isinstance(raw, bytes):
        path.write_bytes(raw)
    else:
        save_file({k: v for k, v in raw.items() if k not in ("classes", "source")}, path, {"classes": "[1, 2, 3]"})
    with pytest.raises(ValueError, match=rf"^/.*set\.safetensors {message}"):
        load(DataConfig(name="arrays", root=str(path)))


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.root must be given with data\.name arrays: a \.npz or \.safetensors"):
        DataConfig(name="arrays")
    with pytest.raises(ValueError, match="got randaugment, which is for large images"):
        DataConfig(name="arrays", root="x", augmentation="randaugment")
    for size, shown in (((6, 8), "6 x 8 with 1"), ((8, 8, 2), "8 x 8 with 2")):
        config = dataclasses.replace(written(tmp_path, arrays(*size)), augmentation="autoaugment")
        with pytest.raises(ValueError, match=f"autoaugment needs square images of 1 or 3 channels; got {shown}"):
            load(config)


@pytest.mark.parametrize(
    ("size", "augmentation"),
    [((6, 8), "shift_rotate"), ((9, 5, 2), "crop_flip_cutout"), ((8, 8, 3), "autoaugment")],
)
def test_any_size_trains(
    size: tuple[int, ...], augmentation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "plot_angles", lambda *_, **__: None)  # drawing takes longer than the run
    monkeypatch.setattr(ending, "plot_curves", lambda *_: None)
    data = dataclasses.replace(
        written(tmp_path, arrays(*size)), augmentation=augmentation, many=5, few=3, workers=0, views=2
    )
    config = Config(
        data=data,
        model=ModelConfig(name="resnet8", width=4, projection_dim=8),
        loss=LossConfig(name="allnc", backend="eager"),
        train=TrainConfig(epochs=1, batch_size=6, precision="fp32", device="cpu", threads=1, collapse_every=0),
    )
    summary = loop.train(config, tmp_path / "run", Console(file=io.StringIO(), width=200))
    assert 0 <= summary["accuracy"] <= 100 and torch.isfinite(torch.tensor(summary["accuracy"]))


def test_groups_must_be_one_for_each_image() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"groups must be \[2\], int64, one for each image; got \[3\]"):
        ImageSet(
            labels=torch.tensor([0, 1]), num_classes=2, mean=(0.5,), std=(0.5,), images=images, groups=torch.arange(3)
        )
