"""The loss modules: their state, their schedule, and AllNC as the sum that its formula says."""

from __future__ import annotations

import doctest
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from allnc.config import LossConfig
from allnc.losses import (
    GBBN,
    P2P,
    AllNC,
    Classification,
    Contrastive,
    CrossEntropy,
    Focal,
    HyCon,
    HyConCosine,
    LogitAdjusted,
    build_loss,
    class_weights,
)
from allnc.losses.build import LOSSES
from allnc.losses.longtail import LONG_TAIL
from allnc.ops.hycon import hycon_reference
from allnc.ops.hycon_cosine import hycon_cosine_reference
from allnc.ops.p2p import p2p_reference
from tests.tolerances import assert_near

C, WIDTH, DIM, ROWS = 5, 8, 6, 12
COUNTS = torch.tensor([50, 20, 10, 5, 0])


class _Batch:
    """Two views of six images in float64, with what a model would return for them."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.labels = torch.tensor([0, 0, 1, 2, 3, 0]).repeat(2)
        self.features = random(ROWS, WIDTH).requires_grad_()
        self.h = random(ROWS, WIDTH).requires_grad_()
        self.z = F.normalize(random(ROWS, DIM), dim=1).requires_grad_()
        self.weight = random(C, WIDTH).requires_grad_()
        self.uniform = (random(ROWS, C).requires_grad_(), self.labels)
        self.rebalance = (random(ROWS, C).requires_grad_(), self.labels)

    def call(self, loss: Callable[..., Any], progress: float = 0.1, **heads: Tensor):
        arguments = (self.features, self.labels, self.weight, self.uniform, self.rebalance, progress)
        return loss(*arguments, z=self.z, h=self.h, **heads)


def _class_means(rows: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([rows[labels == c].mean(0) if c in labels else rows[0] * 0 for c in range(C)])


@pytest.mark.parametrize(
    "module",
    [
        "allnc",
        "base",
        "build",
        "contrastive",
        "gbbn",
        "hycon",
        "longtail",
        "p2p",
        "prototype_contrast",
        "regression",
        "vmf",
    ],
)
def test_docstring_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"allnc.losses.{module}"))
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("gamma", "horizon", "progress", "want"),
    [
        (2.0, 1.0, 0.0, 1.0),
        (2.0, 1.0, 0.5, 0.75),
        (1.0, 1.0, 0.25, 0.75),
        (2.0, 1.0, 1.0, 0.0),
        (2.0, 0.3, 0.15, 0.75),
        (2.0, 0.3, 0.3, 0.0),
        (2.0, 0.3, 0.9, 0.0),
        (2.0, 0.0, 0.0, 0.0),
        (8.0, 1.0, 0.5, 1 - 1 / 256),
    ],
)
def test_eta(gamma: float, horizon: float, progress: float, want: float) -> None:
    loss = GBBN(COUNTS, gamma=gamma, horizon=horizon)
    assert math.isclose(loss.eta(progress), want, abs_tol=1e-15)


def test_gbbn_mixes_its_branches() -> None:
    batch = _Batch()
    (logits_u, y), (logits_r, _) = batch.uniform, batch.rebalance
    output = GBBN(COUNTS, rebalance="focal")(logits_u, y, logits_r, y, 0.5)
    uniform, rebalance = F.cross_entropy(logits_u, y), Focal(C)(logits_r, y)
    assert_near(output.total, 0.75 * uniform + 0.25 * rebalance)
    assert_near(output.parts["uniform"], uniform)
    assert_near(output.parts["rebalance"], rebalance)
    assert output.parts["eta"].item() == 0.75
    assert not any(part.requires_grad for part in output.parts.values())


def test_gbbn_of_shared_logits() -> None:
    """Logits of one classifier, which are widened once, give what two of the same give."""
    y = _Batch().uniform[1]
    shared = torch.randn(len(y), C).bfloat16().requires_grad_()
    apart = [shared.detach().clone().requires_grad_() for _ in range(2)]
    got, want = GBBN(COUNTS)(shared, y, shared, y, 0.5), GBBN(COUNTS)(apart[0], y, apart[1], y, 0.5)
    assert torch.equal(got.total, want.total) and got.total.dtype == torch.float32
    got.total.backward()
    want.total.backward()
    assert shared.grad is not None and apart[0].grad is not None and apart[1].grad is not None
    gradient = apart[0].grad.float() + apart[1].grad.float()
    # One sum is rounded to bfloat16 here, two terms before their sum there.
    assert (shared.grad.float() - gradient).abs().max() <= 2.0**-7 * gradient.abs().max()


def test_a_finished_branch_cannot_break_the_other() -> None:
    """At η = 0 the uniform branch is only logged: an infinite logit there must not reach the total."""
    batch = _Batch()
    logits_u = torch.full((ROWS, C), -torch.inf, dtype=torch.float64).requires_grad_()
    logits_r, y = batch.rebalance
    output = GBBN(COUNTS, horizon=0.5)(logits_u, y, logits_r, y, 0.6)
    output.total.backward()
    assert math.isfinite(output.total.item()) and logits_u.grad is None


@pytest.mark.parametrize("form", ["softmax", "cosine", "none"])
@pytest.mark.parametrize("progress", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("centre", [True, False])
def test_allnc_is_its_formula(form: str, progress: float, centre: bool) -> None:
    """Value and gradients against the parts' references on a first batch, whose means are batch means."""
    options: dict[str, Any] = {"alpha": 0.7, "hycon_weight": 1.3, "horizon": 0.3, "mean_gradient": "exact"}
    options |= {"hycon": form, "p2p_means": 0.5, "p2p_weights": 0.9, "p2p_duality": 1.1, "p2p_centre": centre}
    loss = AllNC(COUNTS, WIDTH, DIM, LossConfig(**options)).double()
    batch = _Batch()
    output = batch.call(loss, progress)

    eta = 1 - min(1.0, progress / 0.3) ** 2
    seen = torch.tensor([True, True, True, True, False])
    means = _class_means(batch.features, batch.labels)
    p2p: dict[str, Any] = {"seen": seen, "target": "softmax", "temperature": 0.1}
    ww = p2p_reference(batch.weight, **p2p, centre=centre)
    duality = p2p_reference(means, batch.weight, **p2p, centre=(True, centre))
    on_means = 0.5 * p2p_reference(means, **p2p) + 1.1 * duality
    if form == "softmax":
        z_means = _class_means(batch.z, batch.labels)
        on_means = on_means + 1.3 * hycon_reference(batch.z, batch.labels, z_means, seen=seen)
    elif form == "cosine":
        on_means = on_means + 1.3 * hycon_cosine_reference(batch.h, batch.features, batch.labels, means.detach())
    rebalanced = LogitAdjusted(COUNTS)(*batch.rebalance) + 0.9 * ww
    want = eta * F.cross_entropy(*batch.uniform) + (1 - eta) * rebalanced + 0.7 * on_means

    assert_near(output.total, want, dtype=torch.float32)  # LogitAdjusted holds its priors in float32
    leaves = [batch.features, batch.weight, batch.h, batch.z, batch.uniform[0], batch.rebalance[0]]
    got_grads = torch.autograd.grad(output.total, leaves, materialize_grads=True)
    want_grads = torch.autograd.grad(want, leaves, materialize_grads=True)
    for got, expected in zip(got_grads, want_grads, strict=True):
        assert_near(got, expected, dtype=torch.float32)
    expected_parts = {"cls", "uniform", "rebalance", "eta", "p2p_means", "p2p_weights", "p2p_duality"}
    assert set(output.parts) == expected_parts | ({"hycon"} if form != "none" else set())


