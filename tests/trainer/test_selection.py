"""The best epoch on validation images: kept, taken by runs that stop early, the same after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from allnc import evaluate
from allnc.config import Config, DataConfig, ModelConfig, TrainConfig
from allnc.trainer import checkpoint, ending, loop
from allnc.trainer.predictions import read_predictions
from allnc.trainer.selection import Selection
from tests.faults.runs import shown
from tests.processes import needs_gloo
from tests.trainer.test_ranks import TINY as WORDS
from tests.trainer.test_ranks import trained
from tests.trainer.test_training import changed, quiet, records, stop_after

TIMED = ("seconds", "images_per_second", "loader_wait")
VALIDATED = Config(
    data=DataConfig(max_per_class=60, imbalance_ratio=6, many=40, few=15, validation=0.2),
    model=ModelConfig(name="resnet8", width=4, projection_dim=16),
    train=TrainConfig(epochs=6, batch_size=64, precision="fp32", device="cpu", threads=1, collapse_every=0),
)
# The balanced accuracy on validation images that each epoch is said to have: the best one is the second.
PLAYED = (30.0, 50.0, 40.0, 50.0, 45.0, 60.0)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "plot_angles", lambda *_, **__: None)
    monkeypatch.setattr(ending, "plot_curves", lambda *_: None)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let measurements in mid-training have the accuracies of `PLAYED`."""
    measure = loop.Run.measure_accuracy

    def measured(run: loop.Run, prior: torch.Tensor | None = None) -> dict[str, float | None]:
        return measure(run, prior) | {"balanced": PLAYED[run.epoch - 1]}

    monkeypatch.setattr(loop.Run, "measure_accuracy", measured)


def test_of_equal_scores_the_first_is_the_best() -> None:
    selection = Selection()
    waited = []
    for epoch, score in enumerate(PLAYED[:5], 1):
        selection = selection.after(epoch, score)
        waited.append(selection.stops(3))
    assert selection == Selection(score=50.0, epoch=2, measured=5) and waited == [False] * 4 + [True]
    assert not Selection().stops(1) and not selection.stops(None) and selection.after(6, 60.0).epoch == 6


def test_without_patience_the_best_epoch_is_kept_beside_the_last(tmp_path: Path, played: None) -> None:
    summary = loop.train(changed(VALIDATED, train={"epochs": 4}), tmp_path, quiet())
    assert summary["best"] == {"epoch": 2, "balanced": 50.0} and summary["weights"] == "last"
    assert (summary["epochs"], summary["trained_epochs"], summary["stopped_early"]) == (4, 4, False)
    assert [checkpoint.load_weights(tmp_path, which)[1] for which in (None, "last", "best")] == [4, 4, 2]

    stopped = loop.train(changed(VALIDATED, train={"epochs": 2}), tmp_path / "two", quiet())
    _, _, last = checkpoint.load_weights(tmp_path / "two")
    _, _, best = checkpoint.load_weights(tmp_path / "two", "best")
    assert stopped["epochs"] == 2 and all(torch.equal(last[name], best[name]) for name in last)


