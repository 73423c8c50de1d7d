"""Numbers that stop being numbers: the last good checkpoint stays, and the advice can be followed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from allnc import evaluate
from allnc.losses import LossOutput
from allnc.train import main
from allnc.trainer import divergence, ending, loop, state, step
from allnc.trainer.checkpoint import load_weights
from tests.faults.runs import TINY, quiet


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "plot_angles", lambda *_, **__: None)
    monkeypatch.setattr(ending, "plot_curves", lambda *_: None)


def break_epoch(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last update of an epoch, after which no loss is looked at, overflow: only when the rate is too high."""
    train_epoch = loop.train_epoch

    def overflowing(run: loop.Run, log: loop.RunLog) -> dict[str, float]:
        record = train_epoch(run, log)
        if run.epoch + 1 == epoch and run.config.train.lr >= 0.1:
            with torch.no_grad():
                run.model.classifier_weight.mul_(torch.inf)
        return record

    monkeypatch.setattr(loop, "train_epoch", overflowing)


def test_the_last_finite_checkpoint_is_kept_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_epoch(2, monkeypatch)
    folder = tmp_path / "run"
    words = ["--train.epochs", "3", "--model.width", "4", "--train.lr", "0.1", "--out", str(folder)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the weights must stay finite; after epoch 2, 1 of " in error
    assert "lower train.lr" in error and f"--resume --out {folder} continues after epoch 1 of 3" in error
    _, epoch, weights = load_weights(folder)
    assert epoch == 1 and all(value.isfinite().all() for value in weights.values())
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1]
    assert evaluate.main([str(folder)]) == 0

    assert main(["--resume", "--out", str(folder)]) == 2  # the same again
    capsys.readouterr()
    assert main(["--resume", "--out", str(folder), "--train.lr", "0.01", "--train.grad_clip", "1"]) == 0
    assert "changed: train.lr 0.1 -> 0.01" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    wanted = [("train.lr", 0.1, 0.01), ("train.grad_clip", None, 1.0)]
    assert [(c["epoch"], c["option"], c["from"], c["to"]) for c in summary["changes"]] == [(1, *w) for w in wanted]
    assert (folder / "config.yaml").read_text().startswith("# since epoch 2: train.lr 0.1 -> 0.01\n")
    rates = [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rates[0] > 0.02 > rates[1]

    assert main(["--resume", "--out", str(folder), "--train.lr", "1"]) == 2
    assert "has done its 3 epochs: raise train.epochs, or remove train.lr" in capsys.readouterr().err
    assert main(["--resume", "--out", str(folder), "--train.epochs", "4"]) == 0
    assert len(json.loads((folder / "summary.json").read_text())["changes"]) == 3


def test_gradients_that_overflow_at_every_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is finite, every step is left out, and nothing would ever be learned."""
    loss_of = step.loss_of

    def steep(*arguments: Any, **named: Any) -> LossOutput:
        output = loss_of(*arguments, **named)
        infinite = (output.total - output.total.detach()) * torch.finfo(torch.float32).max * 4
        return LossOutput(output.total + infinite, output.parts)

    monkeypatch.setattr(step, "loss_of", steep)
    words = ["--train.epochs", "30", "--model.width", "4", "--train.precision", "fp16", "--out", str(tmp_path / "run")]
    assert main([*words, "--train.eval_every", "30"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "gradients must fit in float16; they overflow at every scale" in error


@pytest.mark.parametrize("where", ["model", "means", "momentum"])
def test_whatever_is_saved_is_looked_at(where: str) -> None:
    run = loop.Run(TINY)
    batch = next(iter(run.loader.epoch(0)))
    loop.train_step(run, batch, progress=0.0)
    divergence.check_weights(run)
    tensor = {
        "model": lambda: next(b for n, b in run.model.named_buffers() if n.endswith("running_var")),
        "means": lambda: next(b for b in run.loss.buffers() if b.ndim == 2),
        "momentum": lambda: next(iter(run.optimizer.state.values()))["momentum_buffer"],
    }[where]()
    tensor.view(-1)[0] = torch.nan
    with pytest.raises(divergence.DivergenceError, match=r"must stay finite; after epoch 0, 1 of \d+ tensors"):
        divergence.check_weights(run)


def test_settings_of_the_optimiser_follow_the_new_configuration(tmp_path: Path) -> None:
    short = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, epochs=1))
    loop.train(short, tmp_path / "run", quiet())
    changed = dataclasses.replace(
        TINY, train=dataclasses.replace(TINY.train, epochs=2, momentum=0.0, weight_decay=0.25, precision="fp16")
    )
    run = loop.Run(changed)
    state.restore(run, tmp_path / "run")
    assert [g["weight_decay"] for g in run.optimizer.param_groups] == [0.25, 0.0]
    assert all(g["momentum"] == 0 and not g["nesterov"] for g in run.optimizer.param_groups)
    assert run.scaler.is_enabled() and run.epoch == 1
    loop.train_step(run, next(iter(run.loader.epoch(1))), progress=0.5)


def test_rates_beyond_all_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate in ("1e300", "inf", "nan", "1e38", "1e20"):
        words = ["--model.width", "4", "--train.epochs", "2", "--model.classifier", "linear", "--train.lr", rate]
        assert main([*words, "--out", str(tmp_path / rate)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ("train.lr" in error)


def test_a_backend_that_cannot_run_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from allnc import _extension

    monkeypatch.setattr(_extension, "has_cpp", lambda: False)
    assert main(["--loss.backend", "cpp", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "loss.backend: backend 'cpp' is not available" in error
    assert not (tmp_path / "run" / "config.yaml").exists()
