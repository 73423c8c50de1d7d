"""Optimisers, the scaling of the learning rate to the batch, and the moving average of the weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allnc.config import Config, TrainConfig
from allnc.trainer import ending, loop
from allnc.trainer.checkpoint import load, load_weights
from allnc.trainer.optim import build_optimizer, learning_rate
from allnc.trainer.run import Run
from tests.faults.runs import TINY, quiet


def two_parameters() -> nn.Linear:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))
        model.bias.copy_(torch.tensor([1.0, -1.0]))
    model.weight.grad = torch.tensor([[0.0, 3.0, 4.0], [0.0, 0.0, 0.0]]).double()
    model.bias.grad = torch.tensor([0.5, 0.25]).double()
    return model


def stepped(**settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model = two_parameters()
    build_optimizer(model, TrainConfig(lr=0.1, **settings)).step()
    return model.weight.detach(), model.bias.detach()


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lars_by_hand(decay: float) -> None:
    """The rate of a matrix is its norm over that of its gradient (3 / 5), decay counted; a bias has the plain one."""
    weight, bias = stepped(optimizer="lars", momentum=0.0, weight_decay=decay)
    ratio = 0.001 * 3 / (5 + 3 * decay)
    want = [1 - 0.1 * ratio * decay * 1, 2 - 0.1 * ratio * (3 + decay * 2), 2 - 0.1 * ratio * (4 + decay * 2)]
    assert weight[0].tolist() == pytest.approx(want, rel=1e-6)
    assert bias.tolist() == pytest.approx([1 - 0.1 * 0.5, -1 - 0.1 * 0.25], rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lamb_by_hand(decay: float) -> None:
    """The first update of Adam is the sign of the gradient; a matrix's is scaled to the matrix's norm."""
    weight, bias = stepped(optimizer="lamb", weight_decay=decay)
    update = [decay * 1.0, 1 + decay * 2.0, 1 + decay * 2.0]
    ratio = 3 / math.hypot(*update)
    want = [old - 0.1 * ratio * new for old, new in zip((1.0, 2.0, 2.0), update, strict=True)]
    assert weight[0].tolist() == pytest.approx(want, rel=1e-5)
    assert bias.tolist() == pytest.approx([0.9, -1.1], rel=1e-5)


def test_nothing_but_grad_clip_clips() -> None:
    """A second gradient of ten times the first; clipped to a norm of 1, as LAMB's usual, both would be alike."""
    model = two_parameters()
    optimizer = build_optimizer(model, TrainConfig(lr=0.1, optimizer="lamb", weight_decay=0.0))
    optimizer.step()
    for parameter in (model.weight, model.bias):
        assert parameter.grad is not None
        parameter.grad *= 10
    optimizer.step()
    first, second = 0.1 * (0.9 + 10) / (1 - 0.9**2), math.sqrt(0.001 * (0.999 + 100) / (1 - 0.999**2))
    assert model.bias.tolist() == pytest.approx([0.9 - 0.1 * first / second, -1.1 - 0.1 * first / second], rel=1e-5)


def test_adamw_by_hand() -> None:
    weight, bias = stepped(optimizer="adamw", weight_decay=0.01)
    assert weight[0].tolist() == pytest.approx([0.999, 0.999 * 2 - 0.1, 0.999 * 2 - 0.1], rel=1e-6)
    assert bias.tolist() == pytest.approx([0.9, -1.1], rel=1e-6)


@pytest.mark.parametrize("scaling, factor", [("none", 1), ("linear", 16), ("sqrt", 4)])
def test_the_rate_grows_with_the_batch(scaling: Any, factor: float) -> None:
    config = TrainConfig(epochs=10, batch_size=4096, lr=0.1, warmup_epochs=1, lr_scaling=scaling)
    rates = [learning_rate(config, step, steps_per_epoch=4) for step in range(40)]
    assert max(rates) == pytest.approx(0.1 * factor) and rates[0] == pytest.approx(0.1 * factor / 5)


def changed(**train: Any) -> Config:
    return dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, **train))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "plot_angles", lambda *_, **__: None)
    monkeypatch.setattr(ending, "plot_curves", lambda *_: None)


def trained_in_two(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, then: Config | None = None) -> None:
    """Train one epoch, then resume, as after a death of the process."""
    train_epoch = loop.train_epoch

    def stopping(run: Run, log: Any) -> dict[str, float]:
        if run.epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(run, log)

    monkeypatch.setattr(loop, "train_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, folder, quiet())
    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    loop.train(then or config, folder, quiet(), mode="resume")


@pytest.mark.parametrize("name", ["lars", "adamw", "lamb"])
def test_every_optimizer_resumes_bit_for_bit(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(optimizer=name, lr=0.01, ema_decay=0.9, micro_batch=20)
    loop.train(config, tmp_path / "straight", quiet())
    trained_in_two(config, tmp_path / "halves", monkeypatch)
    want, got = (load(tmp_path / name) for name in ("straight", "halves"))
    for weights in (0, 1):
        one, other = ((x[1], x[2]["model"])[weights] for x in (want, got))
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_another_optimizer_on_resuming_starts_without_a_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_in_two(changed(), tmp_path / "run", monkeypatch, then=changed(optimizer="adamw", lr=0.001))
    state = load(tmp_path / "run")[2]["optimizer"]
    assert {"exp_avg", "exp_avg_sq", "step"} <= state["state"][0].keys()


def test_the_moving_average_is_measured_saved_and_evaluated(tmp_path: Path) -> None:
    config = changed(ema_decay=0.9)
    loop.train(config, tmp_path / "run", quiet())
    manifest, saved, state = load(tmp_path / "run")
    assert any(not torch.equal(value, state["model"][name]) for name, value in saved.items())
    run = Run(manifest.config)
    config_, epoch, weights = load_weights(tmp_path / "run")
    run.load_model(weights, epoch)
    assert config_ == manifest.config
    final = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert f'"accuracy": {run.measure_accuracy()["accuracy"]}' in final


def test_the_moving_average_by_hand() -> None:
    run = Run(changed(ema_decay=0.6))
    weight = run.model.classifier.weight
    want = torch.zeros_like(weight)
    with torch.no_grad():
        for step in range(4):
            weight.fill_(float(step + 1))
            run.average.update(run.model, step=step + 1)
            decay = min(0.6, 1 - (1 + step) ** (-2 / 3))
            want.mul_(decay).add_(weight, alpha=1 - decay)
    assert torch.allclose(run.measured.classifier.weight, want)


@pytest.mark.parametrize("before, after", [(None, 0.9), (0.9, None)])
def test_the_moving_average_can_begin_and_end_on_resuming(
    before: float | None, after: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_in_two(changed(ema_decay=before), tmp_path / "run", monkeypatch, then=changed(ema_decay=after))
    state = load(tmp_path / "run")[2]
    assert ("model" in state) == (after is not None)