def test_means_move_in_training_only() -> None:
    loss, batch = HyCon(C, DIM).double(), _Batch()
    loss(batch.z, batch.labels)
    first = _class_means(batch.z, batch.labels).detach()
    assert_near(loss.means, first)
    assert loss.seen.tolist() == [True, True, True, True, False]
    other = _Batch(seed=1)
    loss(other.z, other.labels)
    assert_near(loss.means, 0.9 * first + 0.1 * _class_means(other.z, other.labels).detach())

    state = {name: value.clone() for name, value in loss.state_dict().items()}
    assert set(state) == {"means", "seen"}
    loss.eval()
    loss(batch.z, batch.labels)
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())
    fresh = HyCon(C, DIM).double().eval()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(batch.z, batch.labels), loss(batch.z, batch.labels))


@pytest.mark.parametrize("form", ["softmax", "cosine"])
def test_two_forwards_before_a_backward(form: str) -> None:
    """The state moves under the first graph; its gradient must be that of its own values."""
    batches = [_Batch(), _Batch(seed=1)]
    loss = AllNC(COUNTS, WIDTH, DIM, LossConfig(hycon=form)).double()  # pyright: ignore[reportArgumentType]
    outputs = [batch.call(loss) for batch in batches]
    grad = torch.autograd.grad(outputs[0].total, batches[0].features)[0]
    alone = AllNC(COUNTS, WIDTH, DIM, LossConfig(hycon=form)).double()  # pyright: ignore[reportArgumentType]
    want = torch.autograd.grad(batches[0].call(alone).total, batches[0].features)[0]
    assert_near(grad, want)


