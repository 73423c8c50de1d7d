"""`python -m allnc.train FILE.npz`: looked at as a folder is, what is chosen and said, and a split that stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from allnc import evaluate
from allnc.config import DataConfig
from allnc.data import load
from allnc.train import main
from allnc.trainer import ending
from allnc.trainer.options import dotted
from allnc.trainer.planning import plan

SHORT = ["--train.epochs", "1", "--train.threads", "1", "--model.width", "2"]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "plot_angles", lambda *_, **__: None)
    monkeypatch.setattr(ending, "plot_curves", lambda *_: None)


def noise(number: int, *size: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (number, *size)).astype(np.uint8)


def written(path: Path, sizes: tuple[int, ...] = (40, 20, 5), *size: int, tests: int = 0, **others: Any) -> str:
    """A file of classes of some sizes, with as many test images of each as `tests` says."""
    size = size or (10, 12)
    values: dict[str, Any] = {"images": noise(sum(sizes), *size), "labels": np.repeat(np.arange(len(sizes)), sizes)}
    if tests:
        labels = np.arange(tests * len(sizes)) % len(sizes)
        values |= {"test_images": noise(len(labels), *size, seed=1), "test_labels": labels}
    np.savez(path, **values | others)
    return str(path)


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*words, "--dry_run"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_file_is_looked_at_as_a_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "set.npz", tests=4, classes=np.array(["Cat", "cat", "dog"]))
    monkeypatch.chdir(tmp_path)
    wanted = [
        f"looking at the images of {file}",
        "set.npz: 77 images of 3 classes, 12 x 10 pixels (1 channel); 40 to 5 training images a class, ratio 8",
        "split: 65 train, 12 test images (as given)",
        "note: Cat and cat differ in capitals alone and are 2 classes: give them one name if they are one",
        "plan: 12 x 10 pixels, grey, in memory, augmented by shift_rotate, not mirrored; resnet8; loss allnc; 200 "
        "epochs of 2 batches of 32; measured on the test images",
    ]
    assert said(["set.npz"], capsys).splitlines() == wanted and not (tmp_path / "runs").exists()
    assert main(["set.npz", *SHORT]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:4] == wanted[:4] and "1 epochs of 2 batches of 32" in out
    config = yaml.safe_load((tmp_path / "runs" / "set-allnc-epochs=1-width=2-seed0" / "config.yaml").read_text())
    train = config["train"]
    assert (train["batch_size"], train["lr"], train["epochs"]) == (32, 0.05, 1) and not config["data"]["flip"]


@pytest.mark.parametrize(
    ("size", "words", "parts"),
    [
        ((16, 16, 3), [], ["16 x 16 pixels (3 channels)", "colour, in memory, augmented by shift_rotate, not mir"]),
        ((80, 80, 3), [], ["augmented by crop_flip_cutout, mirrored (--data.flip false if", "timm:resnet18"]),
        ((80, 80, 3), ["--data.flip", "false"], ["augmented by crop_flip_cutout, not mirrored"]),
        ((80, 80), [], ["80 x 80 pixels, grey, in memory, augmented by shift_rotate, not mirrored; timm:resnet18"]),
        ((16, 16), ["--data.augmentation", "crop_flip_cutout"], ["augmented by crop_flip_cutout, not mirrored"]),
        ((16, 16, 2), [], ["16 x 16 pixels, 2 channels, in memory, augmented by shift_rotate"]),
        ((16, 16), ["--train.batch_size", "8", "--model.name", "resnet14"], ["resnet14; ", "epochs of 6 batches of 8"]),
        ((16, 16), ["--data.validation", "0.2"], ["42 train, 10 validation, 13 test", "on the validation images"]),
        ((16, 16), ["--data.test_share", "0.4"], ["39 train, 26 test images (40% of each class, drawn by"]),
        ((16, 16), ["--data.imbalance", "step", "--data.imbalance_ratio", "2", "--data.max_per_class", "4"],
         ["split: 10 of 52 train", "4 to 2 training images a class"]),
    ],
)  # fmt: skip
def test_what_is_chosen_is_said(
    size: tuple[int, ...], words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said([written(tmp_path / "set.npz", (40, 20, 5), *size), *words], capsys)
    for part in parts:
        assert part in out
    assert out.count("\n") <= 5


def test_three_channels_without_a_colour_are_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = np.repeat(noise(65, 80, 80)[..., None], 3, axis=3)
    out = said([written(tmp_path / "set.npz", images=grey)], capsys)
    assert "(3 channels, all grey)" in out and "pixels, grey, in memory, augmented by shift_rotate, not mirr" in out


def test_copies_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, tests = noise(65, 10, 12), noise(6, 10, 12, seed=1)
    images[3], images[64], tests[1] = images[0], images[0], images[41]  # of classes 0, 0, 2 and 1, 1
    out = said([written(tmp_path / "set.npz", images=images, test_images=tests, test_labels=np.arange(6) % 3)], capsys)
    assert "note: 3 images with the same pixels as another one" in out
    assert "note: 1 image in two classes, such as one of 0 and 2: remove one" in out
    assert "note: 1 image in two of training, validation and test set, such as one of 1: remove one" in out


def test_a_split_that_is_drawn_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = written(tmp_path / "set.npz", (40, 20, 5, 1)), tmp_path / "run"
    assert main([file, *SHORT, "--data.subset_seed", "3", "--out", str(run)]) == 0
    assert "note: the file has no test images: 20% of each class are tested, drawn by" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["class_counts"] == [32, 16, 4, 1] and summary["images"]["test"].startswith("13 (")
    assert evaluate.main([str(run)]) == 0
    assert f"{summary['accuracy']:.1f}" in capsys.readouterr().out
    assert evaluate.main([str(run), "--data", file]) == 0
    assert "its training images are measured, too" in capsys.readouterr().out
    assert main(["--resume", "--out", str(run), "--train.epochs", "2"]) == 0
    assert json.loads((run / "summary.json").read_text())["images"] == summary["images"]


def test_a_share_is_drawn_of_each_class_and_copies_and_groups_stay_together(tmp_path: Path) -> None:
    sizes, images = (30, 10, 2, 1), noise(43, 8, 8)
    images[20:30], images[41] = images[20], images[40]
    written(tmp_path / "set.npz", sizes, 8, 8, images=images)
    config = DataConfig(name="arrays", root=str(tmp_path / "set.npz"))
    train, test = load(config)
    assert test.class_counts.tolist() == [6, 2, 0, 0] and train.class_counts.tolist() == [24, 8, 2, 1]
    assert "2 of 4 classes have no test image" in test.notes
    assert train.images is not None and test.images is not None
    assert not {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in test.images}
    assert {i.numpy().tobytes() for part in (train, test) for i in part.images} == {i.tobytes() for i in images}  # pyright: ignore[reportOptionalIterable]
    assert load(config)[1].fingerprint() == test.fingerprint()
    other = DataConfig(name="arrays", root=config.root, subset_seed=1)
    assert load(other)[1].fingerprint() != test.fingerprint()
    written(tmp_path / "set.npz", (12, 12), 8, 8, groups=np.tile(np.arange(12) // 2, 2))
    train, test = load(config)
    assert train.groups is not None and len(train.groups) == len(train) == 20 and test.class_counts.tolist() == [2, 2]
    assert (np.bincount(train.groups.numpy()) % 4 == 0).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.test_share", "0.3"], "--data.test_share would be ignored: set.npz has test images of its own"),
        (["--data.subset_seed", "3"], "--data.subset_seed would be ignored: set.npz has test images of its own"),
        (["--data.image_size", "32"], "--data.image_size would be ignored: arrays has its own size"),
        (["--data.root", "other.npz"], "and --data.root both say which images"),
        (["--data.max_bad", "3"], "--data.max_bad would be ignored: data.name is arrays"),
        (["--data.flip", "true"], "--data.flip would be ignored: data.augmentation shift_rotate mirrors nothing"),
        (["--train.batch_size", "99"], "--train.batch_size must be at most 65"),
        (["--train.optimizer", "adamw"], "--train.lr must be given with train.optimizer adamw"),
        (["--data.imbalance", "exponential"], "data.imbalance exponential leaves no image of class 2"),
        (["--loss.name", "ce", "--loss.class_weights", "{'7': 2}"], "class_weights must name classes of the training"),
        (["--config", "kana_lt"], "give it as the first word, a file of arrays without --config"),
    ],
)
def test_a_look_finds_what_training_would(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([written(tmp_path / "set.npz", tests=3), *words, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_share_that_no_run_reads_is_refused_with_a_recipe_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "set.npz", tests=3)
    assert main([file, "--config", "kana_lt", "--data.test_share", "0.3", "--out", str(tmp_path / "run")]) == 2
    assert "--data.test_share would be ignored: set.npz has" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_recipe_that_names_arrays_keeps_its_settings(suffix: str, tmp_path: Path) -> None:
    """Neither a recipe nor options alone, as a sweep gives them, let anything be chosen."""
    file = tmp_path / f"set.{suffix}"
    file.touch()
    for words in ([str(file), "--config", "kana_lt"], ["--config", "kana_lt", "--data.root", str(file)]):
        found = dotted(plan([*words, "--out", str(tmp_path / "run")]).config)
        wanted = dotted(plan(["--config", "kana_lt", "--out", str(tmp_path / "run")]).config)
        assert {name for name in found if found[name] != wanted[name]} == {"data.root"}
    words = ["--config", "own_images", "--data.name=arrays", f"--data.root={file}", "--out", str(tmp_path / "run")]
    train = plan(words).config.train
    assert (train.batch_size, train.epochs, train.lr) == (64, 60, 0.1)
    words = [f"--data.root={file}", "--data.name=arrays", "--out", str(tmp_path / "run")]
    train = plan(words).config.train  # an option is no file, wherever it stands
    assert (train.batch_size, train.epochs, train.lr) == (64, 60, 0.1)


def test_an_option_in_first_place_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out=set.npz", "--loss.name", "ce", "--loss.tau", "3", "--print_config"]) == 2
    assert "--loss.tau would be ignored" in capsys.readouterr().err


def test_what_the_look_decides_is_no_contradiction_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with a folder: a pretrained network has another name, and few images take more epochs than the recipe has."""
    file = written(tmp_path / "set.npz", (40, 20, 5), 80, 80, 3)
    assert "; timm:resnet50; loss allnc; 40 epochs" in said([file, "--model.pretrained", "true"], capsys)
    retrained = ["--train.retrain_epochs", "80"]
    assert "; 200 epochs" in said([file, *retrained], capsys)
    for words, message in (
        ([*retrained, "--train.epochs", "70"], "train.retrain_epochs must be in [0, 70)"),
        (["--model.pretrained", "true", "--model.name", "resnet8"], "model.pretrained needs a timm:NAME model"),
        (["--train.patience", "3"], "train.patience needs validation images"),
    ):
        assert main([file, *words]) == 2
        told = capsys.readouterr()
        assert message in told.err and "looking at" not in told.out


def test_every_process_chooses_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [written(tmp_path / "set.npz"), "--out", str(tmp_path / "run")]
    first = plan(words).config
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    other = plan(words).config
    assert capsys.readouterr().out == ""
    assert (other.train, other.model, other.data) == (first.train, first.model, first.data)
