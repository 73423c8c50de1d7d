"""`python -m allnc.train DIR`: what is chosen and said, and a run that is trained, resumed and evaluated elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from allnc import evaluate, features
from allnc.config import Config
from allnc.data import load
from allnc.data.own import Index, read_index
from allnc.plot import __main__ as plot
from allnc.report import __main__ as report
from allnc.train import main
from allnc.trainer import loop
from allnc.trainer.checkpoint import load_weights
from allnc.trainer.own import as_here
from allnc.trainer.planning import plan

SHORT = ["--train.epochs", "1", "--train.threads", "1", "--model.width", "2", "--loss.name", "ce"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
PRETRAINED = ["--model.name", "timm:resnet18", "--model.pretrained", "true"]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "plot_angles", lambda *_, **__: None)
    monkeypatch.setattr(loop, "plot_curves", lambda *_: None)


def tree(root: Path, sizes: dict[str, int], side: int = 16, mode: str = "RGB") -> Path:
    """Images of a brightness of their class, and noise."""
    random = np.random.RandomState(0)
    for level, (name, number) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            pixels = random.randint(60 * level, 60 * level + 60, (side, side, 3)).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name / f"{i}.png")
    return root


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*words, "--dry_run"]) == 0
    return capsys.readouterr().out


def test_from_a_folder_to_a_run_that_is_evaluated_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "photos", {"a": 40, "b": 20, "c": 10})
    monkeypatch.chdir(tmp_path)
    assert main(["photos", *SHORT]) == 0
    out = capsys.readouterr().out
    run = tmp_path / "runs" / "photos-ce-epochs=1-width=2-seed0"
    assert "photos: 70 images of 3 classes, 16 x 16 pixels (70 RGB); 32 to 8 training images a class, ratio 4" in out
    assert "split: 56 train, 14 test images (20% of each class, drawn by data.subset_seed 0)" in out
    assert "in memory, augmented by shift_rotate, not mirrored; resnet8; loss ce; 1 epochs of 3 batches of 16" in out
    config = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (config["root"], config["index"]) == (str(tmp_path / "photos"), str(run / "images.tsv"))
    assert len(read_index(str(run / "images.tsv"), "photos").rows) == 70
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]

    tree(tmp_path / "photos", {"d": 5})  # belongs to no run that began before
    (tmp_path / "photos").rename(tmp_path / "moved")
    run.rename(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate.main(["../run"]) == 2
    assert "--data.root" in capsys.readouterr().err
    assert evaluate.main(["../run", "--data.root", "../moved"]) == 0
    assert f"{accuracy:.1f}" in capsys.readouterr().out
    words = ["--resume", "--out", "../run", "--data.root", "../moved", "--train.epochs", "2"]
    assert main(words) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 2


def test_a_run_and_its_images_move_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    tree(old / "photos", {"a": 12, "b": 8, "c": 6})
    images, labels = np.arange(384, dtype=np.uint8).reshape(6, 8, 8), np.arange(6) % 3
    np.savez(old / "set.npz", images=images, labels=labels, test_images=images, test_labels=labels)
    monkeypatch.chdir(old)
    assert main(["photos", *SHORT, "--out", "run"]) == 0
    assert main(["set.npz", *SHORT, "--train.batch_size", "4", "--out", "of_arrays"]) == 0
    old.rename(new)
    monkeypatch.chdir(new)
    capsys.readouterr()
    for run in ("run", "of_arrays"):
        assert evaluate.main([run]) == 0, capsys.readouterr().err
    assert "accuracy alone" not in capsys.readouterr().out
    assert plot.main(["run", "--kind", "cosines", "--out", "plots"]) == 0
    assert report.main(["run"]) == 0
    assert "missing" not in capsys.readouterr().out
    assert features.main(["--run", "run", "--out", "features"]) == 0
    assert main(["--resume", "--out", "run", "--train.epochs", "2"]) == 0
    capsys.readouterr()
    assert evaluate.main(["run", "--data", "photos"]) == 0
    assert "its training images are measured, too" in capsys.readouterr().out
    assert evaluate.main(["run", "--data", "run/images.tsv"]) == 0
    assert "its 5 test images of 26 are taken" in capsys.readouterr().out
    (new / "photos").rename(tmp_path / "photos")
    assert features.main(["--run", "run", "--out", "more", "--data.root", "../photos"]) == 0


def test_the_table_of_a_run_starts_another_one_with_the_same_split(tmp_path: Path) -> None:
    tree(tmp_path / "photos", {"a": 12, "b": 12})
    assert main([str(tmp_path / "photos"), *SHORT, "--out", str(tmp_path / "one"), "--data.validation", "0.3"]) == 0
    tree(tmp_path / "photos", {"c": 12})
    config = load_weights(tmp_path / "one")[0]
    words = ["--config", str(tmp_path / "one" / "config.yaml"), "--seed", "1", "--out", str(tmp_path / "two")]
    assert main(words) == 0
    again = load_weights(tmp_path / "two")[0]
    for one, two in zip(load(config.data), load(again.data), strict=True):
        assert list(one.paths) == list(two.paths) and one.classes == ("a", "b")
    assert (tmp_path / "one" / "images.tsv").read_bytes() == (tmp_path / "two" / "images.tsv").read_bytes()


def test_overwriting_writes_the_table_anew(tmp_path: Path) -> None:
    tree(tmp_path / "photos", {"a": 10, "b": 10})
    words = [str(tmp_path / "photos"), *SHORT, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    tree(tmp_path / "photos", {"c": 10})
    assert main(words) == 2  # a run is there
    assert main([*words, "--overwrite"]) == 0
    assert read_index(str(tmp_path / "run" / "images.tsv"), "").classes == ("a", "b", "c")


def test_images_from_disk_are_augmented_as_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "photos", {"a": 10, "b": 10}, mode="L")
    measured = []
    for place in ("true", "false"):
        out = tmp_path / place
        words = [str(tmp_path / "photos"), *SHORT, "--out", str(out), "--data.in_memory", place]
        assert main([*words, "--data.mean", "[0.3]", "--data.std", "[0.2]"]) == 0
        measured.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    assert "grey, from disk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("side", "mode", "words", "parts"),
    [
        (30, "RGB", [], ["32 x 32 pixels, colour, in memory, augmented by shift_rotate", "resnet8"]),
        (28, "L", [], ["28 x 28 pixels, grey, in memory, augmented by shift_rotate"]),
        (100, "RGB", [], ["128 x 128 pixels, colour, from disk, augmented by resized_crop, mirrored", "timm:resnet18"]),
        (100, "RGB", ["--data.flip", "false"], ["augmented by resized_crop, not mirrored"]),
        (100, "L", [], ["128 x 128 pixels, grey, from disk, augmented by resized_crop, not mirrored"]),
        (200, "RGB", [], ["224 x 224 pixels"]),
        (100, "RGB", ["--data.image_size", "32"], ["32 x 32 pixels, colour, in memory", "resnet8"]),
        (100, "RGB", ["--data.augmentation", "shift_rotate"], ["from disk, augmented by shift_rotate, not mirrored"]),
        (16, "RGB", ["--data.augmentation", "crop_flip_cutout"], ["crop_flip_cutout, mirrored (--data.flip false if"]),
        (16, "RGB", ["--train.epochs", "7"], ["7 epochs of 2 batches of 16"]),
        (16, "L", PRETRAINED, ["224 x 224 pixels, colour, from disk, augmented by shift_rotate", "timm:resnet18"]),
        (16, "L", ["--data.validation", "0.2"], ["split: 32 train, 8 validation, 10 test", "on the validation images"]),
    ],
)  # fmt: skip
def test_what_is_chosen_is_said(
    side: int, mode: str, words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "photos", {"a": 40, "b": 10}, side, mode)
    out = said([str(tmp_path / "photos"), *words], capsys)
    for part in parts:
        assert part in out
    assert not (tmp_path / "runs").exists() and out.count("\n") <= 6


def test_a_recipe_wins_over_what_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "photos", {"a": 40, "b": 10})
    (tmp_path / "mine.yaml").write_text("model: {name: resnet14}\ntrain: {epochs: 3}\n")
    words = [str(tmp_path / "photos"), "--config", "own_images", "--config", str(tmp_path / "mine.yaml")]
    assert "resnet14; loss allnc; 3 epochs" in said(words, capsys)


def test_what_print_config_shows_is_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "photos", {"a": 40, "b": 10}, side=24)
    assert main([str(tmp_path / "photos"), "--print_config"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["data"]["image_size"] == 24
    assert main(["--config", str(tmp_path / "mine.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "mine.yaml").read_text()


def test_every_data_set_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data.root", "photos", "--data.train_list", "a.txt", "--data.test_list", "~/b.txt"]
    monkeypatch.setenv("HOME", "/home/me")
    data = plan(["--config", "imagenet_lt", *words, "--out", "run"]).config.data
    assert (data.root, data.train_list, data.test_list) == (f"{tmp_path}/photos", f"{tmp_path}/a.txt", "/home/me/b.txt")


def test_folders_of_splits_are_measured_as_they_are_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "val", "test"):
        tree(tmp_path / "photos" / name, {"a": 8, "b": 8}, side=16 + len(name))
    out = said([str(tmp_path / "photos")], capsys)
    assert "split: 16 train, 16 validation, 16 test images (as given)" in out and "on the validation images" in out
    assert "measured on the test images" in said([str(tmp_path / "photos"), "--data.validation", "0"], capsys)


def test_a_list_and_a_file_of_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "photos", {"a": 10, "b": 10})
    lines = "".join(f"{name}/{i}.png,{name}\n" for name in "ab" for i in range(10))
    (tmp_path / "photos" / "list.csv").write_text(f"path,label\n{lines}")
    assert "list.csv: 20 images of 2 classes" in said([str(tmp_path / "photos" / "list.csv")], capsys)
    (tmp_path / "photos" / "list.csv").rename(tmp_path / "list.csv")
    words = [str(tmp_path / "list.csv"), "--data.root", str(tmp_path / "photos")]
    assert "list.csv: 20 images of 2 classes" in said(words, capsys)
    images = np.random.RandomState(0).randint(0, 256, (20, 8, 8), dtype=np.uint8)
    arrays = {"images": images, "labels": np.arange(20) % 2, "test_images": images, "test_labels": np.arange(20) % 2}
    np.savez(tmp_path / "mine.npz", **arrays)
    config = plan([str(tmp_path / "mine.npz"), *SHORT, "--out", str(tmp_path / "run")]).config
    assert (config.data.name, config.data.root) == ("arrays", str(tmp_path / "mine.npz"))
    assert main([str(tmp_path / "mine.npz"), *SHORT, "--out", str(tmp_path / "run"), "--train.batch_size", "4"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/nothing"], "which is missing (a recipe is given by --config"),
        (["{root}/photos/a/0.png"], "got the file"),
        (["{root}/empty"], "must hold a folder for each class"),
        (["{root}/photos", "--data.workers", "2"], "--data.workers would be ignored"),
        (["{root}/photos", "--data.imbalance_ratio", "5"], "--data.imbalance_ratio would be ignored"),
        (["{root}/photos", "--data.test_share", "1.5"], "data.test_share must be in (0, 1)"),
        (["{root}/photos", "--data.channels", "2"], "data.channels must be 3 (colour) or 1 (grey); got 2"),
        (["{root}/photos", "--data.channels", "1", "--model.pretrained", "true", "--model.name", "timm:resnet18"],
         "data.channels must be 3 with model.pretrained"),
        (["{root}/photos", "--data.root", "{root}/split"], "and --data.root both say which images"),
        (["{root}/photos", "--data.name=image_folder"], "and --data.name both say which images"),
        (["{root}/photos", "--data.fit", "crop", "--data.in_memory", "true"], "data.fit must be whole"),
        (["{root}/split", "--data.test_share", "0.3"], "--data.test_share would be ignored"),
        (["--dry_run"], "--dry_run looks at a folder, a list or a file of arrays"),
        (["--data.index", "x"], "data.index and data.in_memory are read by own only"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_on_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "photos", {"a": 6, "b": 4})
    (tmp_path / "empty").mkdir()
    for name in ("train", "test"):
        tree(tmp_path / "split" / name, {"a": 2, "b": 2})
    assert main([word.format(root=tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_looking_needs_no_torch(tmp_path: Path) -> None:
    tree(tmp_path / "photos", {"a": 3, "b": 3})
    program = (
        "import sys; sys.modules['torch'] = None; from allnc.train import main; "
        f"sys.exit(main([{str(tmp_path / 'photos')!r}, '--dry_run']))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_an_old_run_has_no_table(tmp_path: Path) -> None:
    """Configurations that were written before these options were there still load."""
    from allnc.trainer.options import from_dict, to_dict

    values: dict[str, Any] = to_dict(plan(["--out", str(tmp_path / "run")]).config)
    for name in ("index", "test_share", "max_bad", "fit", "channels", "in_memory", "flip", "crop_scale"):
        del values["data"][name]
    assert from_dict(values) == plan(["--out", str(tmp_path / "run")]).config


def test_what_the_images_decide_later_is_no_contradiction_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pretrained network, cropping and stopping early ask for what is chosen once the images were looked at."""
    photos = str(tree(tmp_path / "photos", {"a": 40, "b": 20}))
    assert "224 x 224 pixels" in said([photos, "--model.pretrained", "true"], capsys)
    assert "from disk, augmented by resized_crop" in said([photos, "--data.fit", "crop"], capsys)
    for part in ("train", "val"):
        tree(tmp_path / "parted" / part, {"a": 12 if part == "train" else 4, "b": 6})
    assert "on the test images" in said([str(tmp_path / "parted")], capsys)
    tree(tmp_path / "parted" / "test", {"a": 5, "b": 5})
    assert "on the validation images" in said([str(tmp_path / "parted"), "--train.patience", "2"], capsys)
    assert main([photos, "--train.patience", "2", "--dry_run"]) == 2
    assert "set data.validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.optimizer", "adamw"], "--train.lr must be given with train.optimizer adamw"),
        (["--train.batch_size", "99"], "--train.batch_size must be at most 24"),
        (["--model.name", "resnet50"], "give timm:resnet50"),
        (["--data.imbalance", "exponential"], "data.imbalance exponential leaves no image of class 1 (b)"),
        (["--loss.name", "ce", "--loss.class_weights", "{B: 2}"], "got 'B': the classes are a, b"),
        pytest.param(["--train.device", "cuda"], "train.device must be cpu or auto here", marks=NO_GPU),
        (["--report"], "--report would be ignored with --dry_run"),
    ],
)
def test_a_look_finds_what_training_would(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = str(tree(tmp_path / "photos", {"a": 20, "b": 10}))
    assert main([photos, *words, "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_class_sizes_that_are_cut_out_are_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = str(tree(tmp_path / "photos", {"a": 40, "b": 40}))
    out = said([photos, "--data.imbalance", "exponential", "--data.imbalance_ratio", "4"], capsys)
    assert "32 to 8 training images a class, ratio 4" in out and "split: 40 of 64 train, 16 test images" in out
    assert "epochs of 2 batches of 16" in out


def test_runs_among_the_images_are_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tree(tmp_path / "photos", {"a": 20, "b": 10}))
    assert main([".", *SHORT, "--out", "runs/one"]) == 0
    Image.new("RGB", (20, 20)).save("runs/one/plots/curves.png")
    capsys.readouterr()
    out = said(["."], capsys)
    assert "30 images of 2 classes" in out and "runs/one left out: it is the folder of a run" in out


def test_another_run_by_the_configuration_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = str(tree(tmp_path / "photos", {"a": 20, "b": 10}))
    monkeypatch.chdir(tmp_path)
    assert main([photos, *SHORT, "--out", "one"]) == 0
    assert main(["--config", "one/config.yaml", "--seed", "1"]) == 0  # not in the folder of the first
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["config-ce-seed1"]
    assert (tmp_path / "runs" / "config-ce-seed1" / "images.tsv").read_bytes() == Path("one/images.tsv").read_bytes()


def test_resuming_keeps_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = str(tree(tmp_path / "photos", {"a": 20, "b": 10})), str(tmp_path / "run")
    assert main([photos, *SHORT, "--out", out]) == 0
    for words, message in (([photos], f"remove {photos}"), (["--data.index", "x"], "remove --data.index")):
        assert main([*words, "--resume", "--out", out]) == 2
        assert message in capsys.readouterr().err
    before = (tmp_path / "run" / "predictions.npz").read_bytes()
    assert main(["--train.epochs", "2", "--resume", "--out", out]) == 0
    assert (tmp_path / "run" / "predictions.npz").read_bytes() != before


def test_the_first_process_tells_the_others_what_it_found() -> None:
    data = Config().data
    found = Config(data=replace(data, root="/one", image_size=64, workers=1), out="/one/run")
    here = Config(data=replace(data, root="/other", workers=3))
    index = Index(root="/one", rows=())
    config, told = as_here(found, index, here)
    assert (config.data.root, config.data.workers, config.data.image_size, config.out) == ("/other", 3, 64, None)
    assert told is not None and told.root == "/other"