def test_first_batch_of_one_class_and_of_none() -> None:
    loss = AllNC(COUNTS, WIDTH, DIM).double()
    batch = _Batch()
    for label in (-100, 3):
        batch.labels = torch.full((ROWS,), label)
        output = batch.call(loss)
        grad = torch.autograd.grad(output.total, (batch.features, batch.z))
        assert math.isfinite(output.total.item()) and all(bool(g.isfinite().all()) for g in grad)
        assert output.parts["p2p_means"].item() == 0


def test_p2p_terms_and_their_weights() -> None:
    batch = _Batch()
    loss = P2P(C, WIDTH, means_weight=2.0, classifier_weight=0.0, duality_weight=0.5, centre_weights=False).double()
    terms = loss(batch.features, batch.labels, batch.weight)
    seen = torch.arange(C) < 4
    means = _class_means(batch.features, batch.labels)
    assert math.isclose(terms.means.item(), p2p_reference(means, seen=seen).item(), rel_tol=1e-9)
    duality = p2p_reference(means, batch.weight, seen=seen, centre=(True, False))
    assert math.isclose(terms.duality.item(), duality.item(), rel_tol=1e-9)
    assert terms.weights.item() == 0
    assert math.isclose(terms.total.item(), 2 * terms.means.item() + 0.5 * terms.duality.item(), rel_tol=1e-9)


def test_cosine_module_uses_the_class_means() -> None:
    batch = _Batch()
    value = HyConCosine(C, WIDTH).double()(batch.h, batch.features, batch.labels)
    means = _class_means(batch.features, batch.labels).detach()
    want = hycon_cosine_reference(batch.h, batch.features, batch.labels, means)
    assert math.isclose(value.item(), want.item(), rel_tol=1e-9)


