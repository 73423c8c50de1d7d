"""Features are stored once and whole, and heads train on them through the ordinary command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from allnc import evaluate, features, train
from allnc.config import Config, DataConfig, ModelConfig, TrainConfig
from allnc.data import FeatureSet, load, loader_for, plain_batches
from allnc.data.features import StoredFeatures, read_manifest
from allnc.metrics import collapse
from allnc.trainer import ending, extract, loop
from allnc.trainer import run as run_module
from allnc.trainer.checkpoint import load_weights
from tests.faults.runs import ROOT, one_line, quiet
from tests.processes import needs_gloo
from tests.trainer.test_ranks import assert_alike, make_images, result, trained

DIGITS = ["--data.max_per_class", "60", "--data.imbalance_ratio", "6", "--train.threads", "1"]
ROWS, PASSES = 150, 3


def made(folder: Path, *words: str) -> Path:
    """Features of the digits, in several files a pass."""
    assert features.main([*DIGITS, "--shard_rows", str(ROWS), "--out", str(folder), *words]) == 0
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an encoder with random weights, in three passes."""
    return made(tmp_path_factory.mktemp("features") / "stored", "--passes", str(PASSES))


def heads(folder: Path, **sections: dict[str, Any]) -> Config:
    config = Config(
        data=DataConfig(name="features", root=str(folder), augmentation="none", views=2, many=40, few=15),
        model=ModelConfig(name="mlp", classifier="normalised", projection_dim=16),
        train=TrainConfig(
            epochs=4, batch_size=64, precision="fp32", device="cpu", threads=1, eval_every=2, collapse_every=0
        ),
    )
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


