"""The second stage of decoupled training: what moves and what rests, resuming, whatever the first stage was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from allnc.config import Config, TrainConfig
from allnc.trainer import ending, loop, state
from allnc.trainer.checkpoint import load_weights
from allnc.trainer.command import parse
from allnc.trainer.optim import learning_rate
from allnc.trainer.retrain import start_retraining
from allnc.trainer.run import Run
from allnc.trainer.step import train_step
from tests.trainer.test_training import TINY, changed, no_plots, quiet, records, stop_after

__all__ = ["no_plots"]  # a fixture for every test
DECOUPLED = changed(TINY, loss={"name": "ce"}, train={"retrain_epochs": 2})
SETTINGS: dict[str, Config] = {
    "cross-entropy": DECOUPLED,
    "two samplers, two heads, contrast": changed(
        DECOUPLED,
        loss={"name": "allnc", "backend": "eager"},
        model={"heads": "separate", "classifier": "normalised"},
        data={"rebalance_sampler": "reversed"},
    ),
    "the contrast alone": changed(
        DECOUPLED, loss={"name": "supcon", "classification_weight": 0.0}, train={"weight_decay": 0.0}
    ),
    "learned prototypes": changed(DECOUPLED, loss={"name": "bcl", "backend": "eager"}),
    "moving average, from class means, in parts": changed(
        DECOUPLED,
        model={"classifier": "normalised", "classifier_init": "class_means"},
        train={"ema_decay": 0.9, "micro_batch": 24},
    ),
}
TIMED = ("seconds", "images_per_second", "loader_wait")


def test_both_stages_have_a_cosine_of_their_own() -> None:
    config = TrainConfig(epochs=6, retrain_epochs=2, lr=1.0, warmup_epochs=0)
    rates = [learning_rate(config, step, steps_per_epoch=1) for step in range(6)]
    half = 0.5**0.5 / 2
    assert rates == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half, 1, 0.5])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stop", [2, 3])
def test_resuming_gives_the_same_bits(
    name: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, Any]
) -> None:
    """Stopped between the stages, and within the second."""
    config = SETTINGS[name]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(stop, patch)
        loop.train(config, tmp_path, quiet())
    torch.rand(7)
    summary = loop.train(config, tmp_path, quiet(), mode="resume")
    wanted = straight[name]
    got = load_weights(tmp_path)[2]
    assert got.keys() == wanted["weights"][4].keys()
    assert all(torch.equal(got[n], value) for n, value in wanted["weights"][4].items())
    for ours, theirs in zip([summary, *records(tmp_path)], [wanted["summary"], *wanted["records"]], strict=True):
        assert {k: v for k, v in ours.items() if k not in TIMED} == {k: v for k, v in theirs.items() if k not in TIMED}
    assert loop.train(config, tmp_path, quiet(), mode="resume") == summary  # a finished run, too


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uninterrupted runs: summary, records, and the weights after each epoch."""
    found: dict[str, Any] = {}
    save, weights = state.save, dict[int, Any]()

    def saved(run: Run, to: Path, *, best: bool = False) -> None:
        save(run, to, best=best)
        weights[run.epoch] = load_weights(to)[2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "plot_angles", lambda *_, **__: None)
        patch.setattr(ending, "plot_curves", lambda *_: None)
        patch.setattr(state, "save", saved)
        for name, config in SETTINGS.items():
            folder = tmp_path_factory.mktemp("straight")
            summary = loop.train(config, folder, quiet())
            found[name] = {"summary": summary, "records": records(folder), "weights": weights.copy()}
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_only_the_classifier_moves(name: str, straight: dict[str, Any]) -> None:
    """Running statistics and the other heads rest, too; the second stage has the cross-entropy alone."""
    before, between, after = (straight[name]["weights"][epoch] for epoch in (2, 3, 4))
    for key, value in before.items():
        moves = key.startswith("classifier.")
        assert torch.equal(between[key], value) != moves and torch.equal(after[key], between[key]) != moves, key
    own = [record for record in straight[name]["records"] if record["epoch"] > 2]
    assert all(record["loss"] == record["loss_uniform"] and "loss_hycon" not in record for record in own)


