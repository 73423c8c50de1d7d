"""Mixup and remix: by hand, from streams of (seed, epoch), resumed, in parts, refused where they do not fit."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from allnc.data import Mixture, mixtures, remix_labels
from allnc.trainer import loop, step
from allnc.trainer.checkpoint import load_weights
from allnc.trainer.command import parse
from allnc.trainer.mixing import batches, mixed
from allnc.trainer.retrain import start_retraining
from allnc.trainer.run import Run
from tests.trainer.test_training import TINY, changed, no_plots, quiet, records, stop_after

__all__ = ["no_plots"]  # a fixture for every test
MIXED = changed(TINY, loss={"name": "ce"}, train={"mixup": 0.4, "epochs": 3})


def test_the_share_is_beta_s_and_steps_repeat() -> None:
    first, again, other = (list(islice(mixtures(0.5, 6, seed=1, epoch=e), 4000)) for e in (2, 2, 3))
    shares = torch.tensor([mixture.share for mixture in first])
    assert all(a.share == b.share and torch.equal(a.partners, b.partners) for a, b in zip(first, again, strict=True))
    assert shares.tolist() != [mixture.share for mixture in other]
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(0.125, abs=0.01)  # 1 / (4 (2 alpha + 1))
    assert all(sorted(mixture.partners.tolist()) == list(range(6)) for mixture in first)


@pytest.mark.parametrize(
    ("share", "own", "other"),
    [
        (0.4, [2, 2, 2, 0], [2, 0, 1, 1]),  # the larger part of (0, 2) is the rare 2's, that of (2, 0) the frequent 0's
        (0.6, [0, 2, 2, 0], [2, 2, 1, 1]),  # the other way round
        (0.5, [0, 2, 2, 0], [2, 0, 1, 1]),  # neither has a larger part
    ],
)
def test_remix_by_hand(share: float, own: list[int], other: list[int]) -> None:
    """Classes of 9, 4 and 3 images: 0 is three times as frequent as 2, and no other pair is."""
    pairs = torch.tensor([[0, 2], [2, 0], [2, 1], [0, 1]]).T
    got = remix_labels(pairs[0], pairs[1], share, torch.tensor([9, 4, 3]))
    assert [labels.tolist() for labels in got] == [own, other]


@pytest.mark.parametrize("remix", [False, True])
def test_a_step_by_hand(remix: bool) -> None:
    """Views mix with the same views of others, and the loss is the mixture of two."""
    run = Run(changed(MIXED, train={"remix": remix}))
    batch = next(run.loader.epoch(0))
    partners = torch.arange(64).roll(1)
    got = mixed(run, batch, Mixture(0.3, partners))
    views, labels = batch.images.unflatten(0, (2, 64)), batch.labels[:64]
    for view in range(2):
        want = 0.3 * views[view] + 0.7 * views[view].roll(1, 0)
        torch.testing.assert_close(got.images[64 * view : 64 * view + 64], want)
    own, other = labels, labels.roll(1)
    if remix:
        own, other = remix_labels(own, other, 0.3, run.counts)
        assert not torch.equal(own, labels)
    output = run.model(got.images)
    want = 0.3 * F.cross_entropy(output.logits_uniform, own.repeat(2))
    want = want + 0.7 * F.cross_entropy(output.logits_uniform, other.repeat(2))
    loss = step.loss_of(run, output, got, progress=0.0)
    assert loss.total.item() == pytest.approx(want.item(), rel=1e-5)
    assert loss.parts["uniform"].item() == pytest.approx(want.item(), rel=1e-5)


def test_resuming_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(MIXED, train={"remix": True, "micro_batch": 40})
    loop.train(config, tmp_path / "straight", quiet())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        loop.train(config, tmp_path / "parts", quiet())
    loop.train(config, tmp_path / "parts", quiet(), mode="resume")
    (_, _, ours), (_, _, theirs) = load_weights(tmp_path / "straight"), load_weights(tmp_path / "parts")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert records(tmp_path / "straight")[2]["loss"] == records(tmp_path / "parts")[2]["loss"]


def test_a_second_stage_has_plain_images() -> None:
    run = Run(changed(MIXED, train={"retrain_epochs": 1}))
    assert all(batch.other_labels is not None for batch in batches(run))
    start_retraining(run)
    assert all(batch.other_labels is None for batch in batches(run))


@pytest.mark.parametrize("hycon", ["softmax", "none"])
def test_a_loss_of_features_is_refused(hycon: Any) -> None:
    with pytest.raises(ValueError, match=r"train\.mixup needs a loss of logits and labels alone; got loss\.name allnc"):
        Run(changed(MIXED, loss={"name": "allnc", "hycon": hycon, "backend": "eager"}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.remix", "true"], "--train.remix would be ignored: train.mixup is 0"),
        (["--train.mixup", "-1"], "train.mixup must be >= 0; got -1"),
    ],
)
def test_mistakes_are_answered(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(words)
    assert message in str(caught.value)
