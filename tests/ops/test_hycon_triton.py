"""The op allnc::hycon_fused against float64 autograd of the formula as written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allnc.ops.hycon_triton import MAX_DIM, fuses, hycon_fused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allnc.ops.hycon import hycon_reference, uses_constant_shift
from tests.tolerances import assert_as_exact

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")  # log2(0) is meant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused(z: Tensor, labels: Tensor, means: Tensor | None = None, **options: Any) -> Tensor:
    return hycon_fused(z, labels, means, shifted=uses_constant_shift(options.get("temperature", 0.1)), **options)


def make_case(n: int, d: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.randint(0, c, (n,), generator=generator)
    means = torch.randn(c, d, generator=generator)
    return {"z": z.to(DEVICE, dtype), "labels": labels.to(DEVICE), "means": means.to(DEVICE, dtype)}


def value_and_gradients(loss_of, case: dict[str, Any], dtype: torch.dtype | None = None, **options: Any):
    """The loss and the gradients of its sum with respect to z, means and a temperature that is a tensor."""
    given_ = {**case, "temperature": options.get("temperature")}
    leaves = {
        name: value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
        for name, value in given_.items()
        if isinstance(value, Tensor) and name != "labels"
    }
    if "temperature" in leaves:
        options = {**options, "temperature": leaves["temperature"]}
    loss = loss_of(leaves["z"], case["labels"], leaves.get("means"), **options)
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def check(case: dict[str, Any], **options: Any) -> None:
    want, want_grads = value_and_gradients(hycon_reference, case, torch.float64, **options)
    eager, eager_grads = value_and_gradients(hycon_reference, case, **options)
    got, grads = value_and_gradients(fused, case, **options)
    scale = 1 / float(options.get("temperature", 0.1))
    dtype = case["z"].dtype
    assert_as_exact(got, eager, want, scale=scale, dtype=dtype)
    for name, grad in grads.items():
        assert grad.dtype == eager_grads[name].dtype
        size = max(1.0, float(want_grads[name].abs().max()))
        assert_as_exact(grad, eager_grads[name], want_grads[name], scale=scale * size, dtype=dtype)


def test_hand_computed_case() -> None:
    # Two activations of class 0 at e1 and e2, one of class 1 at -e1; means e1 and e2; τ = 1; a = 1/3, 1/3, 1/2 and
    # b = 1/3, 1/2.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], device=DEVICE)
    labels = torch.tensor([0, 0, 1], device=DEVICE)
    means = torch.tensor([[2.0, 0.0], [0.0, 5.0]], device=DEVICE)
    e = math.exp
    lse = [
        math.log(e(0) / 3 + e(-1) / 2 + e(1) / 3 + e(0) / 2),
        math.log(e(0) / 3 + e(0) / 2 + e(0) / 3 + e(1) / 2),
        math.log(e(-1) / 3 + e(0) / 3 + e(-1) / 3 + e(0) / 2),
    ]
    want = (lse[0] - 0.5 + lse[1] + lse[2]) / 3
    assert float(fused(z, labels, means, temperature=1.0)) == pytest.approx(want, abs=1e-6)
    # κ = 0: the single activation of class 1 has no positive and is left out.
    got = fused(z, labels, means, temperature=1.0, mean_weight=0.0)
    assert float(got) == pytest.approx((lse[0] + lse[1]) / 2, abs=1e-6)


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 50),
    d=st.integers(1, 40),
    c=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    distribution=st.sampled_from(["random", "one class", "all distinct", "few of many"]),
    ignored=st.sampled_from([0.0, 0.2, 1.0]),
    temperature=st.sampled_from([1.0, 0.1, 0.02, 0.005]),
    balance=st.sampled_from(["class", "none"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    use=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    mean_weight=st.sampled_from([0.0, 1.0, 2.5]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(
    n, d, c, dtype, distribution, ignored, temperature, balance, reduction, use, mean_weight, seed
) -> None:
    use_means, use_seen, use_weights, learned = use
    c = max(n, c) if distribution in ("all distinct", "few of many") else c
    case: dict[str, Any] = make_case(n, d, c, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    if distribution == "one class":
        case["labels"].fill_(c - 1)
    elif distribution == "all distinct":
        case["labels"] = torch.randperm(n, generator=generator).to(DEVICE)
    elif distribution == "few of many":
        case["labels"].remainder_(3).clamp_(max=c - 1)
    case["labels"][(torch.rand(n, generator=generator) < ignored).to(DEVICE)] = -100
    options: dict[str, Any] = {"balance": balance, "reduction": reduction, "mean_weight": mean_weight}
    options["temperature"] = torch.tensor(temperature, device=DEVICE) if learned else temperature
    if not use_means:
        case.pop("means")
    elif use_seen:
        options["seen"] = (torch.rand(c, generator=generator) < 0.6).to(DEVICE)
    if use_weights:
        options["anchor_weight"] = torch.rand(n, generator=generator).to(DEVICE)
    check(case, **options)


def test_ignore_index_may_be_a_class() -> None:
    check(make_case(40, 12, 5), ignore_index=2)


def test_nothing_to_contrast_is_zero_not_nan() -> None:
    for labels in (torch.tensor([3]), torch.arange(4), torch.full((4,), -100)):
        z = F.normalize(torch.randn(len(labels), 8), dim=1).to(DEVICE).requires_grad_()
        loss = fused(z, labels.to(DEVICE))
        loss.backward()
        assert loss.item() == 0.0 and z.grad is not None and not z.grad.any()


def test_non_contiguous_inputs() -> None:
    case = make_case(16, 8, 5)
    strided = {"z": case["z"].T.contiguous().T, "labels": case["labels"].repeat_interleave(2)[::2]}
    strided["means"] = torch.cat([case["means"], case["means"]], 1)[:, :8]
    assert not any(x.is_contiguous() for x in strided.values())
    want, want_grads = value_and_gradients(fused, case, reduction="none")
    got, grads = value_and_gradients(fused, strided, reduction="none")
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(grads, want_grads, rtol=0, atol=0)


def test_means_of_another_type_and_no_gradient_for_them() -> None:
    case = make_case(30, 16, 5, torch.bfloat16)
    case["means"] = case["means"].float()
    z = case["z"].clone().requires_grad_()
    fused(z, case["labels"], case["means"]).backward()
    _, grads = value_and_gradients(fused, case)
    assert grads["means"].dtype == torch.float32
    torch.testing.assert_close(z.grad, grads["z"], rtol=0, atol=0)
    check(case)


def test_gradients_are_asked_for_twice() -> None:
    case = make_case(30, 16, 5)
    z = case["z"].clone().requires_grad_()
    for reduction in ("mean", "none"):
        loss = fused(z, case["labels"], case["means"], reduction=reduction).sum()
        first = torch.autograd.grad(loss, z, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(2 * loss, z)[0], 2 * first)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU a wrong label stops the program")
def test_a_label_out_of_range_is_reported() -> None:
    case = make_case(20, 8, 5)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\).*got 5"):
        fused(case["z"], torch.full((20,), 5), case["means"])


def test_what_is_fused() -> None:
    z, weight = torch.zeros(3, MAX_DIM), torch.ones(3)
    assert fuses(z, None) and fuses(z, weight)
    assert not fuses(torch.zeros(3, MAX_DIM + 1), None) and not fuses(z, weight.requires_grad_())


@pytest.mark.parametrize("with_means", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(with_means: bool, reduction: str) -> None:
    case = make_case(10, 6, 3)
    z, means = case["z"].requires_grad_(), case["means"].requires_grad_() if with_means else None
    tau = torch.tensor(0.1, requires_grad=True, device=DEVICE)
    weight = torch.rand(10, device=DEVICE)
    for variable in (
        (None, None, 0.1, 1.0, "class", reduction, -100, True),
        (weight, tau, 0.0, 1.0, "none", reduction, 2, False),
    ):
        arguments = (z, case["labels"], means, None, *variable, True)  # deterministic: results are compared
        torch.library.opcheck(torch.ops.allnc.hycon_fused.default, arguments)


@pytest.mark.parametrize("learned", [True, False])
def test_compiles_without_a_graph_break(learned: bool) -> None:
    case = make_case(37, 19, 5)
    tau = torch.tensor(0.2, device=DEVICE, requires_grad=True) if learned else 0.2

    def loss(z: Tensor, means: Tensor) -> Tensor:
        return fused(F.normalize(z, dim=1), case["labels"], means, temperature=tau)

    leaves = [case["z"].clone().requires_grad_(), case["means"].clone().requires_grad_()]
    want = loss(*leaves)
    want_grads = torch.autograd.grad(want, leaves)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), want_grads)