@pytest.mark.parametrize("form", ["softmax", "cosine"])
def test_allnc_compiles_without_a_break(form: Any) -> None:
    eager, traced = (AllNC(COUNTS, WIDTH, DIM, LossConfig(hycon=form)).double() for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for seed, progress in enumerate((0.1, 0.2, 0.25, 0.9)):  # another value at every step
        batch = _Batch(seed)
        value, want = batch.call(compiled, progress).total, batch.call(eager, progress).total
        assert math.isclose(value.item(), want.item(), rel_tol=1e-9)
        got, expected = (torch.autograd.grad(v, batch.features)[0] for v in (value, want))
        assert_near(got, expected)
    assert traced.feature_means is not None and eager.feature_means is not None
    assert_near(traced.feature_means.means, eager.feature_means.means)


@pytest.mark.parametrize("name", LOSSES)
def test_every_configured_loss_has_one_signature(name: str) -> None:
    config = LossConfig(name=name)  # pyright: ignore[reportArgumentType]
    sizes: dict[str, Any] = {"feature_dim": WIDTH, "projection_dim": DIM, "classifier_scale": 16.0}
    loss = build_loss(config, class_counts=COUNTS, **sizes).double()
    batch = _Batch()
    heads = {"prototypes": torch.eye(C, DIM).double()} if LOSSES[name].head(config) == "prototypes" else {}
    output = batch.call(loss, 0.1, **heads)
    output.total.backward()
    assert output.total.shape == () and {"cls", "uniform"} <= set(output.parts)
    assert batch.uniform[0].grad is not None


def test_build_passes_every_setting() -> None:
    """No field of the configuration may be forgotten: each is set away from its default and found again."""
    config = LossConfig(
        hycon="softmax",
        hycon_weight=0.2,
        alpha=0.3,
        temperature=0.4,
        mean_weight=0.5,
        balance="none",
        ema_momentum=0.6,
        mean_gradient="exact",
        p2p_means=0.7,
        p2p_weights=0.8,
        p2p_duality=0.9,
        p2p_target="etf",
        p2p_temperature=1.1,
        rebalance="focal",
        focal_gamma=3.5,
        gamma=1.2,
        horizon=0.35,
        backend="eager",
    )
    loss = build_loss(config, class_counts=COUNTS, feature_dim=WIDTH, projection_dim=DIM)
    assert isinstance(loss, AllNC) and loss.config is config
    assert loss.feature_means is not None and loss.projection_means is not None
    for state in (loss.feature_means, loss.projection_means):
        assert (state.momentum, state.gradient, state.backend) == (0.6, "exact", "eager")
    assert isinstance(loss.gbbn.rebalance_loss, Focal) and loss.gbbn.rebalance_loss.gamma == 3.5
    assert (loss.gbbn.gamma, loss.gbbn.horizon) == (1.2, 0.35)
    assert loss.projection_means.means.shape == (C, DIM) and loss.feature_means.means.shape == (C, WIDTH)
    focal: Any = build_loss(LossConfig(name="focal", focal_gamma=3.0, drw=0.7), class_counts=COUNTS, feature_dim=1)
    assert focal.loss.gamma == 3.0 and focal.drw == 0.7


def test_build_passes_every_setting_of_the_classification_losses() -> None:
    def built(scale: float | None = 16.0, **options: Any) -> Any:
        return build_loss(LossConfig(**options), class_counts=COUNTS, feature_dim=1, classifier_scale=scale).loss

    prior = (COUNTS.clamp(min=1) / COUNTS.clamp(min=1).sum()).log()
    adjusted = built(name="logit_adjusted", tau=1.5, label_smoothing=0.2)
    assert_near(adjusted.log_prior, 1.5 * prior)
    assert adjusted.label_smoothing == 0.2 and built(name="ce", label_smoothing=0.3).label_smoothing == 0.3
    assert built(name="ldam").margin.max() == 8.0 and built(None, name="ldam").margin.max() == 0.5
    assert built(name="mse").own == 16.0 and built(None, name="mse").own == 15.0
    assert built(name="etf_dr").scale == 16.0
    assert built(name="nonl").only_negatives and not built(name="ntce").only_negatives
    with pytest.raises(ValueError, match=r"classifier_scale must be given with loss\.name etf_dr; got None"):
        built(None, name="etf_dr")


def test_the_rebalancing_branch_has_every_setting() -> None:
    def branch(**options: Any) -> Any:
        config = LossConfig(hycon="none", **options)
        return AllNC(COUNTS, WIDTH, config=config, classifier_scale=16.0).gbbn.rebalance_loss

    adjusted = branch(tau=0.5, label_smoothing=0.2)
    assert_near(adjusted.log_prior, 0.5 * LogitAdjusted(COUNTS).log_prior)
    assert adjusted.label_smoothing == 0.2 and branch(rebalance="ce", label_smoothing=0.1).label_smoothing == 0.1
    assert branch(rebalance="ldam").margin.max() == 8.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HyCon(1, 4), "num_classes must be >= 2; got 1"),
        (lambda: HyCon(3, 4.0), "dim must be an integer; got 4.0"),  # pyright: ignore[reportArgumentType]
        (lambda: HyCon(3, 4, momentum=1.0), r"momentum must be in \[0, 1\); got 1"),
        (lambda: HyCon(3, 4, temperature=0.0), "temperature must be > 0; got 0"),
        (lambda: HyCon(3, 4, balance="classes"), "balance must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: HyCon(3, 4, gradient="none"), "gradient must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: HyCon(3, 4, backend="gpu"), "backend must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: P2P(3, 4, duality_weight=-1), "duality_weight must be >= 0; got -1"),
        (lambda: GBBN([3, 4], gamma=0), "gamma must be > 0; got 0"),
        (lambda: GBBN([3, 4], horizon=1.5), r"horizon must be in \[0, 1\]; got 1.5"),
        (lambda: GBBN([3, 4], rebalance="mse"), "rebalance must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: GBBN([3, 4]).eta(1.01), r"progress must be in \[0, 1\]; got 1.01"),
        (lambda: AllNC([3, 4], 4), "projection_dim must be given with hycon='softmax'; got None"),
        (lambda: AllNC([3, 4], 4, 4, LossConfig(alpha=math.nan)), "loss.alpha must be >= 0; got nan"),
        (lambda: _call_without("softmax"), "z must be given with hycon='softmax'"),
        (lambda: _call_without("cosine"), "h must be given with hycon='cosine'"),
    ],
)
def test_errors_say_what_to_do(build, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def _call_without(form: str) -> None:
    batch = _Batch()
    loss = AllNC(COUNTS, WIDTH, DIM, LossConfig(hycon=form)).double()  # pyright: ignore[reportArgumentType]
    loss(batch.features, batch.labels, batch.weight, batch.uniform, batch.rebalance, 0.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AllNC(None, 4, 4), "class_counts must be the training images of each class"),  # pyright: ignore[reportArgumentType]
        (lambda: AllNC(3, 4, 4), r"class_counts must have shape \[C\] with C >= 2; got \[\]. It holds the training"),  # pyright: ignore[reportArgumentType]
        (lambda: AllNC([3, 4], 4, "4"), "projection_dim must be an integer; got '4'"),  # pyright: ignore[reportArgumentType]
        (lambda: AllNC([3, 4], 4, 4, {}), "config must be an allnc.config.LossConfig; got dict"),  # pyright: ignore[reportArgumentType]
        (lambda: AllNC([3, 4], 4, 4, LossConfig(name="ce")), "config.name must be allnc; got ce, which build_loss"),
        (lambda: AllNC([3, 4], 4, 4, classifier_scale=0.0), "classifier_scale must be > 0; got 0"),
        (lambda: Contrastive([3, 4], 4, LossConfig()), "config.name must be supcon or bcl or proco; got allnc"),
        (lambda: build_loss("ce", class_counts=COUNTS, feature_dim=4), "config must be an allnc.config.LossConfig"),  # pyright: ignore[reportArgumentType]
        (lambda: Classification(3), "loss must be a module called with"),  # pyright: ignore[reportArgumentType]
        (lambda: _call_with(uniform=torch.zeros(ROWS, C)), r"uniform must be a pair \(logits \[N, C\], labels \[N\]\)"),
        (lambda: _call_with(rebalance=(torch.zeros(2, C),) * 3), "rebalance must be a pair .* got 3 values"),
        (lambda: _call_with("ce", uniform=torch.zeros(ROWS, C)), "uniform must be a pair"),
        (lambda: HyCon(C, 4)(torch.zeros(ROWS, DIM), _Batch().labels), r"z must have shape \[N, 4\]; got \[12, 6\]"),
        (lambda: HyConCosine(C, 4)(torch.zeros(6, 4), torch.zeros(6, 5), _Batch().labels[:6]), "f must have shape"),
        (lambda: P2P(C, 4)(torch.zeros(ROWS, DIM), _Batch().labels, torch.zeros(C, 4)), "features must have shape"),
        (lambda: P2P(C, DIM)(torch.zeros(ROWS, DIM), _Batch().labels, torch.zeros(2, DIM)), "weight must have shape"),
        (lambda: CrossEntropy(C)(torch.zeros(ROWS, C), _Batch().labels, [1.0] * C), "class_weight must be a torch"),  # pyright: ignore[reportArgumentType]
        (lambda: Focal(C)(torch.zeros(ROWS, C), _Batch().labels, torch.ones(C - 1)), "class_weight must have shape"),
    ],
)
def test_errors_name_what_the_caller_gave(build, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def _call_with(name: Any = "allnc", **changed: Any) -> None:
    batch = _Batch()
    loss = build_loss(LossConfig(name=name), class_counts=COUNTS, feature_dim=WIDTH, projection_dim=DIM).double()
    branches = {"uniform": batch.uniform, "rebalance": batch.rebalance, **changed}
    loss(batch.features, batch.labels, batch.weight, **branches, progress=0.5, z=batch.z)


@pytest.mark.parametrize("compiled", [False, True])
def test_interleaved_views_are_refused(compiled: bool) -> None:
    """Rows 0 and 1 as the views of the first image: the cosine form would pair different classes."""
    torch._dynamo.reset()  # of the other tests' modules
    loss: Any = AllNC(COUNTS, WIDTH, config=LossConfig(hycon="cosine")).double()
    loss = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    batch = _Batch()
    interleaved = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 0, 0])
    with pytest.raises(ValueError, match=r"the 2 views of an image must .* stack all images of view 0"):
        loss(batch.features, interleaved, batch.weight, batch.uniform, batch.rebalance, 0.1, h=batch.h)


