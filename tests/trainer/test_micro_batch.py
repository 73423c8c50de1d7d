"""Cached gradients: a batch that passes the encoder in parts trains what the whole batch trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.data import Batch, ImageSet
from allnc.trainer import step
from allnc.trainer.run import Run
from tests.faults.runs import command, one_line

PLAIN = Config(
    data=DataConfig(max_per_class=60, imbalance_ratio=6),
    model=ModelConfig(name="resnet8", width=8, classifier="normalised", projection_dim=16, norm="group"),
    loss=LossConfig(alpha=0.3),
    train=TrainConfig(epochs=2, batch_size=45, micro_batch=8, precision="fp32", device="cpu", threads=1),
)


def changed(**sections: dict[str, Any]) -> Config:
    parts = {name: dataclasses.replace(getattr(PLAIN, name), **values) for name, values in sections.items()}
    return dataclasses.replace(PLAIN, **parts)


def run_and_batch(config: Config, dtype: torch.dtype = torch.float64) -> tuple[Run, Batch]:
    run = Run(config)
    for module in (run.model, run.loss):
        module.to(dtype)
    run.connect()
    batch = next(run.loader.epoch(0))
    return run, batch._replace(images=batch.images.to(dtype))


def gradients(run: Run) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def restored(run: Run, state: dict[str, Any]) -> None:
    run.loss.load_state_dict(state)
    run.optimizer.zero_grad()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        difference = float((got[name].double() - value.double()).abs().max())
        assert difference <= tolerance * float(value.double().abs().max()), name


SETTINGS = {
    "softmax": PLAIN,
    "two samplers, two heads": changed(data={"rebalance_sampler": "reversed"}, model={"heads": "separate"}),
    "cosine, whose predictor has BatchNorm": changed(loss={"hycon": "cosine"}),
    "baseline": changed(loss={"name": "logit_adjusted"}),
    "prototypes": changed(loss={"name": "bcl"}),
    "class distributions": changed(loss={"name": "proco"}),
    "one image at a time": changed(train={"micro_batch": 1}),
    "one view": changed(data={"views": 1}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_the_whole_batch(name: str) -> None:
    run, batch = run_and_batch(SETTINGS[name])
    before = state_of(run.loss)
    whole = step._backward(run, batch, 0.1)
    want, means = gradients(run), state_of(run.loss)
    restored(run, before)
    parts = step._backward_in_parts(run, batch, 0.1)
    assert parts.total.item() == pytest.approx(whole.total.item(), rel=1e-12)
    assert_close(gradients(run), want, 1e-11)
    assert_close(state_of(run.loss), means, 1e-12)  # the class means have moved once


def test_in_float32_they_differ_by_rounding() -> None:
    run, batch = run_and_batch(PLAIN, torch.float32)
    exact, precise = run_and_batch(PLAIN)
    step._backward(exact, precise, 0.1)
    step._backward_in_parts(run, batch, 0.1)
    assert_close(gradients(run), gradients(exact), 3e-6)


def by_parts_with_graph(run: Run, batch: Batch, progress: float) -> None:
    """What the cached pass stands for, held in memory at once."""
    parts = batch.parts(run.passes)
    found = torch.cat([run.model.encoder(step._pixels(run, batch.images[rows])) for rows in parts])
    features = found[torch.cat(parts).argsort()]
    step.loss_of(run, run.model.heads(features), batch, progress=progress).total.backward()


class Noisy(nn.Sequential):
    """A part of the model that draws random numbers in training."""

    def __init__(self, part: Any) -> None:
        super().__init__(part, nn.Dropout(0.3))


def test_dropout_draws_the_same_numbers_in_both_passes() -> None:
    run, batch = run_and_batch(PLAIN)
    model: Any = run.model
    model.encoder, model.projection = Noisy(model.encoder), Noisy(model.projection)  # a head, too
    before, random = state_of(run.loss), torch.get_rng_state()
    by_parts_with_graph(run, batch, 0.1)
    want, after = gradients(run), torch.get_rng_state()
    restored(run, before)
    torch.set_rng_state(random)
    step._backward_in_parts(run, batch, 0.1)
    assert_close(gradients(run), want, 1e-11)
    assert torch.equal(torch.get_rng_state(), after)  # what follows does not draw them again


def test_batchnorm_takes_the_statistics_of_a_part_and_moves_once() -> None:
    run, batch = run_and_batch(changed(model={"norm": "batch"}))
    before, model = state_of(run.loss), state_of(run.model)
    seen: list[Tensor] = []
    first: Any = run.model.encoder
    hook = first.conv.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    by_parts_with_graph(run, batch, 0.1)
    hook.remove()
    want = gradients(run)
    restored(run, before)
    run.model.load_state_dict(model)
    step._backward_in_parts(run, batch, 0.1)
    assert_close(gradients(run), want, 1e-11)
    norm = first.bn
    mean = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    variance = torch.stack([part.var((0, 2, 3)) for part in seen]).mean(0)
    assert torch.allclose(norm.running_mean, 0.1 * mean, rtol=1e-12)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * variance, rtol=1e-12)
    assert int(norm.num_batches_tracked) == 1 and norm.momentum == 0.1 and norm.track_running_stats
    assert len(seen) == run.passes == 6


def test_frozen_batchnorm_stays() -> None:
    run, batch = run_and_batch(changed(model={"norm": "batch"}))
    for module in run.model.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = state_of(run.model.encoder)
    step._backward_in_parts(run, batch, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in state_of(run.model.encoder).items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_and_a_scaled_loss(precision: str) -> None:
    config = changed(train={"precision": precision})
    run, batch = run_and_batch(config, torch.float32)
    if precision == "fp16":
        assert run.scaler.is_enabled()
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)  # with which fp16 holds every gradient here
    before = state_of(run.loss)
    step._backward(run, batch, 0.1)
    want = gradients(run)
    restored(run, before)
    step._backward_in_parts(run, batch, 0.1)
    # Both round features and gradients to 16 bits, and sum weights' gradients in another order.
    assert_close(gradients(run), want, {"bf16": 2.0**-5, "fp16": 2.0**-8}[precision])


def test_an_overflow_in_fp16_skips_the_step() -> None:
    run, batch = run_and_batch(changed(train={"precision": "fp16"}), torch.float32)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = state_of(run.model)
    step.train_step(run, batch, progress=0.1)
    assert all(torch.equal(value, before[name]) for name, value in state_of(run.model).items())
    assert run.scaler.get_scale() == 2.0**119


def test_the_graph_is_that_of_a_part() -> None:
    """Bytes that autograd keeps for the backward of the encoder: at most those of a part at any time."""

    def most_kept(config: Config) -> int:
        run, batch = run_and_batch(config, torch.float32)
        kept, most = 0, 0

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal kept, most
                self.tensor = tensor
                kept += tensor.nbytes
                most = max(most, kept)

            def __del__(self) -> None:
                nonlocal kept
                kept -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            step.train_step(run, batch, progress=0.1)
        return most

    assert most_kept(PLAIN) < 0.3 * most_kept(changed(train={"micro_batch": None}))


@pytest.mark.parametrize(("size", "sampler", "want"), [(8, "uniform", 6), (8, "reversed", 12), (3, "reversed", 45)])
def test_no_part_has_more_images_than_asked(size: int, sampler: str, want: int) -> None:
    run, batch = run_and_batch(changed(data={"rebalance_sampler": sampler}, train={"micro_batch": size}))
    most = max(len(rows) // 2 for rows in batch.parts(run.passes))  # of two views
    assert run.passes == want and most <= size


def test_parts_hold_every_row_once_and_all_views_of_an_image() -> None:
    labels = torch.arange(3 * 10)
    for number in (1, 2, 3, 4):
        parts = Batch(labels, labels, 6, 4).parts(number)
        assert len(parts) == number and torch.cat(parts).sort().values.equal(labels)
        for rows in parts:
            by_view = rows.view(3, -1)
            assert by_view.remainder(10).equal(by_view[:1].remainder(10).expand_as(by_view))
            assert 0 < int((by_view[0] < 6).sum()) <= -(-6 // number) and int((by_view[0] >= 6).sum()) > 0


def test_the_command(tmp_path: Path) -> None:
    words = ["--train.micro_batch", "16", "--train.epochs", "1", "--out", str(tmp_path / "run")]
    status, errors = command(*words)
    assert (status, errors) == (0, "")
    status, errors = command("--train.micro_batch", "65", "--out", str(tmp_path / "other"))
    assert status == 2 and "train.micro_batch must be in [1, 64]; got 65" in one_line(errors)
    status, errors = command("--model.name", "timm:convnext_atto", "--model.norm", "group")
    assert status == 2 and "has no BatchNorm2d" in one_line(errors)


@pytest.mark.parametrize("mode", ["head", "adapter"])
def test_a_frozen_encoder(mode: str) -> None:
    """Its features have no graph, or only one up to what was added; and of what is frozen, nothing has a gradient."""
    model = {"name": "timm:test_vit", "norm": "batch", "tune": mode}
    config = changed(model=model, train={"batch_size": 6, "micro_batch": 2})
    labels = torch.arange(6).remainder(3)
    pixels = torch.randint(0, 256, (6, 3, 160, 160), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    half = (0.5, 0.5, 0.5)
    images = ImageSet(labels=labels, num_classes=3, mean=half, std=half, images=pixels)
    run = Run(dataclasses.replace(config, data=DataConfig(imbalance="none", augmentation="none")), (images, images))
    for module in (run.model, run.loss):
        module.double()
    batch = next(run.loader.epoch(0))
    batch = batch._replace(images=batch.images.double())
    before = state_of(run.loss)
    step._backward(run, batch, 0.1)
    want = gradients(run)
    restored(run, before)
    calls: list[bool] = []
    run.model.encoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    step._backward_in_parts(run, batch, 0.1)
    assert_close(gradients(run), want, 1e-11)
    assert any(name.startswith("encoder.") for name in want) == (mode == "adapter")
    assert calls == [False] * 3 + ([True] * 3 if mode == "adapter" else [])
