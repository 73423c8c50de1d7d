"""SupCon, BCL and ProCo: their sums written out, rows left out, absent classes, and their state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allnc.config import LossConfig
from allnc.losses import Contrastive, CrossEntropy, LogitAdjusted
from allnc.losses.build import LOSSES
from tests.tolerances import assert_near

COUNTS = [40, 20, 10, 5]
C, WIDTH, DIM = len(COUNTS), 6, 5
LABELS = torch.tensor([0, 0, 1, 2, -100, 0, 0, 1, 2, -100])  # two views of five images, one of them left out
NAMES = ("supcon", "bcl", "proco")


class _Rows:
    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.z = F.normalize(random(len(LABELS), DIM), dim=1).requires_grad_()
        self.prototypes = F.normalize(random(C, DIM), dim=1).requires_grad_()
        self.logits = random(len(LABELS), C).requires_grad_()

    def call(self, loss: Contrastive, labels: Tensor = LABELS, **changes: Any):
        features, weight, branch = torch.zeros(len(labels), WIDTH), torch.zeros(C, WIDTH), (self.logits, labels)
        heads = {"z": self.z, "prototypes": self.prototypes, **changes}
        return loss(features, labels, weight, branch, branch, 0.5, **heads)


def build(name: str, **options: Any) -> Contrastive:
    config = LossConfig(name=name, **options)  # pyright: ignore[reportArgumentType]
    return Contrastive(COUNTS, DIM, config).double()


def _supcon(z: Tensor, temperature: float) -> float:
    """Khosla et al., equation 2 (the sum over positives outside of the logarithm)."""
    used = [i for i in range(len(z)) if LABELS[i] >= 0]
    total = 0.0
    for i in used:
        others = [j for j in used if j != i]
        denominator = sum(math.exp(float(z[i] @ z[j]) / temperature) for j in others)
        positives = [j for j in others if LABELS[j] == LABELS[i]]
        logs = [float(z[i] @ z[p]) / temperature - math.log(denominator) for p in positives]
        total -= sum(logs) / len(positives)
    return total / len(used)


def _bcl(z: Tensor, prototypes: Tensor, temperature: float) -> float:
    """Zhu et al., equation 6: each class in the denominator divided by its members that the anchor meets."""
    used = [i for i in range(len(z)) if LABELS[i] >= 0]
    total = 0.0
    for i in used:
        denominator = 0.0
        for c in range(C):
            members = [z[j] for j in used if j != i and LABELS[j] == c] + [prototypes[c]]
            denominator += sum(math.exp(float(z[i] @ k) / temperature) for k in members) / len(members)
            if c == LABELS[i]:
                positives = [float(z[i] @ k) / temperature for k in members]
        total += math.log(denominator) - sum(positives) / len(positives)
    return total / len(used)


def test_supcon_by_hand() -> None:
    rows = _Rows()
    output = rows.call(build("supcon", hycon_weight=0.7, temperature=0.3))
    want = _supcon(rows.z.detach(), 0.3)
    assert math.isclose(output.parts["contrast"].item(), want, rel_tol=1e-12)
    cls = CrossEntropy(C)(rows.logits, LABELS)
    assert math.isclose(output.total.item(), cls.item() + 0.7 * want, rel_tol=1e-12)


def test_balanced_contrast_by_hand() -> None:
    """Class 3 has no activation in the batch and is there by its prototype."""
    rows = _Rows()
    output = rows.call(build("bcl", hycon_weight=0.3, temperature=0.2, tau=1.5))
    want = _bcl(rows.z.detach(), rows.prototypes.detach(), 0.2)
    assert math.isclose(output.parts["contrast"].item(), want, rel_tol=1e-12)
    cls = LogitAdjusted(COUNTS, tau=1.5).double()(rows.logits, LABELS)
    assert math.isclose(output.total.item(), cls.item() + 0.3 * want, rel_tol=1e-6)


def test_probabilistic_contrast_in_three_dimensions() -> None:
    """There the density is κ / (4π sinh κ): log E exp(z·z'/τ) = log( κ sinh κ' / (κ' sinh κ) ). Class 3 is not seen."""
    generator = torch.Generator().manual_seed(3)
    z = F.normalize(torch.randn(len(LABELS), 3, generator=generator, dtype=torch.float64), dim=1)
    loss = Contrastive(COUNTS, 3, LossConfig(name="proco", temperature=0.5)).double()
    rows = _Rows()
    got = rows.call(loss, z=z).parts["contrast"].item()

    logits = torch.full((len(LABELS), C), -torch.inf, dtype=torch.float64)
    for c in range(3):
        mean = z[c == LABELS].mean(0)
        length = float(mean.norm())
        kappa = length * (3 - length**2) / (1 - length**2)
        moved = (kappa * mean / length + z / 0.5).norm(dim=1)
        logits[:, c] = (kappa * moved.sinh() / (moved * math.sinh(kappa))).log()
    prior = torch.tensor(COUNTS).double().div(sum(COUNTS)).log()
    want = F.cross_entropy(logits + prior, LABELS, ignore_index=-100)
    assert math.isclose(got, want.item(), rel_tol=1e-6)  # the prior is held in float32


def test_probabilistic_contrast_keeps_running_means() -> None:
    loss = build("proco", ema_momentum=0.8)
    first, second = _Rows(), _Rows(seed=1)
    first.call(loss)
    second.call(loss)
    contrast: Any = loss.contrast
    means = [rows.z.detach()[LABELS == 0].mean(0) for rows in (first, second)]
    assert_near(contrast.means[0], 0.8 * means[0] + 0.2 * means[1])
    assert contrast.seen.tolist() == [True, True, True, False]
    state = contrast.means.clone()
    loss.eval()
    output = first.call(loss, torch.full_like(LABELS, 3))  # not seen yet: nothing to compare with
    assert torch.equal(contrast.means, state) and output.parts["contrast"].item() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [LABELS, torch.full_like(LABELS, -100), torch.full_like(LABELS, 2)])
def test_gradients(name: str, labels: Tensor) -> None:
    """Against finite differences; rows that take no part have none, whatever they hold. ProCo's means are constants."""
    rows = _Rows()
    loss = build(name, temperature=0.4)
    rows.call(loss)
    loss.eval()

    def value(z: Tensor, prototypes: Tensor | None = rows.prototypes) -> Tensor:
        return rows.call(loss, labels, z=z, prototypes=prototypes).total

    inputs = (rows.z, rows.prototypes) if name == "bcl" else (rows.z,)
    assert torch.autograd.gradcheck(value, inputs, check_undefined_grad=False)
    broken = rows.z.detach().clone()
    broken[labels == -100] = torch.nan
    broken.requires_grad_()
    total = value(broken)
    (grad,) = torch.autograd.grad(total, broken)
    assert torch.equal(total, value(rows.z)) and not bool(grad[labels == -100].any())
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_classification_weighs_what_it_should(name: str, weight: float) -> None:
    """Of weight 0 its value is still told, and logits have a gradient, as wrapped networks need: zero."""
    rows, whole = _Rows(), _Rows().call(build(name))
    output = rows.call(build(name, classification_weight=weight))
    assert output.parts.keys() == whole.parts.keys()
    assert all(torch.equal(value, whole.parts[part]) for part, value in output.parts.items())
    assert_near(output.total, weight * output.parts["cls"] + output.parts["contrast"])
    (grad,) = torch.autograd.grad(output.total, rows.logits)
    assert bool(grad.any()) == (weight > 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_contrast_of_weight_zero_is_not_computed(name: str) -> None:
    config = LossConfig(name=name, hycon_weight=0.0)  # pyright: ignore[reportArgumentType]
    assert LOSSES[name].head(config) is None
    output = _Rows().call(Contrastive(COUNTS, None, config).double(), z=None, prototypes=None)
    assert set(output.parts) == {"cls", "uniform"} and output.total.isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bit_projections_are_contrasted_in_float32(name: str) -> None:
    rows, loss = _Rows(), build(name).float()
    z, prototypes = rows.z.detach().bfloat16(), rows.prototypes.detach().bfloat16()
    value = rows.call(loss, z=z, prototypes=prototypes).parts["contrast"]
    want = rows.call(build(name).float(), z=z.float(), prototypes=prototypes.float()).parts["contrast"]
    assert_near(value, want, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_errors_say_what_to_do(name: str) -> None:
    rows, loss = _Rows(), build(name)
    with pytest.raises(ValueError, match=r"z must be given; got None\. Give the model a projection head"):
        rows.call(loss, z=None)
    with pytest.raises(ValueError, match=rf"z must have shape \[N, {DIM}\]"):
        rows.call(loss, z=torch.zeros(len(LABELS), 3))
    with pytest.raises(ValueError, match="projection_dim must be given with loss.name " + name):
        Contrastive(COUNTS, None, loss.config)
    if name == "bcl":
        with pytest.raises(ValueError, match="prototypes must be given; got None"):
            rows.call(loss, prototypes=None)
