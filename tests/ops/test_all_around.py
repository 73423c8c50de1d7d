"""All-around against the float64 reference, which is made of the references of the single ops."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from allnc import AllAroundLosses, all_around
from allnc.ops._common import Backend
from allnc.ops.all_around import all_around_reference
from allnc.ops.hycon import hycon_reference
from allnc.ops.p2p import p2p_reference
from tests.backends import needs_interpreter
from tests.cases import check_against_float64, make_case, rounding_of, value_and_gradients
from tests.launches import Dispatches, count_launches, opcheck_all
from tests.ops.test_hycon import CPU_BACKENDS, OPTIONS
from tests.tolerances import assert_near

NAMES = ("z", "proj_means", "means", "weights")


def check(case: dict[str, Any], backend: Backend, **options: Any) -> None:
    function = functools.partial(all_around, backend=backend)
    check_against_float64(function, all_around_reference, case, dtype=rounding_of(backend, case), **options)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("target", ["auto", "etf", "softmax"])
@pytest.mark.parametrize("shape", [(33, 9, 6, 11), (20, 17, 12, 5)], ids=["F >= C-1", "F < C-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend: Backend, target: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seen = torch.arange(shape[2]) != 1
    case = make_case(*shape, dtype=dtype)
    assert isinstance(all_around(**case, backend=backend), AllAroundLosses)
    centre = dtype != torch.bfloat16  # the weights; each way with each target, shape and backend
    check(case, backend, target=target, seen=seen, temperature=0.2, centre_weights=centre)


def test_the_reference_is_that_of_the_single_ops() -> None:
    case = make_case(21, 8, 4, 7, dtype=torch.float64)
    options = {"temperature": 0.3, "mean_weight": 0.4, "balance": "none", "seen": torch.arange(4) != 1}
    got = all_around_reference(**case, **options, target="softmax", p2p_temperature=0.2, centre_weights=False)
    means, weights = case["means"], case["weights"]
    pairs = {"target": "softmax", "temperature": 0.2, "seen": options["seen"]}
    want = (
        hycon_reference(case["z"], case["labels"], case["proj_means"], **options),
        p2p_reference(means, **pairs),
        p2p_reference(weights, **pairs, centre=False),
        p2p_reference(means, weights, **pairs, centre=(True, False)),
    )
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", [name for name in OPTIONS if "reduction" not in OPTIONS[name]])
def test_options_of_the_contrast(backend: Backend, name: str) -> None:
    """Among them those that no single launch has."""
    check(make_case(37, 8, 5, 7), backend, **OPTIONS[name])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows(backend: Backend, dtype: torch.dtype) -> None:
    check(make_case(29, 300, 4, 70, dtype=dtype), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_deterministic_mode(backend: Backend) -> None:
    case = make_case(40, 8, 4, 7)
    torch.use_deterministic_algorithms(True)
    try:
        check(case, backend)
        first, second = (value_and_gradients(functools.partial(all_around, backend=backend), case) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_one_seen_class_leaves_p2p_zero(backend: Backend, target: str) -> None:
    """Exactly zero, and so are its gradients; HyCon goes on."""
    case, seen = make_case(10, 6, 3, 5), torch.tensor([True, False, False])
    got = value_and_gradients(functools.partial(all_around, backend=backend), case, seen=seen, target=target)
    for name in (f"{field} loss" for field in AllAroundLosses._fields[1:]):
        assert got[name] == 0
    for name in NAMES:
        assert got[name].isfinite().all()
        assert got[name].any() == (name in ("z", "proj_means"))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_without_a_graph_break(backend: Backend) -> None:
    """By inductor for the backend "eager", whose operations it fuses; the others are opaque to it."""
    case = make_case(21, 8, 4, 7)
    compiler = "inductor" if backend == "eager" else "aot_eager"
    function = functools.partial(all_around, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    want, got = value_and_gradients(function, case), value_and_gradients(compiled, case)
    for name in want:
        assert_near(got[name], want[name])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("weights_need_gradient", [False, True])
def test_every_option(backend: Backend, target: str, weights_need_gradient: bool) -> None:
    """Anchor weights, ignored rows, plain balance, a mean weight; also weights that need a gradient themselves."""
    case = make_case(40, 12, 6, 9)
    case["labels"][::7] = -100
    weight = torch.rand(40, generator=torch.Generator().manual_seed(3))
    options = {"target": target, "temperature": 0.3, "balance": "none", "mean_weight": 0.4, "p2p_temperature": 0.2}
    if not weights_need_gradient:
        check(case, backend, anchor_weight=weight, **options)
        return
    gradients = []
    for function, dtype in (
        (functools.partial(all_around, backend=backend), torch.float32),
        (all_around_reference, torch.float64),
    ):
        leaf = weight.to(dtype, copy=True).requires_grad_()
        arguments = {name: x.to(dtype) if name in NAMES else x for name, x in case.items()}
        function(**arguments, anchor_weight=leaf, **options).hycon.backward()
        gradients.append(leaf.grad)
    assert_near(*gradients)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("learned", [False, True])
def test_opcheck(backend: Backend, learned: bool) -> None:
    """Every op of ours that a call and its backward dispatch, with the arguments that it is given there."""
    case = make_case(9, 6, 4, 5)
    for name in NAMES:
        case[name].requires_grad_()
    temperature: Any = torch.tensor(0.2, requires_grad=True) if learned else 0.2
    seen = torch.tensor([True, True, False, True])
    torch.use_deterministic_algorithms(True)
    try:
        with Dispatches() as ops:
            losses = all_around(**case, seen=seen, temperature=temperature, target="softmax", backend=backend)
            torch.stack(tuple(losses)).sum().backward()
        assert all(case[name].grad is not None for name in NAMES)
        assert any(name.endswith("backward") for name in opcheck_all(ops))
    finally:
        torch.use_deterministic_algorithms(False)


@needs_interpreter
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_one_launch_forward_and_two_backward_beside_the_preparations(target: str, monkeypatch) -> None:
    launched = count_launches(monkeypatch)
    value_and_gradients(functools.partial(all_around, backend="triton"), make_case(9, 6, 4, 5), target=target)
    forward = ["unit_sums_kernel", "unit_rows_kernel", "hycon_prepare_kernel", "all_around_fwd_kernel"]
    backward = ["hycon_loss_bwd_kernel", "p2p_bwd_kernel", "unit_bwd_sums_kernel", "unit_bwd_rows_kernel"]
    assert launched == forward + backward


def test_wrong_arguments_say_what_is_wrong() -> None:
    case = make_case(10, 6, 3, 5)
    for change, message in [
        ({"means": case["means"][:2]}, r"means must have shape \[3, F\]; got \[2, 5\]"),
        ({"weights": case["weights"][:, :4]}, r"weights must have shape \[3, 5\]; got \[3, 4\]"),
        ({"target": "simplex"}, r"target must be one of 'auto', 'etf', 'softmax'; got 'simplex'"),
        ({"p2p_temperature": 0.0}, r"p2p_temperature must be > 0; got 0.0"),
        ({"labels": case["labels"] + 3}, r"labels must be in \[0, 3\)"),
        ({"means": case["means"].double(), "backend": "triton"}, r"does not take float64"),
        ({"centre_weights": (True, False)}, r"centre_weights must be True or False; got \(True, False\)"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            all_around(**{**case, **change})
