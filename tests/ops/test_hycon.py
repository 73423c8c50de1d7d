"""HyCon on every backend that runs here, against float64 autograd of the formula as written."""

from __future__ import annotations

import functools
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
from allnc.ops.hycon import Reduction, hycon_reference
from tests.backends import needs_interpreter
from tests.cases import check_against_float64, make_case, rounding_of, unit_rows, value_and_gradients
from tests.launches import Dispatches, count_launches, opcheck_all
from tests.tolerances import assert_near

CPU_BACKENDS = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")),
    pytest.param("triton", marks=needs_interpreter),
]


def check(case: dict[str, Any], backend: Backend, *, floors: bool = False, **options: Any) -> None:
    """Value and gradients on a backend against float64 autograd of the formula."""
    function = functools.partial(hycon, backend=backend)
    check_against_float64(function, hycon_reference, case, dtype=rounding_of(backend, case), floors=floors, **options)


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
    assert float(loss_of(z, labels, means, temperature=1.0)) == pytest.approx(want, rel=1e-14)
    # κ = 0: the single activation of class 1 has no positive and is left out.
    want = ((lse[0] - 0) + (lse[1] - 0)) / 2
    got = float(loss_of(z, labels, means, temperature=1.0, mean_weight=0.0))
    assert got == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("balance", ["class", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend: Backend, balance: str, temperature: float, dtype: torch.dtype) -> None:
    check(make_case(dtype=dtype), backend, balance=balance, temperature=temperature)


@pytest.mark.parametrize("backend", ["eager", *CPU_BACKENDS[1:2]])
def test_float64_is_exact(backend: Backend) -> None:
    check(make_case(dtype=torch.float64), backend)
    check(make_case(dtype=torch.float64), backend, temperature=0.01, balance="none")


# What a backend need not have in one launch. Each must give the same however it is computed.
OPTIONS: dict[str, dict[str, Any]] = {
    "no share for the own mean": {"mean_weight": 0.0},
    "a large share": {"mean_weight": 3.5},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "anchor weights": {"anchor_weight": torch.linspace(0, 2, 37)},
    "none with anchor weights": {"reduction": "none", "anchor_weight": torch.linspace(2, 0, 37)},
    "temperature is a tensor": {"temperature": torch.tensor(0.2)},
    "temperature below the shift's": {"temperature": 0.02},
    "all at once": {
        "reduction": "sum",
        "anchor_weight": torch.linspace(0, 2, 37),
        "temperature": torch.tensor(0.03),
        "balance": "none",
        "mean_weight": 0.3,
        "seen": torch.tensor([True, False, True, True, True]),
    },
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: Backend, dtype: torch.dtype, name: str) -> None:
    check(make_case(dtype=dtype), backend, **OPTIONS[name])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("options", [{}, {"balance": "none", "temperature": 0.02}], ids=["default", "plain and cold"])
def test_wide_rows(backend: Backend, options: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(make_case(n=29, d=300, c=4, dtype=dtype), backend, **options)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("with_means", [True, False])
def test_deterministic_mode(backend: Backend, with_means: bool) -> None:
    """The same as float64, and the same bits each time."""
    case = make_case(n=40, d=24, means=with_means)
    torch.use_deterministic_algorithms(True)
    try:
        check(case, backend)
        first, second = (value_and_gradients(functools.partial(hycon, backend=backend), case) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_upstream_gradients_scale_all_gradients(backend: Backend) -> None:
    """A loss's share of a sum of losses: gradients must be multiplied by it, also where they are computed forward."""

    def shared(**arguments: Any) -> Tensor:
        return -3.25 * hycon(**arguments, backend=backend)

    case = make_case()
    plain = value_and_gradients(functools.partial(hycon, backend=backend), case)
    for name, got in value_and_gradients(shared, case).items():
        assert_near(got, -3.25 * plain[name])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_anchor_weights_seen_and_ignored_rows(backend: Backend) -> None:
    case = make_case(n=23, c=6)
    case["labels"][::5] = -100
    seen = torch.tensor([True, False, True, True, False, True])
    weight = torch.rand(23)
    weight[3] = 0
    check(case, backend, seen=seen, anchor_weight=weight)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_of_anchor_weights_some_of_which_are_zero(backend: Backend, reduction: Reduction) -> None:
    """An anchor of weight 0 has no share of the loss, but its weight has a gradient: its value (less the mean's)."""
    case, weight = make_case(), torch.linspace(0, 2, 37)
    weight[5::6] = 0
    results = []
    for function, dtype in (
        (functools.partial(hycon, backend=backend), torch.float32),
        (hycon_reference, torch.float64),
    ):
        g = weight.to(dtype, copy=True).requires_grad_()
        z, means = (case[name].to(dtype, copy=True).requires_grad_() for name in ("z", "means"))
        loss = function(z, case["labels"], means, anchor_weight=g, reduction=reduction)
        (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=dtype).reshape(loss.shape)).sum().backward()
        results.append((loss, g.grad, z.grad, means.grad))
    for got, want in zip(*results, strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "labels",
    [torch.zeros(9, dtype=torch.int64), torch.arange(9), torch.tensor([0, 0, 0, 0, 1, 7, 7, -100, -100])],
    ids=["one class", "all distinct", "absent and ignored"],
)
def test_label_distributions(backend: Backend, labels: Tensor) -> None:
    case = make_case(n=9, c=9, labels=labels)
    check(case, backend, floors=True)
    check({"z": case["z"], "labels": labels}, backend, floors=True)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ignored_rows_take_no_part(backend: Backend) -> None:
    case = make_case(n=20)
    padded = torch.cat([case["z"], unit_rows(7, 19, torch.default_generator)])
    labels = torch.cat([case["labels"], torch.full((7,), -1)])
    want = hycon(case["z"], case["labels"], case["means"], backend=backend)
    got = hycon(padded, labels, case["means"], ignore_index=-1, backend=backend)
    assert float(got) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_ignored_row_nearer_than_all_others_does_not_overflow(backend: Backend) -> None:
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])  # row 2 is ignored, row 1 is opposite to row 0
    check({"z": z, "labels": torch.tensor([0, 0, -100])}, backend, temperature=0.02, floors=True)


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
    assert torch.equal(got, want)