def test_a_run_with_patience_stops_and_ends_with_its_best_epoch(tmp_path: Path, played: None) -> None:
    console = quiet()
    config = changed(VALIDATED, train={"patience": 3})
    summary = loop.train(config, tmp_path, console)
    assert len(records(tmp_path)) == 5 and "stopped after epoch 5 of 6: none was better than epoch 2" in shown(console)
    assert "epoch 2, the best one on validation images" in shown(console)
    assert (summary["epochs"], summary["trained_epochs"], summary["stopped_early"]) == (2, 5, True)
    assert summary["weights"] == "best" and checkpoint.load_weights(tmp_path)[1] == 2
    assert checkpoint.load_weights(tmp_path, "last")[1] == 5

    again = loop.train(config, tmp_path, quiet(), mode="resume")  # there is nothing left to do
    assert len(records(tmp_path)) == 5
    assert {k: v for k, v in again.items() if k not in TIMED} == {k: v for k, v in summary.items() if k not in TIMED}
    patient = changed(config, train={"patience": 4})  # which waits for the sixth epoch, the best of all
    longer = loop.train(patient, tmp_path, quiet(), mode="resume")
    assert (longer["epochs"], longer["trained_epochs"], longer["stopped_early"]) == (6, 6, False)


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_selects_the_same(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real measurements; interrupted before and after the epoch that is the best."""
    config = changed(VALIDATED, train={"patience": 2, "lr": 0.5, "epochs": 5, "ema_decay": 0.5})
    straight = loop.train(config, tmp_path / "straight", quiet())
    assert straight["weights"] == "best" and 1 < straight["epochs"] <= straight["trained_epochs"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(stop, patch)
        loop.train(config, tmp_path / "parts", quiet())
    resumed = loop.train(config, tmp_path / "parts", quiet(), mode="resume")
    assert {k: v for k, v in straight.items() if k not in TIMED} == {k: v for k, v in resumed.items() if k not in TIMED}
    for name in ("best", "last"):
        ours, theirs = (checkpoint.load_weights(tmp_path / part, name) for part in ("straight", "parts"))
        assert ours[1] == theirs[1] and all(torch.equal(ours[2][key], theirs[2][key]) for key in ours[2])
    for name in ("predictions.npz", "classes.csv"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_test_images_never_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(VALIDATED, data={"validation": 0.0}, train={"epochs": 1})
    summary = loop.train(config, tmp_path, quiet())
    assert summary["best"] is None and "best_accuracy" not in summary
    assert not (tmp_path / "best.safetensors").exists()
    assert evaluate.main([str(tmp_path), "--weights", "best"]) == 2
    assert "needs a run with data.validation" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"train\.patience needs validation images"):
        changed(config, train={"patience": 2})
    with pytest.raises(ValueError, match=r"must be null with train\.retrain_epochs"):
        changed(VALIDATED, train={"patience": 2, "retrain_epochs": 1})
    with pytest.raises(ValueError, match=r"train\.patience"):
        changed(VALIDATED, train={"patience": 0})


def test_a_checkpoint_of_an_older_version_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the best accuracy alone, of which no weights were kept: the best is of the epochs since."""
    save = checkpoint.save

    def older(folder: Path, config: Config, *, training: dict[str, Any], best: bool = False, **rest: Any) -> None:
        del training["selection"]
        save(folder, config, training=training | {"best": 99.0}, **rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        patch.setattr(checkpoint, "save", older)
        loop.train(changed(VALIDATED, train={"epochs": 3}), tmp_path, quiet())
    with pytest.raises(ValueError, match="older version"):
        checkpoint.load_weights(tmp_path, "best")
    summary = loop.train(changed(VALIDATED, train={"epochs": 3}), tmp_path, quiet(), mode="resume")
    assert summary["best"]["epoch"] == 3 == checkpoint.load_weights(tmp_path, "best")[1]


def test_the_best_weights_load_and_a_damaged_file_is_refused(tmp_path: Path, played: None) -> None:
    config = changed(VALIDATED, train={"epochs": 3})
    loop.train(config, tmp_path, quiet())
    _, epoch, weights = checkpoint.load_weights(tmp_path, "best")
    run = loop.Run(config)
    run.load_model(weights, epoch)
    assert run.conventions()["weights"] == "best" and run.epoch == 2
    (tmp_path / "best.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"damaged, or of another epoch .* names the file of the best epoch"):
        checkpoint.load_weights(tmp_path, "best")
    assert checkpoint.load_weights(tmp_path)[1] == 3


@needs_gloo
def test_two_processes_select_and_stop_together(tmp_path: Path) -> None:
    """A rate of nearly 0: no epoch is better than the first one, as one process sees it, too."""
    words = (*WORDS, "--data.validation", "0.2", "--train.patience", "2", "--train.lr", "1e-9", "--train.epochs", "9")
    summary = trained(2, tmp_path / "run", *words)["summary"]
    assert (summary["epochs"], summary["trained_epochs"], summary["weights"]) == (1, 3, "best")
    assert summary["best"]["balanced"] == pytest.approx(summary["balanced"])
    config, epoch, weights = checkpoint.load_weights(tmp_path / "run")
    run = loop.Run(config)
    run.load_model(weights, epoch)
    measured, own = run.measure_accuracy(), read_predictions(tmp_path / "run" / "predictions.npz")
    assert run.predictions is not None and own["labels"].tolist() == run.measured_set.labels.tolist()
    assert own["true_confidence"].tolist() == pytest.approx(run.predictions.true_confidence.tolist(), rel=1e-4)
    assert measured["nll"] == pytest.approx(summary["nll"], rel=1e-5) and measured["ece"] == pytest.approx(
        summary["ece"], rel=1e-3
    )