def everything(images: Any, config: Config, encoder: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """An encoder's features of a set's plain images, and the labels."""
    batches = list(plain_batches(images, config.data, 500, torch.device("cpu")))
    with torch.inference_mode():
        return torch.cat([encoder(pixels) for pixels, _ in batches]), torch.cat([labels for _, labels in batches])


def assert_stored(folder: Path, run: loop.Run) -> None:
    """The features in the folder are those of the run's encoder, rounded to float16."""
    run.measured.eval()
    for images, got in zip((run.train_set, run.measured_set), load(heads(folder).data), strict=True):
        want, labels = everything(images, run.config, run.measured.encoder)
        rows, of_rows = everything(got, heads(folder), torch.nn.Identity())
        assert rows.dtype == torch.float32 and torch.equal(of_rows, labels)
        torch.testing.assert_close(rows, want, rtol=2**-10, atol=1e-6)
        assert torch.equal(rows, rows.half().float()) and got.num_classes == 10


def test_they_are_the_model_s_own(stored: Path) -> None:
    data = DataConfig(max_per_class=60, imbalance_ratio=6)
    assert_stored(stored, loop.Run(Config(data=data, model=ModelConfig(name="resnet8"))))


@pytest.fixture(scope="module")
def trained_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and the features of its encoder."""
    root = tmp_path_factory.mktemp("trained")
    words = ["--model.width", "8", "--data.max_per_class", "60", "--train.epochs", "8", "--train.eval_every", "8"]
    assert train.main([*words, "--seed", "3", "--out", str(root / "run")]) == 0
    assert features.main(["--run", str(root / "run"), "--out", str(root / "features")]) == 0
    return root / "run", root / "features"


def test_they_are_those_of_a_trained_run(trained_encoder: tuple[Path, Path]) -> None:
    config, epochs, weights = load_weights(trained_encoder[0])
    run = loop.Run(config)
    run.load_model(weights, epochs)
    assert_stored(trained_encoder[1], run)


def test_of_a_run_with_a_moving_average_they_are_the_average_s(tmp_path: Path) -> None:
    words = ["--model.width", "4", "--data.max_per_class", "60", "--train.epochs", "1", "--train.ema_decay", "0.5"]
    assert train.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert features.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "features")]) == 0
    config, epochs, weights = load_weights(tmp_path / "run")
    run = loop.Run(config)
    run.load_model(weights, epochs)
    assert_stored(tmp_path / "features", run)


def test_options_of_the_images_count(tmp_path: Path) -> None:
    make_images(tmp_path / "own")
    data = {"name": "own", "root": tmp_path / "own", "augmentation": "resized_crop", "workers": 0, "image_size": 8}
    words = [f"--data.{option}={value}" for option, value in data.items()]
    words += ["--passes", "2", "--train.threads", "1", "--data.channels", "1", "--data.max_bad", "1"]
    words += ["--data.flip", "false"]
    stored = []
    for scale in ("0.1", "1.0"):
        folder = tmp_path / scale
        assert features.main([*words, "--data.crop_scale", scale, "--out", str(folder)]) == 0
        stored.append([(folder / f"train-pass{number}-00000.safetensors").read_bytes() for number in (0, 1)])
    assert stored[0][0] == stored[1][0] and stored[0][1] != stored[1][1]


def test_random_weights_are_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "random")
    assert "note: resnet8 has random weights" in capsys.readouterr().out


def test_passes_are_different_views_of_the_same_images(stored: Path, tmp_path: Path) -> None:
    again = made(tmp_path / "again", "--passes", str(PASSES))
    for path in stored.iterdir():
        assert path.name == "features.json" or path.read_bytes() == (again / path.name).read_bytes()
    images, test = load(heads(stored).data)
    assert isinstance(images, FeatureSet) and isinstance(test, FeatureSet)
    assert (images.stored.passes, test.stored.passes, len(images.stored.shards)) == (PASSES, 1, 3 * 2)
    everyone = torch.arange(len(images))
    rows = [images.stored.rows(everyone, torch.full_like(everyone, pass_)).float() for pass_ in range(PASSES)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        between = (rows[one] - rows[other]).norm(dim=1)
        assert between.min() > 0 and between.mean() < (rows[0] - rows[0].flip(0)).norm(dim=1).mean()


def test_rows_are_gathered_from_any_file() -> None:
    shards = [torch.randn(size, 5).half() for size in (4, 4, 2) * 3]
    whole = torch.cat(shards).view(3, 10, 5)
    images, passes = torch.randint(0, 10, (50,)), torch.randint(0, 3, (50,))
    stored = StoredFeatures(shards, 4, 10)
    assert stored.passes == 3 and torch.equal(stored.rows(images, passes), whole[passes, images])
    assert torch.equal(stored.rows(images), whole[0, images])


def test_what_made_them_is_written(stored: Path) -> None:
    manifest = read_manifest(stored)
    assert manifest["config"]["model"]["name"] == "resnet8" and manifest["config"]["seed"] == 0
    assert (manifest["passes"], manifest["shard_rows"], manifest["feature_dim"]) == (PASSES, ROWS, 64)
    assert manifest["mean"] == [0.306] and manifest["versions"].keys() >= {"torch", "allnc"}
    assert len(manifest["weights_sha256"]) == 64 and len(manifest["shards"]) == 3 * 2 + 4


def test_killed_at_any_moment_they_become_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.feature_kills", str(tmp_path), "4"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["points"] >= 8


# Training on them


def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "plot_angles", lambda *_, **__: None)
    monkeypatch.setattr(ending, "plot_curves", lambda *_: None)


def test_a_linear_head_is_as_good_as_logistic_regression(
    trained_encoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.linear_model import LogisticRegression

    no_plots(monkeypatch)
    config = heads(trained_encoder[1], data={"views": 1}, loss={"name": "ce"}, train={"epochs": 150, "eval_every": 150})
    config = dataclasses.replace(config, model=ModelConfig(name="linear"))
    images, test = (everything(part, config, torch.nn.Identity()) for part in load(config.data))
    fitted = LogisticRegression(max_iter=2000).fit(*map(np.asarray, images))
    wanted = 100 * fitted.score(*map(np.asarray, test))
    got = loop.train(config, tmp_path, quiet())["accuracy"]
    assert wanted > 80 and got > wanted - 2


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_resuming_gives_the_same_bits(name: str, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_plots(monkeypatch)
    branches = {"data": {"rebalance_sampler": "reversed"}, "loss": {"horizon": 0.3}}
    config = heads(stored, **branches, model={"name": name, "heads": "separate"})
    straight = loop.train(config, tmp_path / "straight", quiet())
    epochs = loop.train_epoch

    def stopped(run: loop.Run, log: Any) -> Any:
        if run.epoch == 2:
            raise KeyboardInterrupt
        return epochs(run, log)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_epoch", stopped)
        loop.train(config, tmp_path / "parts", quiet())
    resumed = loop.train(config, tmp_path / "parts", quiet(), mode="resume")
    timed = ("seconds", "images_per_second", "loader_wait")
    assert {k: v for k, v in straight.items() if k not in timed} == {k: v for k, v in resumed.items() if k not in timed}
    (_, _, ours), (_, _, theirs) = load_weights(tmp_path / "straight"), load_weights(tmp_path / "parts")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_views_are_different_passes_and_processes_share_them(stored: Path) -> None:
    config = heads(stored, data={"rebalance_sampler": "reversed"}).data
    images, _ = load(config)
    assert isinstance(images, FeatureSet)

    def loader(share: Any = slice) -> Any:
        return loader_for(images)(
            images, config, batch_size=45, seed=1, two_batches=True, device=torch.device("cpu"), share=share
        )

    one = loader()
    halves = [loader(lambda n, rank=rank: slice(n * rank // 2, n * (rank + 1) // 2)) for rank in range(2)]
    for index, whole, *parts in zip(one.indices(3), one.epoch(3), *(half.epoch(3) for half in halves), strict=True):
        rows = whole.images.view(2, 90, -1)
        assert torch.equal(whole.labels, images.labels[index].repeat(2))
        assert (rows[0] != rows[1]).any(1).all()
        for rebalance in (False, True):
            got = [part.branch(part.images, rebalance=rebalance).view(2, -1, 64) for part in parts]
            want = whole.branch(whole.images, rebalance=rebalance).view(2, 45, 64)
            assert torch.equal(torch.cat(got, 1), want)
    assert not torch.equal(next(one.epoch(3)).images, next(one.epoch(4)).images)


def test_measured_collapse_is_that_of_all_features(stored: Path) -> None:
    run = loop.Run(heads(stored))
    measured, _ = run.measure()
    run.model.eval()
    with torch.no_grad():
        rows, labels = everything(run.train_set, run.config, run.model.encoder)
        want = collapse(rows, labels, run.model.classifier_weight, logits=run.model.classifier(rows))
    assert measured["nc4"] == pytest.approx(want["nc4"]) and measured["nc1"] == pytest.approx(want["nc1"], rel=1e-6)


def test_a_subset_leaves_the_features_where_they_are(stored: Path) -> None:
    data = {"imbalance": "step", "imbalance_ratio": 2.0, "max_per_class": 10}
    images, _ = load(heads(stored, data=data).data)
    whole, _ = load(heads(stored).data)
    assert isinstance(images, FeatureSet) and isinstance(whole, FeatureSet)
    assert images.class_counts.tolist() == [10] * 5 + [5] * 5 and images.count_text == f"75 of {len(whole)}"
    assert images.stored.shards[0].data_ptr() != 0 and torch.equal(images.labels, whole.labels[images.positions])


@needs_gloo
@pytest.mark.slow
def test_two_processes_train_the_same_by_the_command(stored: Path, tmp_path: Path) -> None:
    words = ["--config", "features", "--data.root", str(stored), "--data.views", "2", "--model.name", "mlp"]
    words += ["--train.batch_size", "45", "--train.epochs", "2", "--train.lr", "0.02", "--train.precision", "fp32"]
    assert train.main([*words, "--train.threads", "1", "--out", str(tmp_path / "run1")]) == 0
    two = trained(2, tmp_path / "run2", *words, "--train.threads", "1")
    assert_alike(two, result(tmp_path / "run1"), tolerance=1e-4)
    assert evaluate.main([str(tmp_path / "run2")]) == 0


# Mistakes, each on one line


def refused(capsys: pytest.CaptureFixture[str], main: Any, words: list[str], message: str) -> None:
    capsys.readouterr()
    assert main(words) == 2
    line = one_line(capsys.readouterr().err)
    assert message in line, line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out DIR must be given"),
        (["--out", "{new}", "--passe", "3"], "--passe is not an option; did you mean --passes?"),
        (["--out", "{new}", "--passes", "0"], "--passes must be a whole number >= 1; got 0"),
        (["--out", "{new}", "--passes"], "--passes needs a value"),
        (["--out", "{new}", "--loss.alpha", "2"], "--loss.alpha would be ignored: it is of the training"),
        (["--out", "{new}", "--config", "features"], "data.name must be of images; got features"),
        (["--out", "{new}", "--data.validation", "0.1"], "--data.validation would be ignored: it is of the training"),
        (
            ["--out", "{new}", "--data.augmentation=crop_flip_cutout", "--data.flip=false"],
            "it is of augmented passes, and --passes 1 makes none",
        ),
        (
            [
                "--out",
                "{new}",
                "--data.name=own",
                "--data.root=.",
                "--data.fit=whole",
                "--data.crop_scale=1",
                "--passes=2",
            ],
            "--data.crop_scale would be ignored: data.augmentation is shift_rotate",
        ),
        (
            ["--out", "{new}", "--passes", "2", "--data.augmentation", "none"],
            "--passes must be 1 with data.augmentation none",
        ),
        (["--out", "{new}", "--run", "{new}"], "--run must be the folder of a run"),
        (["--out", "{new}", "--resume"], "--resume needs a folder that allnc.features has begun"),
        (["--out", "{stored}"], "holds features: give --resume to continue, or another --out"),
        (["--out", "{stored}", "--resume", "--seed", "1"], "with its own configuration; remove --seed"),
        (["--out", "{other}"], "must be a folder of features alone; {other} holds 'notes.txt', too"),
        (["--out", "{new}", "--model.name", "timm:nosuch"], "model.name must be a model that timm knows"),
    ],
)
def test_mistakes_of_extraction(
    words: list[str], message: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    names = {"new": tmp_path / "new", "stored": stored, "other": tmp_path / "other"}
    refused(capsys, features.main, [word.format(**names) for word in words], message.format(**names))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data.views", "4", "--train.batch_size", "32"],
            "data.views must be <= 3, the passes that are stored in data.root",
        ),
        (["--data.augmentation", "shift_rotate"], "data.augmentation must be none with data.name features"),
        (["--model.name", "resnet8"], "model.name must be linear or mlp with data.name features, and only then"),
        (["--data.workers", "2"], "--data.workers would be ignored: features are read as they were stored"),
        (["--model.mlp_hidden", "8"], "--model.mlp_hidden would be ignored: model.name is linear"),
        (["--data.root", "/nowhere"], "/nowhere must be a folder that allnc.features wrote"),
        (["--train.batch_size", "1000"], "train.batch_size must be <= "),
        (["--config", "digits_lt", "--model.name", "linear"], "and only then; got linear with data.name digits"),
    ],
)
def test_mistakes_of_training(
    words: list[str], message: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [] if "--config" in words else ["--config", "features", "--data.root", str(stored)]
    refused(capsys, train.main, [*here, *words, "--out", str(tmp_path / "run")], message)


def test_files_that_are_not_as_they_were(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in stored.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    words = ["--config", "features", "--data.root", str(copy), "--train.batch_size", "32", "--out", str(tmp_path / "r")]
    shard, manifest = copy / "train-pass1-00001.safetensors", copy / "features.json"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(capsys, train.main, words, f"{shard} is damaged, or of other features")
    shard.unlink()
    refused(capsys, train.main, words, f"{shard} is missing")
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"feature_dim": 63}))
    refused(
        capsys, train.main, words, "features.json must be the description of stored features; got: ValueError: its SHA"
    )
    manifest.write_text("[]")
    refused(capsys, train.main, words, "features.json must be the description of stored features; got: TypeError")


def test_stopped_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = tmp_path / "features", extract._Extraction.features

    def stopped(self: Any, part: str, *place: int) -> Tensor:
        if part == "test":
            raise KeyboardInterrupt
        return rows(self, part, *place)

    with monkeypatch.context() as patch:
        patch.setattr(extract._Extraction, "features", stopped)
        assert features.main([*DIGITS, "--out", str(folder)]) == 130
    assert f"stopped; --resume --out {folder} continues" in capsys.readouterr().err
    words = ["--config", "features", "--data.root", str(folder), "--train.batch_size", "32"]
    refused(capsys, train.main, [*words, "--out", str(tmp_path / "r")], "is without test-pass0-00000.safetensors")
    (folder / "notes.txt").touch()
    refused(capsys, features.main, ["--resume", "--out", str(folder)], "holds 'notes.txt', too")
    (folder / "notes.txt").unlink()
    with extract.RunFolder(folder, "resume", extract.check_folder):
        refused(capsys, features.main, ["--resume", "--out", str(folder)], f"{folder} is in use by process")
    assert features.main(["--resume", "--out", str(folder)]) == 0 and load(heads(folder).data)


def test_another_model_or_other_images_are_refused_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "features")
    build = run_module.build_model

    def other(*arguments: Any, **named: Any) -> Any:
        torch.manual_seed(9)
        return build(*arguments, **named)

    monkeypatch.setattr(run_module, "build_model", other)
    refused(capsys, features.main, ["--resume", "--out", str(folder)], "was begun with; weights differ")


def test_a_run_is_not_resumed_on_other_features(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = made(tmp_path / "one", "--seed", "1"), made(tmp_path / "two", "--model.width", "4")
    words = ["--config", "features", "--data.root", str(stored), "--train.batch_size", "32", "--train.epochs", "1"]
    run = str(tmp_path / "run")
    assert train.main([*words, "--out", run]) == 0
    more = ["--resume", "--out", run, "--train.epochs", "2", "--data.root"]
    refused(capsys, train.main, [*more, str(one)], "must have the features it began with")
    refused(capsys, evaluate.main, [run, "--data.root", str(two)], "weights must fit the model of its configuration")


@pytest.mark.parametrize("kind", ["in memory", "on disk"])
def test_what_float16_cannot_hold_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, name = DIGITS, "train image 0"
    if kind == "on disk":
        make_images(tmp_path / "own")
        data = {"name": "image_folder", "root": tmp_path / "own", "augmentation": "none", "workers": 0, "image_size": 8}
        words = [f"--data.{option}={value}" for option, value in data.items()]
        name = str(tmp_path / "own" / "train" / "0")
    build = run_module.build_model

    def large(*arguments: Any, **named: Any) -> Any:
        model = build(*arguments, **named)
        model.encoder.register_forward_hook(lambda *call: call[-1] * 1e7)
        return model

    monkeypatch.setattr(run_module, "build_model", large)
    refused(capsys, features.main, [*words, "--out", str(tmp_path / "features")], f"those of {name}")