def test_five_compiled_steps_make_three_graphs_at_most() -> None:
    """The first step, then any progress, then the end of the uniform branch; never one graph for each value."""
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()
    loss = torch.compile(AllNC(COUNTS, WIDTH, DIM).double(), fullgraph=True, backend=count)
    for step in range(12):
        _Batch(step).call(loss, step / 12)
    assert count.frame_count <= 3


def test_weights_of_classes_by_name_and_by_size() -> None:
    names = ("cat", "dog", "lynx")
    assert class_weights("auto", [3, 1, 0], names).tolist() == pytest.approx([3 / 7, 9 / 7, 9 / 7])  # 0 counts as 1
    assert class_weights({"lynx": 3, "cat": 0}, [3, 1, 2], names).tolist() == [0.0, 1.0, 3.0]
    config = LossConfig(name="ce", class_weights={"lynx": 3.0})
    counts = torch.tensor([3, 1, 2])
    loss = build_loss(config, class_counts=counts, feature_dim=2, classes=names)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    branch = (logits, labels)
    total = loss(torch.zeros(6, 2), labels, torch.zeros(3, 2), branch, branch, 0.0).total
    assert_near(total, F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 1.0, 3.0])))
    unnamed = build_loss(LossConfig(name="ce", class_weights={2: 3.0}), class_counts=counts, feature_dim=2)  # pyright: ignore[reportArgumentType]
    assert_near(unnamed(torch.zeros(6, 2), labels, torch.zeros(3, 2), branch, branch, 0.0).total, total)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lynks": 3}, "class_weights must name classes of the training images; got 'lynks'; did you mean 'lynx'?"),
        ({"x": 3}, "got 'x': the classes are cat, lynx"),
        ({"lynx": -1}, "class_weights of 'lynx' must be >= 0; got -1"),
        ({"lynx": 0, "cat": 0}, "class_weights must be > 0 for one class at least; got zeros only"),
        ("balanced", "class_weights must be one of 'auto'; got 'balanced'"),
        ([1, 2], "class_weights must be auto or a weight for each name"),
    ],
)
def test_weights_that_fit_no_class(weights: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        class_weights(weights, [2, 1], ("cat", "lynx"))


@pytest.mark.parametrize(
    ("chosen", "given"), [("triton", "triton"), ("eager", "eager"), ("cpp", "cpp"), ("cuda", "auto")]
)
def test_an_op_is_given_the_chosen_backend_where_it_has_it(
    monkeypatch: pytest.MonkeyPatch, chosen: Any, given: str
) -> None:
    backends = []
    values = torch.zeros(3, requires_grad=True)
    monkeypatch.setattr("allnc.losses.p2p.p2p_pairings", lambda *_, backend, **__: backends.append(backend) or values)
    P2P(3, 4, backend=chosen).terms(torch.ones(3, 4), torch.ones(3, dtype=torch.bool), torch.ones(3, 4))
    assert backends == [given]


@pytest.mark.parametrize(
    "num_classes, pairings", [(WIDTH + 1, ["means", "weights", "duality"]), (WIDTH + 2, ["means"])]
)
def test_the_classifier_is_left_alone_where_no_simplex_is(num_classes: int, pairings: list[str]) -> None:
    counts = [4] * num_classes
    assert AllNC(counts, WIDTH, DIM).pairings == pairings
    asked = AllNC(counts, WIDTH, DIM, LossConfig(p2p_weights=0.5, p2p_duality=0.25))
    assert (asked.p2p_weights, asked.p2p_duality) == (0.5, 0.25) and len(asked.pairings) == 3


@pytest.mark.parametrize("form", ["softmax", "cosine", "none"])
def test_terms_of_weight_zero_are_not_computed(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    """Without P2P no class means of feature space are kept, unless the cosine form needs them, and no op is called."""
    off: dict[str, Any] = {"p2p_means": 0.0, "p2p_weights": 0.0, "p2p_duality": 0.0}
    loss = AllNC(COUNTS, WIDTH, DIM, LossConfig(hycon=form, **off)).double()
    assert (loss.feature_means is None) == (form != "cosine") and loss.pairings == []
    called = []
    # By module: the package's name is that of the function.
    all_around = importlib.import_module("allnc.ops.all_around")
    monkeypatch.setattr(all_around, "centred_units", lambda *_, **__: called.append("units"))
    monkeypatch.setattr("allnc.losses.allnc.p2p_pairings", lambda *_, **__: called.append("pairings"))
    output = _Batch().call(loss)
    assert called == [] and output.parts["p2p_means"] == 0 and output.total.isfinite()


@pytest.mark.parametrize("off", ["alpha", "hycon_weight"])
def test_a_contrast_of_weight_zero_is_not_computed(off: str) -> None:
    """It needs no projection either; the total is that of the configuration without HyCon."""
    config = replace(LossConfig(p2p_means=0.0, p2p_duality=0.0), **{off: 0.0})
    assert LOSSES["allnc"].head(config) is None
    loss, batch = AllNC(COUNTS, WIDTH, config=config).double(), _Batch()
    output = batch.call(loss)
    want = batch.call(AllNC(COUNTS, WIDTH, config=replace(config, hycon="none")).double())
    assert loss.projection_means is None and "hycon" not in output.parts
    assert torch.equal(output.total, want.total)


def test_the_registry_is_the_configuration() -> None:
    names = get_args(get_type_hints(LossConfig)["name"])
    assert set(names) == set(LOSSES)
    assert get_args(get_type_hints(LossConfig)["rebalance"]) == LONG_TAIL
