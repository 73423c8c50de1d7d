"""Short runs on the digits: they resume to the bit, repeat, stop cleanly, and use both branches."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from allnc import evaluate
from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.losses import LossOutput
from allnc.losses.build import LOSSES
from allnc.train import main
from allnc.trainer import divergence, ending, loop, measure, state, step
from allnc.trainer import run as run_module
from allnc.trainer.checkpoint import load_weights

TINY = Config(
    data=DataConfig(max_per_class=60, imbalance_ratio=6, many=40, few=15),
    model=ModelConfig(name="resnet8", width=4, projection_dim=16),
    train=TrainConfig(
        epochs=4, batch_size=64, precision="fp32", device="cpu", threads=1, eval_every=2, collapse_every=0
    ),
)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs; test_command.py looks at the plots."""
    monkeypatch.setattr(ending, "plot_angles", lambda *_, **__: None)
    monkeypatch.setattr(ending, "plot_curves", lambda *_: None)


def stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the epoch after `epochs`."""
    train_epoch = loop.train_epoch

    def interrupted(run: loop.Run, log: Any) -> dict[str, float]:
        if run.epoch == epochs:
            raise KeyboardInterrupt
        return train_epoch(run, log)

    monkeypatch.setattr(loop, "train_epoch", interrupted)


@pytest.mark.parametrize(
    "loss",
    [LossConfig(hycon=hycon, horizon=0.3, backend="eager") for hycon in ("cosine", "softmax")],
    ids=["cosine", "softmax"],
)
def test_resuming_gives_the_same_bits(loss: LossConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(TINY, data={"rebalance_sampler": "reversed"}, model={"heads": "separate"})
    config = changed(dataclasses.replace(config, loss=loss), train={"collapse_every": 1, "collapse_layers": True})
    straight = loop.train(config, tmp_path / "straight", quiet())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        loop.train(config, tmp_path / "parts", quiet())
    assert load_weights(tmp_path / "parts")[1] == 2
    torch.rand(7)  # a new process would have another global state, too
    resumed = loop.train(config, tmp_path / "parts", quiet(), mode="resume")

    (_, _, ours), (_, _, theirs) = load_weights(tmp_path / "straight"), load_weights(tmp_path / "parts")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    timed = ("seconds", "images_per_second", "loader_wait")
    assert {k: v for k, v in straight.items() if k not in timed} == {k: v for k, v in resumed.items() if k not in timed}
    for a, b in zip(records(tmp_path / "straight"), records(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
        assert ("drift" in a) == (a["epoch"] > 1) and list(a["layers"])[-1] == "features"
        assert a["layers"]["features"]["nc2_means"] == pytest.approx(a["nc2_means"], rel=1e-5)


def test_moves_are_of_equally_many_epochs(tmp_path: Path) -> None:
    loop.train(changed(TINY, train={"epochs": 5, "collapse_every": 2, "collapse_layers": True}), tmp_path, quiet())
    found = {r["epoch"]: ("nc1" in r, "drift" in r, "layers" in r) for r in records(tmp_path)}
    assert found[2] == (True, False, True) and found[3] == (False, False, False)
    assert found[4] == (True, True, True) and found[5] == (True, False, True)


def test_a_class_mean_of_zero_stops_nothing() -> None:
    run = loop.Run(changed(TINY, train={"epochs": 1}))
    means = torch.rand(10, 8)
    assert run.moved(means) == {}
    dead = means.index_fill(0, torch.tensor([3]), 0.0)
    assert 0 < run.moved(dead)["drift"] < math.inf and run.moved(torch.zeros(10, 8))["drift"] == pytest.approx(1)
    assert run.moved(dead)["drift"] == math.inf


def test_blocks_that_cannot_be_measured_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.nn.Linear(64, 16)
            self.part.register_forward_hook(lambda *call: (call[2], 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.part(images.flatten(1))[0]

    built = run_module.build_model

    def odd(*arguments: Any, **named: Any) -> Any:
        model = built(*arguments, **named)
        model.encoder = Odd()
        return model

    monkeypatch.setattr(run_module, "build_model", odd)
    loop.Run(TINY)
    with pytest.raises(ValueError, match=r"collapse_layers must be false for this model.*part' cannot: it returns tu"):
        loop.Run(changed(TINY, train={"collapse_layers": True}))


def test_a_finished_run_can_be_resumed(tmp_path: Path) -> None:
    config = changed(TINY, train={"epochs": 1})
    first = loop.train(config, tmp_path, quiet())
    again = loop.train(config, tmp_path, quiet(), mode="resume")
    assert first == again and len(records(tmp_path)) == 1


def test_a_record_without_its_checkpoint_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = state.save

    def killed(run: loop.Run, folder: Path, *, best: bool) -> None:
        if run.epoch == 3:
            raise KeyboardInterrupt
        save(run, folder, best=best)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state, "save", killed)
        loop.train(TINY, tmp_path, quiet())
    assert [r["epoch"] for r in records(tmp_path)] == [1, 2, 3]
    loop.train(TINY, tmp_path, quiet(), mode="resume")
    assert [r["epoch"] for r in records(tmp_path)] == [1, 2, 3, 4]


def test_measuring_changes_nothing_and_ignores_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop.Run(TINY)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    whole, _ = run.measure()
    monkeypatch.setattr(measure, "BATCH", 7)
    parts, _ = run.measure()
    assert run.model.training
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    assert parts == pytest.approx(whole, rel=1e-4)


def test_the_same_seed_repeats_and_another_differs(tmp_path: Path) -> None:
    config = changed(TINY, train={"epochs": 1})
    first, again, other = (
        loop.train(dataclasses.replace(config, seed=seed), tmp_path / name, quiet())
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert first["nc1"] == again["nc1"] != other["nc1"]


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "allnc"])
def test_every_baseline_trains_with_one_head(name: str) -> None:
    model = {"classifier": "etf"} if name == "etf_dr" else {"classifier": "normalised", "heads": "separate"}
    run = loop.Run(changed(TINY, loss={"name": name}, model=model, data={"rebalance_sampler": "reversed"}))
    assert run.model.uniform_classifier is None and run.model.predictor is None and not run.loader.two_batches
    batch = next(iter(run.loader.epoch(0)))
    total, _ = step.forward(run, batch, progress=0.0)
    total.backward()
    assert all(p.grad is not None for p in run.model.parameters())


def test_two_branches_read_their_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop.Run(changed(TINY, data={"rebalance_sampler": "reversed"}, model={"heads": "separate"}))
    batch = next(iter(run.loader.epoch(0)))
    seen: dict[str, Any] = {}
    forward = run.loss.forward

    def spy(*arguments: Any, **named: Any) -> Any:
        seen["features"], seen["labels"], seen["weight"], seen["uniform"], seen["rebalance"], _ = arguments
        seen.update(named)
        return forward(*arguments, **named)

    monkeypatch.setattr(run.loss, "forward", spy)
    step.forward(run, batch, progress=0.5)
    assert len(seen["features"]) == len(seen["labels"]) == len(seen["z"]) == 2 * (64 + 64)
    counts = [torch.bincount(seen[branch][1], minlength=10) for branch in ("uniform", "rebalance")]
    assert counts[0][0] > counts[0][-1] and counts[1][0] < counts[1][-1]
    assert len(seen["uniform"][0]) == len(seen["rebalance"][0]) == 128
    assert seen["weight"] is run.model.classifier_weight


def test_the_loss_sees_the_class_vectors_that_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a normalised classifier at unit length: their lengths are in no logit. The gradient goes to the weight."""
    run = loop.Run(changed(TINY, model={"classifier": "normalised"}))
    batch = next(iter(run.loader.epoch(0)))
    seen: list[torch.Tensor] = []
    forward = run.loss.forward

    def spy(features: Any, labels: Any, weight: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(weight)
        weight.retain_grad()
        return forward(features, labels, weight, *rest, **named)

    monkeypatch.setattr(run.loss, "forward", spy)
    step.forward(run, batch, progress=0.5).total.backward()
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(10))
    assert seen[0].grad is not None and float(seen[0].grad.abs().max()) > 0  # of P2P
    torch.testing.assert_close(run.model.predicting_vectors, seen[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains(precision: str, tmp_path: Path) -> None:
    """As float32 does: the mean loss of the first epoch is the same to a few hundredths."""
    losses = {}
    for kind in (precision, "fp32"):
        config = changed(TINY, train={"epochs": 1, "precision": kind, "grad_clip": 1.0})
        summary = loop.train(config, tmp_path / kind, quiet())
        assert summary["precision"] == {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[kind]
        losses[kind] = records(tmp_path / kind)[0]["loss"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.03)


def test_a_loss_that_diverges_is_named_and_the_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = step.forward

    def broken(run: loop.Run, batch: Any, *, progress: float) -> Any:
        total, parts = forward(run, batch, progress=progress)
        if run.epoch != 1:
            return LossOutput(total, parts)
        return LossOutput(total * float("nan"), {**parts, "hycon": total.detach() * float("nan")})

    monkeypatch.setattr(step, "forward", broken)
    with pytest.raises(divergence.DivergenceError, match=r"got nan by epoch 2, step 4 in .*hycon.*: lower train\.lr"):
        loop.train(TINY, tmp_path, quiet())
    _, epoch, weights = load_weights(tmp_path)
    assert epoch == 1 and all(w.isfinite().all() for w in weights.values())


def test_ctrl_c_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "run")
    words = ["--train.epochs", "2", "--model.width", "4", "--out", folder]
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert main(words) == 130
    assert f"stopped; --resume --out {folder} continues after epoch 1 of 2" in capsys.readouterr().err
    assert evaluate.main([folder]) == 0
    assert "epoch 1, the last one" in capsys.readouterr().out
    assert main(["--resume", "--out", folder]) == 0
    assert len(records(Path(folder))) == 2


def test_evaluate_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path)]) == 2
    assert "must be a run folder with last.safetensors" in capsys.readouterr().err