def test_of_a_contrast_alone_the_classifier_waits(straight: dict[str, Any]) -> None:
    """In the first stage it stays what it was, whatever the encoder does."""
    first, second = (straight["the contrast alone"]["weights"][epoch] for epoch in (1, 2))
    moved = {name for name, value in second.items() if not torch.equal(value, first[name])}
    assert any(name.startswith("encoder.") for name in moved)
    assert not any(name.startswith("classifier.") for name in moved)
    own = straight["the contrast alone"]["records"]
    assert own[-1]["loss"] < own[1]["loss_cls"]


def test_the_classifier_is_new_and_batches_are_balanced() -> None:
    """Its start is the seed's, whatever was trained; batches have classes alike, one for both branches."""
    runs = [Run(SETTINGS["two samplers, two heads, contrast"]) for _ in range(2)]
    with torch.no_grad():
        runs[1].model.classifier.weight.add_(1)
    torch.rand(5)
    for run in runs:
        old, state = run.model.classifier_weight.clone(), torch.get_rng_state()
        start_retraining(run)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(run.model.classifier_weight, old)
    assert torch.equal(runs[0].model.classifier_weight, runs[1].model.classifier_weight)
    run = runs[0]
    labels = run.train_set.labels[torch.cat([run.loader.indices(epoch) for epoch in range(30)])]
    shares = torch.bincount(labels.flatten(), minlength=10) / labels.numel()
    assert labels.shape[1] == 64 and ((shares - 0.1).abs() < 4 * (0.09 / labels.numel()) ** 0.5).all()


def test_a_step_of_the_second_stage_by_hand() -> None:
    """Cross-entropy of the features in evaluation mode, one step of SGD without momentum."""
    config = changed(DECOUPLED, train={"momentum": 0.0, "weight_decay": 0.0, "lr": 0.5})
    run = Run(config)
    start_retraining(run)
    run.model.train()
    batch = next(run.loader.epoch(2))
    with torch.no_grad():
        features = copy.deepcopy(run.model.encoder).eval()(batch.images.contiguous(memory_format=run.memory))
    weight, bias = (p.detach().clone().requires_grad_() for p in run.model.classifier.parameters())
    loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, batch.labels)
    loss.backward()
    assert weight.grad is not None
    parts = train_step(run, batch, progress=1.0)
    assert float(parts["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(run.model.classifier_weight, weight - 0.5 * weight.grad)


@pytest.mark.parametrize("name", ["bcl", "proco"])
def test_a_second_stage_after_a_contrast(name: str) -> None:
    """Its cross-entropy is called with the heads that the first stage's loss reads, and leaves them alone."""
    run = Run(changed(DECOUPLED, loss={"name": name}))
    start_retraining(run)
    run.model.train()
    projection = run.model.projection
    assert projection is not None
    before = [p.detach().clone() for p in projection.parameters()]
    train_step(run, next(run.loader.epoch(2)), progress=0.9)
    assert all(torch.equal(p, old) for p, old in zip(projection.parameters(), before, strict=True))


def test_a_finished_run_goes_on_only_in_its_second_stage(tmp_path: Path) -> None:
    loop.train(DECOUPLED, tmp_path, quiet())
    with pytest.raises(ValueError, match=r"train\.epochs - train\.retrain_epochs must stay 2 after 4 epochs, of which"):
        loop.train(changed(DECOUPLED, train={"epochs": 6}), tmp_path, quiet(), mode="resume")
    summary = loop.train(changed(DECOUPLED, train={"epochs": 5, "retrain_epochs": 3}), tmp_path, quiet(), mode="resume")
    assert summary["epochs"] == 5


def test_what_there_is_to_train() -> None:
    """A first stage of an epoch at least, and a classifier."""
    with pytest.raises(ValueError, match=r"train\.retrain_epochs needs a model\.classifier that trains, .* got etf"):
        parse(["--train.retrain_epochs", "6", "--model.classifier", "etf"])
    with pytest.raises(ValueError, match=r"train\.retrain_epochs must be in \[0, 60\), .*; got 60"):
        parse(["--train.retrain_epochs", "60"])