def test_autocast_changes_nothing() -> None:
    case = make_case()
    want = hycon(**case, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = hycon(**case, backend="eager")
    assert torch.equal(got, want)


LABELS = {
    "any": lambda n, c, generator: torch.randint(0, c, (n,), generator=generator),
    "one class": lambda n, c, generator: torch.full((n,), c - 1),
    "all distinct": lambda n, c, generator: torch.arange(n),
    "mostly one": lambda n, c, generator: torch.randint(-9, c, (n,), generator=generator).clamp(min=0),
    "all ignored": lambda n, c, generator: torch.full((n,), -100),
}


ANY_CASE: dict[str, Any] = {
    "n": st.integers(1, 70),
    "d": st.integers(1, 40),
    "c": st.integers(1, 12),
    "dtype": st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    "distribution": st.sampled_from(list(LABELS)),
    "ignored": st.sampled_from([0.0, 0.1, 0.6]),
    "coldness": st.integers(0, 1000),  # temperatures from 1 to the coldest
    "balance": st.sampled_from(["class", "none"]),
    "reduction": st.sampled_from(["mean", "mean", "sum", "none"]),
    "mean_weight": st.sampled_from([1.0, 0.0, 2.5]),
    "use": st.fixed_dictionaries({name: st.booleans() for name in ("means", "seen", "anchor_weight", "tensor")}),
    "seed": st.integers(0, 2**20),
}


def check_any_case(
    backend: Backend, n, d, c, dtype, distribution, ignored, coldness, balance, reduction, mean_weight, use, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = LABELS[distribution](n, c, generator)
    labels = labels.where(torch.rand(n, generator=generator) >= ignored, -100)
    c = max(c, n) if distribution == "all distinct" else c
    case = make_case(n, d, c, dtype=dtype, seed=seed, labels=labels, means=use["means"])
    options: dict[str, Any] = {"balance": balance, "reduction": reduction, "mean_weight": mean_weight}
    # Where Triton rounds class means to 16 bits, and their logits by as much / τ, τ = 0.005 has fixed cases of its own.
    coldest = 0.02 if backend == "triton" and dtype in (torch.float16, torch.bfloat16) else 0.005
    temperature = coldest ** (coldness / 1000)
    options["temperature"] = torch.tensor(temperature) if use["tensor"] else temperature
    if use["means"] and use["seen"]:
        options["seen"] = torch.rand(c, generator=generator) < 0.6
    if use["anchor_weight"]:
        options["anchor_weight"] = torch.rand(n, generator=generator)
    check(case, backend, floors=True, **options)


@settings(max_examples=80, deadline=None)
@given(**ANY_CASE)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_any_case(backend, **drawn) -> None:
    check_any_case(backend, **drawn)


@needs_interpreter
@settings(max_examples=12, deadline=None)
@given(**{**ANY_CASE, "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16])})
def test_any_case_in_triton(**drawn) -> None:
    check_any_case("triton", **drawn)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ignore_index_may_be_a_class(backend: Backend) -> None:
    check(make_case(), backend, ignore_index=2)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_means_of_another_type_and_no_gradient_for_them(backend: Backend) -> None:
    case = make_case(dtype=torch.bfloat16)
    case["means"] = case["means"].float()
    check(case, backend)
    both = value_and_gradients(functools.partial(hycon, backend=backend), case)
    z = case["z"].requires_grad_()
    hycon(**case, backend=backend).backward()
    assert both["means"].dtype == torch.float32 and torch.equal(z.grad, both["z"])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_may_be_asked_for_twice(backend: Backend) -> None:
    case = make_case()
    z = case["z"].requires_grad_()
    for reduction in ("mean", "none"):
        loss = hycon(**case, reduction=reduction, backend=backend).sum()
        first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and first.any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_label_out_of_range_is_reported(backend: Backend) -> None:
    case = make_case(labels=torch.full((37,), 5))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\).*got 5"):
        hycon(**case, backend=backend)


@needs_interpreter
@pytest.mark.parametrize("with_means", [True, False])
def test_a_step_is_three_launches(with_means: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(n=20, means=with_means)
    launched = count_launches(monkeypatch)
    loss = hycon(case["z"].requires_grad_(), *list(case.values())[1:], backend="triton")
    assert len(launched) == 2
    loss.backward()
    assert launched == ["hycon_prepare_kernel", "hycon_loss_fwd_kernel", "hycon_loss_bwd_kernel"]


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_gradcheck(backend: Backend) -> None:
    case = make_case(n=9, d=4, c=3, dtype=torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor, means: Tensor, temperature: Tensor) -> Tensor:
        return hycon(F.normalize(z, dim=1), case["labels"], means, temperature=temperature, backend=backend)

    assert torch.autograd.gradcheck(loss, (case["z"].requires_grad_(), case["means"].requires_grad_(), tau))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("with_means", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_opcheck(backend: Backend, with_means: bool, learned: bool) -> None:
    """Every op of ours that a call and its backward dispatch, with the arguments that it is given there."""
    temperature = torch.tensor(0.1, requires_grad=True) if learned else 0.1
    case = make_case(10, 6, 3, means=with_means)
    leaves = [case[name].requires_grad_() for name in ("z", "means") if name in case]
    torch.use_deterministic_algorithms(True)  # results of two runs are compared
    try:
        with Dispatches() as ops:
            hycon(**case, temperature=temperature, backend=backend).backward()
        assert all(leaf.grad is not None for leaf in leaves)
        assert any(name.startswith("hycon") and name.endswith("backward") for name in opcheck_all(ops))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("with_means", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_compiles_without_a_graph_break(backend: Backend, with_means: bool, learned: bool) -> None:
    """Traced forward and backward; inductor, slow because it builds C++, has one case, in test_all_around."""
    torch.compiler.reset()  # or graphs of other cases count as recompilations of this one
    case = make_case(means=with_means)
    case["z"].mul_(3)
    options: dict[str, Any] = {"temperature": torch.tensor(0.2)} if learned else {}

    def loss(z: Tensor, **others: Any) -> Tensor:
        return hycon(F.normalize(z, dim=1), **others, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = (value_and_gradients(function, case, **options) for function in (loss, compiled))
    for name in want:
        assert_near(got[name], want[name])


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
        ((z, labels, means[:0]), {}, r"means must have at least one row, or be None; got \[0, 19\]"),
        ((z, labels + 1, means), {}, r"labels must be in \[0, 5\).*got 5"),
        ((z, labels, means), {"seen": torch.ones(4, dtype=torch.bool)}, r"seen must have shape \[5\]"),
        ((z, labels, means), {"seen": torch.ones(5)}, r"seen must be a bool tensor; got torch.float32"),
        ((z, labels), {"seen": torch.ones(5, dtype=torch.bool)}, r"seen must be None"),
        ((z, labels), {"temperature": 0.0}, r"temperature must be > 0; got 0.0"),
        ((z, labels), {"temperature": float("nan")}, r"temperature must be > 0; got nan"),
        ((z, labels), {"temperature": math.inf}, r"temperature must be > 0; got inf"),
        ((z, labels), {"mean_weight": -1.0}, r"mean_weight must be >= 0; got -1.0"),
        ((z, labels), {"mean_weight": math.inf}, r"mean_weight must be >= 0; got inf"),
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