def test_a_run_with_validation_images_leaves_the_test_to_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(TINY, data={"validation": 0.3}, train={"epochs": 1, "eval_every": 1})
    summary = loop.train(config, tmp_path / "run", quiet())
    assert summary["measured_on"] == "validation"
    run = loop.Run(config)
    assert (len(run.measured_set), len(loop.Run(config, tested=True).measured_set)) == (389, 500)
    assert evaluate.main([str(tmp_path / "run")]) == 0
    own = capsys.readouterr().out
    assert "accuracy (validation)" in own
    assert f"{summary['accuracy']:.1f}" in own
    assert evaluate.main([str(tmp_path / "run"), "--on", "test"]) == 0
    assert "accuracy (test)" in capsys.readouterr().out


def test_no_validation_images_no_evaluation_on_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(changed(TINY, train={"epochs": 1}), tmp_path / "run", quiet())
    assert evaluate.main([str(tmp_path / "run"), "--on", "validation"]) == 2
    assert "--on validation needs a run with data.validation" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("hycon", ["cosine", "softmax"])
def test_a_gpu_trains_and_resumes(hycon: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"epochs": 6, "device": "auto", "precision": "auto"}
    config = changed(TINY, train=changes, loss={"hycon": hycon}, data={"rebalance_sampler": "reversed"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(3, patch)
        loop.train(config, tmp_path, quiet())
    summary = loop.train(config, tmp_path, quiet(), mode="resume")
    assert summary["device"] == "cuda" and summary["accuracy"] > 20
    assert [r["epoch"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_resumes_on_the_images_it_began_with(tmp_path: Path) -> None:
    """An array file that was made again with as many images of each class."""
    noise = np.random.RandomState(0).randint(0, 255, (40, 8, 8)).astype(np.uint8)
    arrays = {"labels": np.arange(40) % 2, "test_images": noise[:4], "test_labels": np.array([0, 1, 0, 1])}
    np.savez(tmp_path / "own.npz", images=noise, **arrays)
    data = DataConfig(name="arrays", root=str(tmp_path / "own.npz"))
    config = dataclasses.replace(changed(TINY, train={"epochs": 1, "batch_size": 8}), data=data)
    loop.train(config, tmp_path / "run", quiet())
    more = changed(config, train={"epochs": 2})
    np.savez(tmp_path / "own.npz", images=noise[::-1], **arrays)
    with pytest.raises(ValueError, match=r"must have the images it began with; data\.root holds others"):
        loop.train(more, tmp_path / "run", quiet(), mode="resume")
    np.savez(tmp_path / "own.npz", images=noise, **arrays)
    assert loop.train(more, tmp_path / "run", quiet(), mode="resume")["epochs"] == 2


def test_training_accuracy_is_that_of_plain_images() -> None:
    """Of every training image once, without augmentation, in evaluation mode."""
    run = loop.Run(TINY)
    run.model.eval()
    images, data = run.train_set.images, run.train_set
    assert images is not None
    with torch.no_grad():
        pixels = (images.float() / 255 - data.mean[0]) / data.std[0]
        right = run.model(pixels).logits_rebalance.argmax(1) == data.labels
    assert run.measure_collapse()[0]["train_accuracy"] == pytest.approx(100 * right.float().mean().item())
