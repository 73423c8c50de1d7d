"""HyCon on every backend that runs here, against float64 autograd of the formula as written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allnc import _extension, hycon
from allnc.ops._common import Backend
from allnc.ops.hycon import hycon_reference
from tests.backends import needs_interpreter
from tests.tolerances import assert_as_exact

CPU_BACKENDS = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")),
    pytest.param("triton", marks=needs_interpreter),
]


def make_case(
    n: int = 37,
    d: int = 19,
    c: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)
    if labels is None:
        labels = torch.randint(0, c, (n,), generator=generator)
    means = torch.randn(c, d, generator=generator, dtype=torch.float64).to(dtype)
    return {"z": z, "labels": labels, "means": means}


def value_and_gradients(loss_of, case: dict[str, Any], dtype: torch.dtype | None = None, **options):
    """Loss and its gradients with respect to z and means (and τ when it is a tensor)."""
    leaves = {}
    for name in ("z", "means", "temperature"):
        value = case.get(name, options.get(name))
        if isinstance(value, Tensor):
            leaves[name] = value.detach().clone().to(dtype or value.dtype).requires_grad_()
    keywords = {**options, **{k: v for k, v in leaves.items() if k == "temperature"}}
    loss = loss_of(leaves["z"], case["labels"], leaves.get("means"), **keywords)
    loss.sum().backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def check_against_float64(case: dict[str, Any], backend: Backend, **options) -> None:
    want, want_grads = value_and_gradients(hycon_reference, case, torch.float64, **options)
    eager, eager_grads = value_and_gradients(hycon_reference, case, **options)
    got, grads = value_and_gradients(hycon, case, backend=backend, **options)
    tau = options.get("temperature", 0.1)
    scale = 1.0 / float(tau)  # logits, and so their rounding errors, grow as 1/τ
    # Triton multiplies in z's own type (class means are rounded to it), and so does C++ for bfloat16 where the
    # processor can; the others compute in float32.
    in_own_type = backend == "triton" or (backend == "cpp" and case["z"].dtype == torch.bfloat16)
    dtype = case["z"].dtype if in_own_type else None
    assert_as_exact(got, eager.to(got.dtype), want, scale=scale, dtype=dtype)
    for name, grad in grads.items():
        leaf = case.get(name, options.get(name))
        assert grad is not None and isinstance(leaf, Tensor) and grad.dtype == leaf.dtype
        assert_as_exact(grad, eager_grads[name], want_grads[name], scale=scale)


def supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon (Khosla 2020, L_out) as a plain double loop; anchors without positives are left out."""
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            denominator = torch.stack([z[i] @ z[j] / temperature for j in others]).logsumexp(0)
            losses.append(-torch.stack([z[i] @ z[j] / temperature - denominator for j in positives]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equals_supcon_without_means_and_balance(backend: Backend) -> None:
    case = make_case(n=12, c=4)
    z, labels = case["z"].double(), case["labels"]
    want = supcon(z, labels, 0.1)
    got = hycon(case["z"], labels, balance="none", backend=backend)
    assert float(got) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("loss_of", [hycon_reference, hycon])
def test_hand_computed_case(loss_of) -> None:
    # Two activations of class 0 at e1 and e2, one of class 1 at -e1; means e1 and e2; τ = 1.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    means = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    e = math.exp
    # class balance: a = 1/3, 1/3, 1/2 and b = 1/3, 1/2
    lse = [
        math.log(e(0) / 3 + e(-1) / 2 + e(1) / 3 + e(0) / 2),
        math.log(e(0) / 3 + e(0) / 2 + e(0) / 3 + e(1) / 2),
        math.log(e(-1) / 3 + e(0) / 3 + e(-1) / 3 + e(0) / 2),
    ]
    pos = [(0 + 1) / 2, (0 + 0) / 2, 0.0]
    want = sum(x - p for x, p in zip(lse, pos, strict=True)) / 3
    assert float(loss_of(z, labels, means, temperature=1.0)) == pytest.approx(want, abs=1e-14)
    # κ = 0: the single activation of class 1 has no positive and is left out.
    want = ((lse[0] - 0) + (lse[1] - 0)) / 2
    got = float(loss_of(z, labels, means, temperature=1.0, mean_weight=0.0))
    assert got == pytest.approx(want, abs=1e-14)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("balance", ["class", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend: Backend, balance: str, temperature: float, dtype: torch.dtype) -> None:
    check_against_float64(make_case(dtype=dtype), backend, balance=balance, temperature=temperature)


@pytest.mark.parametrize("backend", ["eager", *CPU_BACKENDS[1:2]])
def test_float64_is_exact(backend: Backend) -> None:
    check_against_float64(make_case(dtype=torch.float64), backend)
    check_against_float64(make_case(dtype=torch.float64), backend, temperature=0.01, balance="none")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "options", [{"mean_weight": 0.0}, {"mean_weight": 3.5}, {"reduction": "sum"}, {"reduction": "none"}]
)
def test_options(backend: Backend, options: dict[str, Any]) -> None:
    check_against_float64(make_case(), backend, **options)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_learnable_temperature(backend: Backend) -> None:
    check_against_float64(make_case(), backend, temperature=torch.tensor(0.2))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_anchor_weights_seen_and_ignored_rows(backend: Backend) -> None:
    case = make_case(n=23, c=6)
    case["labels"][::5] = -100
    seen = torch.tensor([True, False, True, True, False, True])
    weight = torch.rand(23)
    weight[3] = 0
    check_against_float64(case, backend, seen=seen, anchor_weight=weight)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "labels",
    [torch.zeros(9, dtype=torch.int64), torch.arange(9), torch.tensor([0, 0, 0, 0, 1, 7, 7, -100, -100])],
    ids=["one class", "all distinct", "absent and ignored"],
)
def test_label_distributions(backend: Backend, labels: Tensor) -> None:
    case = make_case(n=9, c=9, labels=labels)
    check_against_float64(case, backend)
    check_against_float64({"z": case["z"], "labels": labels}, backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ignored_rows_take_no_part(backend: Backend) -> None:
    case = make_case(n=20)
    padded = torch.cat([case["z"], F.normalize(torch.randn(7, 19), dim=1)])
    labels = torch.cat([case["labels"], torch.full((7,), -1)])
    want = hycon(case["z"], case["labels"], case["means"], backend=backend)
    got = hycon(padded, labels, case["means"], ignore_index=-1, backend=backend)
    assert float(got) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_ignored_row_nearer_than_all_others_does_not_overflow(backend: Backend) -> None:
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])  # row 2 is ignored, row 1 is opposite to row 0
    check_against_float64({"z": z, "labels": torch.tensor([0, 0, -100])}, backend, temperature=0.02)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nothing_to_contrast_is_zero_not_nan(backend: Backend) -> None:
    z = F.normalize(torch.randn(1, 8), dim=1).requires_grad_()
    loss = hycon(z, torch.tensor([3]), backend=backend)
    loss.backward()
    assert loss.item() == 0.0 and z.grad is not None and not z.grad.any()
    z = F.normalize(torch.randn(4, 8), dim=1).requires_grad_()
    loss = hycon(z, torch.arange(4), backend=backend)  # every anchor alone in its class
    loss.backward()
    assert loss.item() == 0.0 and z.grad is not None and not z.grad.any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_non_contiguous_inputs(backend: Backend) -> None:
    case = make_case(n=16, d=8)
    z = case["z"].T.contiguous().T
    means = torch.cat([case["means"], case["means"]], 1)[:, ::2]
    assert not z.is_contiguous() and not means.is_contiguous()
    got = hycon(z, case["labels"], means, backend=backend)
    want = hycon(z.contiguous(), case["labels"], means.contiguous(), backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_autocast_changes_nothing() -> None:
    case = make_case()
    want = hycon(**case, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = hycon(**case, backend="eager")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


LABELS = {
    "any": lambda n, c, generator: torch.randint(0, c, (n,), generator=generator),
    "one class": lambda n, c, generator: torch.full((n,), c - 1),
    "all distinct": lambda n, c, generator: torch.arange(n),
    "mostly one": lambda n, c, generator: torch.randint(-9, c, (n,), generator=generator).clamp(min=0),
    "all ignored": lambda n, c, generator: torch.full((n,), -100),
}


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 40),
    c=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    distribution=st.sampled_from(list(LABELS)),
    coldness=st.integers(0, 1000),  # temperatures from 1 to 0.005
    balance=st.sampled_from(["class", "none"]),
    use_means=st.booleans(),
    ignored=st.sampled_from([0.0, 0.1, 0.6]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_any_shape(backend, n, d, c, dtype, distribution, coldness, balance, use_means, ignored, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = LABELS[distribution](n, c, generator)
    labels = labels.where(torch.rand(n, generator=generator) >= ignored, -100)
    case = make_case(n, d, max(c, n) if distribution == "all distinct" else c, dtype=dtype, seed=seed, labels=labels)
    if not use_means:
        case["means"] = None
    check_against_float64(case, backend, temperature=0.005 ** (coldness / 1000), balance=balance)


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_gradcheck(backend: Backend) -> None:
    case = make_case(n=9, d=4, c=3, dtype=torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor, means: Tensor, temperature: Tensor) -> Tensor:
        return hycon(F.normalize(z, dim=1), case["labels"], means, temperature=temperature, backend=backend)

    assert torch.autograd.gradcheck(loss, (case["z"].requires_grad_(), case["means"].requires_grad_(), tau))


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
@pytest.mark.parametrize("with_means", [True, False])
def test_opcheck(backend: Backend, with_means: bool) -> None:
    z = F.normalize(torch.randn(10, 6), dim=1).requires_grad_()
    mu = F.normalize(torch.randn(3, 6), dim=1).requires_grad_() if with_means else None
    b = torch.ones(3) if with_means else None
    tau = torch.tensor(0.1, requires_grad=True)
    arguments = (z, mu, torch.ones(10), b, tau, True, False, backend)
    torch.library.opcheck(torch.ops.allnc.hycon_lse.default, arguments)
    torch.library.opcheck(torch.ops.allnc.validated_labels.default, (torch.arange(4), 4, -100))


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
@pytest.mark.parametrize("with_means", [True, False])
def test_compiles_without_a_graph_break(backend: Backend, with_means: bool) -> None:
    # aot_eager traces forward and backward without inductor's slow C++ build, which one case is enough for.
    compiler = "inductor" if with_means and backend == "eager" else "aot_eager"
    case = make_case()
    means = case["means"] if with_means else None

    def loss(z: Tensor) -> Tensor:
        return hycon(F.normalize(z, dim=1), case["labels"], means, backend=backend)

    z = case["z"].clone().requires_grad_()
    compiled_z = case["z"].clone().requires_grad_()
    want, got = loss(z), torch.compile(loss, fullgraph=True, backend=compiler)(compiled_z)
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled_z.grad, z.grad)


def test_wrong_arguments_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    z, labels, means = case["z"], case["labels"], case["means"]
    for arguments, options, message in [
        ((z, labels.int()), {}, r"labels must be int64; got torch.int32"),
        ((z, labels[:-1]), {}, r"labels must have shape \[37\]; got \[36\]"),
        ((z[0], labels), {}, r"z must have shape \[N, D\]; got \[19\]"),
        ((z[:0], labels[:0]), {}, r"at least one row"),
        ((z.int(), labels), {}, r"z must be float16.*got torch.int32"),
        ((z, labels, means[:, :5]), {}, r"means must have shape \[C, 19\]; got \[5, 5\]"),
        ((z, labels + 1, means), {}, r"labels must be in \[0, 5\).*got 5"),
        ((z, labels, means), {"seen": torch.ones(4, dtype=torch.bool)}, r"seen must have shape \[5\]"),
        ((z, labels, means), {"seen": torch.ones(5)}, r"seen must be a bool tensor; got torch.float32"),
        ((z, labels), {"seen": torch.ones(5, dtype=torch.bool)}, r"seen must be None"),
        ((z, labels), {"temperature": 0.0}, r"temperature must be > 0; got 0.0"),
        ((z, labels), {"temperature": float("nan")}, r"temperature must be > 0; got nan"),
        ((z, labels), {"mean_weight": -1.0}, r"mean_weight must be >= 0; got -1.0"),
        ((z, labels), {"balance": "classes"}, r"balance must be one of 'class', 'none'; got 'classes'"),
        ((z, labels), {"reduction": "avg"}, r"reduction must be one of"),
        ((z, labels), {"anchor_weight": torch.ones(3)}, r"anchor_weight must have shape \[37\]; got \[3\]"),
        ((z, labels), {"backend": "cuda"}, r"hycon has no backend 'cuda'"),
        ((z.double(), labels), {"backend": "triton"}, r"does not take float64"),
        ((z.to("meta"), labels), {}, r"must be on one device; got z on meta, labels on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            hycon(*arguments, **options)
    with pytest.raises(TypeError, match=r"z must be a torch.Tensor; got list"):
        hycon([1.0], labels)  # type: ignore[arg-type]
    monkeypatch.setenv("ALLNC_DEBUG", "1")
    with pytest.raises(ValueError, match=r"z must have unit rows; got a row of norm"):
        hycon(3 * z, labels)
