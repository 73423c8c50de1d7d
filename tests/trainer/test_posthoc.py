"""What is done to a trained classifier before it predicts: by hand, in evaluation mode alone, saved and resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from allnc.config import ModelConfig
from allnc.models import build_model
from allnc.trainer import loop
from allnc.trainer.checkpoint import load_weights
from allnc.trainer.command import parse
from allnc.trainer.run import Run
from tests.trainer.test_training import TINY, changed, no_plots, quiet, stop_after

__all__ = ["no_plots"]  # a fixture for every test
COUNTS = torch.tensor([6, 3, 1])
FEATURES = torch.tensor([[3.0, 4.0], [1.0, -1.0]])


def model_of(**settings: Any) -> Any:
    config = ModelConfig(name="linear", **settings)
    model = build_model(config, in_channels=2, num_classes=3, class_counts=COUNTS)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]))
        if model.classifier.bias is not None:
            model.classifier.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    return model


def test_logit_adjustment_by_hand() -> None:
    model = model_of(posthoc="logit_adjusted", posthoc_tau=0.5)
    trained = torch.tensor([[25.5, 8.0, -0.5], [-0.5, -2.0, -0.5]])
    shift = torch.tensor([0.5 * math.log(share) for share in (0.6, 0.3, 0.1)])
    torch.testing.assert_close(model.heads(FEATURES).logits_rebalance, trained)
    torch.testing.assert_close(model.eval().heads(FEATURES).logits_rebalance, trained - shift)
    assert model.predicting_vectors is model.classifier_weight


def test_a_normalised_classifier_is_adjusted_too() -> None:
    model = model_of(posthoc="logit_adjusted", classifier="normalised", classifier_scale=10.0)
    trained = model.heads(FEATURES).logits_rebalance
    shift = torch.tensor([math.log(share) for share in (0.6, 0.3, 0.1)])
    torch.testing.assert_close(model.eval().heads(FEATURES).logits_rebalance, trained - shift)


@pytest.mark.parametrize("tau, lengths", [(1.0, (5.0, 2.0)), (0.5, (math.sqrt(5), math.sqrt(2)))])
def test_tau_normalisation_by_hand(tau: float, lengths: tuple[float, float]) -> None:
    """Vectors (3, 4) and (0, 2) over their lengths to the power tau; one of zero stays zero; no bias."""
    model = model_of(posthoc="tau_normalised", posthoc_tau=tau)
    assert model.heads(FEATURES).logits_rebalance[0].tolist() == [25.5, 8.0, -0.5]
    want = torch.tensor([[25.0, 8.0, 0.0], [-1.0, -2.0, 0.0]]) / torch.tensor([*lengths, 1.0])
    torch.testing.assert_close(model.eval().heads(FEATURES).logits_rebalance, want)
    vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]) / torch.tensor([[lengths[0]], [lengths[1]], [1.0]])
    torch.testing.assert_close(model.predicting_vectors, vectors)


@pytest.mark.parametrize("kind", ["logit_adjusted", "tau_normalised"])
def test_the_same_weights_are_trained_and_saved(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted and resumed, it trains what is trained without it; the saved weights predict as measured."""
    plain = changed(TINY, loss={"name": "ce"}, train={"epochs": 2})
    without = loop.train(plain, tmp_path / "without", quiet())
    config = changed(plain, model={"posthoc": kind})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        loop.train(config, tmp_path / "with", quiet())
    summary = loop.train(config, tmp_path / "with", quiet(), mode="resume")
    (_, _, wanted), (saved, epoch, weights) = load_weights(tmp_path / "without"), load_weights(tmp_path / "with")
    added = {"posthoc.log_prior"} if kind == "logit_adjusted" else set()
    assert {*weights} - {*wanted} == added
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())
    assert summary["accuracy"] != without["accuracy"]

    run = Run(saved)
    run.load_model(weights, epoch)
    measured, _ = run.measure()
    assert measured == {name: summary[name] for name in measured}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.posthoc_tau", "0.5"], "--model.posthoc_tau would be ignored: model.posthoc is none"),
        (["--model.posthoc", "logit_adjusted", "--model.posthoc_tau", "0"], "model.posthoc_tau must be > 0; got 0"),
        (["--model.posthoc", "tau_normalised"], "needs model.classifier linear; got normalised, whose class vectors"),
    ],
)
def test_what_would_change_nothing_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(words)
    assert message in str(caught.value)
