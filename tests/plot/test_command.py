"""`python -m allnc.plot`: every kind of picture, of one run or several, and plain words for what cannot be drawn."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.plot.__main__ import DEFAULT, KINDS, main
from allnc.trainer import ending, loop

TINY = Config(
    data=DataConfig(max_per_class=12, imbalance_ratio=3, augmentation="none", views=1, many=10, few=5),
    model=ModelConfig(name="resnet8", width=2),
    loss=LossConfig(name="ce"),
    train=TrainConfig(epochs=2, batch_size=16, precision="fp32", device="cpu", threads=1, collapse_every=1),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs a and b of ten classes, and flat, of three classes with two features."""
    folder = tmp_path_factory.mktemp("runs")
    data = np.random.RandomState(0)
    images, labels = data.randint(0, 256, (30, 8, 8), np.uint8), np.arange(30) % 3
    np.savez(folder / "three.npz", images=images, labels=labels, test_images=images, test_labels=labels)
    flat = dataclasses.replace(
        TINY,
        data=dataclasses.replace(TINY.data, name="arrays", root=str(folder / "three.npz")),
        model=dataclasses.replace(TINY.model, feature_dim=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "plot_angles", lambda *_: None)
        patch.setattr(ending, "plot_curves", lambda *_: None)
        for name, config in {"a": TINY, "b": dataclasses.replace(TINY, seed=1), "flat": flat}.items():
            loop.train(config, folder / name, Console(file=io.StringIO()))
    return folder


def test_runs_are_drawn_in_every_kind(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "pictures"
    assert main([str(runs / "a"), str(runs / "b"), "--out", str(out), "--labels", "one", "two"]) == 0
    written = sorted(path.name for path in out.iterdir())
    assert written == sorted(f"{kind}.png" for kind in DEFAULT)
    assert sorted(Path(line).name for line in capsys.readouterr().out.splitlines()) == written
    assert all((out / name).stat().st_size > 5_000 for name in written)


def test_a_run_of_two_features_is_drawn_in_its_plane(runs: Path, tmp_path: Path) -> None:
    words = [str(runs / "flat"), "--kind", "simplex", "cosines", "--format", "svg", "png", "--out", str(tmp_path)]
    assert main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{k}.{e}" for k in ("simplex", "cosines") for e in ("svg", "png")
    }


def test_layers_are_those_asked_for(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, dict[str, dict[str, float]]]] = []
    monkeypatch.setattr("allnc.metrics.plots.plot_layers", lambda found, path: drawn.append(found))
    words = [str(runs / "flat"), "--kind", "layers", "--out", str(tmp_path)]
    assert main(words) == 0 and main([*words, "--layers", "encoder.bn,encoder"]) == 0
    names = [list(found["flat"]) for found in drawn]
    assert names == [["conv", "stages.0", "stages.1", "stages.2", "reduction", "features"], ["bn", "features"]]
    assert drawn[0]["flat"]["features"] == drawn[0]["flat"]["reduction"] == drawn[1]["flat"]["features"]


def test_layers_over_the_epochs_and_drift(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, collapse_layers=True))
    loop.train(config, tmp_path / "run", Console(file=io.StringIO()))
    words = ["--out", str(tmp_path / "out"), "--kind"]
    assert main([str(tmp_path / "run"), *words, "layer_curves", "drift"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["drift.png", "layer_curves.png"]
    assert main([str(tmp_path / "run"), str(runs / "a"), *words, "drift"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "run"), str(runs / "a"), *words, "layer_curves"]) == 2
    assert "records of a must hold measures of layers; got none: train with --train.collapse_layers" in (
        capsys.readouterr().err
    )


def test_records_alone_need_no_weights(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors", "state.pt", "check*"))
    words = [str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--kind"]
    assert main([*words, "curves", "duality"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "RUN must be the folder of a run; got {runs}/none, which is no folder"),
        (["three.npz"], "got {runs}/three.npz, which is no folder"),
        (["."], "which has no config.yaml of a run"),
        (["a", "a"], "RUN must be different folders; got one twice"),
        (["a", "b", "--labels", "x"], "--labels must name each of the 2 runs; got 1 names"),
        (["a", "b", "--labels", "x", "x"], "--labels must be different names; got x x"),
        (["a", "flat", "--kind", "angles"], "same number of classes; got 10 in a, 3 in flat: draw them apart"),
        (["a", "--kind", "simplex"], "--kind simplex needs runs with 2 or 3 features; a has 8"),
        (["a", "--kind", "curves", "--data.root", "x"], "--data.root would be ignored: curves are drawn from"),
        (["a", "--kind", "curves", "--train.device", "cpu"], "--train.device would be ignored"),
        (["flat", "--kind", "angles", "--data.root", "gone.npz"], "flat: data.root must be a .npz"),
        (["a", "--kind", "curves", "--layers", "all"], "--layers would be ignored: it is read by --kind layers; got"),
        (["a", "--kind", "layers", "--layers", "encoder.stage"], "a: layers must be of model.named_modules(); got"),
        (["a", "--out", "three.npz"], "--out must be a folder; got the file"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placed = [str(runs / word) if word in ("none", "three.npz", ".", "a", "b", "flat") else word for word in words]
    assert main([*placed, *([] if "--out" in placed else ["--out", str(tmp_path / "out")])]) == 2
    error = capsys.readouterr().err
    assert message.format(runs=runs) in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_broken_runs_are_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "a", run)
    (run / "last.safetensors").write_bytes(b"nothing")
    assert main([str(run), "--kind", "angles", "--out", str(tmp_path)]) == 2
    assert "last.safetensors is damaged" in capsys.readouterr().err
    (run / "last.safetensors").unlink()
    (run / "checkpoint.json").unlink()
    assert main([str(run), "--kind", "sizes", "--out", str(tmp_path)]) == 2
    assert "must be a run folder with last.safetensors" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n')
    assert main([str(run), "--kind", "cosines", "--out", str(tmp_path)]) == 2
    assert "records of run must hold one of cosine_std_means, cosine_std_weights" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("broken\n")
    assert main([str(run), "--out", str(tmp_path)]) == 2
    assert "RUN must have records of its epochs in metrics.jsonl" in capsys.readouterr().err


def test_kinds_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--kind", "angels"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(kind in error for kind in KINDS)
