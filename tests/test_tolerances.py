"""Zeros, a wrong sign and a factor of 1.1 fail at every tolerance: for all that ops return, in all that check it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allnc import all_around, class_mean_ema, hycon, p2p
from allnc.ops.all_around import all_around_reference
from allnc.ops.class_mean import class_mean_ema_reference
from allnc.ops.hycon import hycon_reference
from allnc.ops.hycon_cosine import hycon_cosine, hycon_cosine_reference
from allnc.ops.p2p import p2p_reference
from tests.cases import check_against_float64, make_case, make_class_mean_case, value_and_gradients
from tests.tolerances import RELATIVE, SHARPEST, assert_as_exact, assert_near

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "a wrong sign": torch.neg,
    "a factor of 1.1": lambda x: 1.1 * x.double(),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TENSOR_TAU = torch.tensor(0.2)

Results = tuple[dict[str, Tensor], dict[str, Tensor]]  # of the same-dtype eager version, and in float64


def of_function(reference: Callable[..., Any], case: dict[str, Any], **options: Any) -> Results:
    return (
        value_and_gradients(reference, case, **options),
        value_and_gradients(reference, case, dtype=torch.float64, **options),
    )


def of_pairs(dtype: torch.dtype, **options: Any) -> Results:
    case = make_case(4, 4, 12, 20, dtype=dtype)
    return of_function(p2p_reference, {"x": case["means"], "y": case["weights"]}, **options)


def cosine_case(dtype: torch.dtype) -> dict[str, Any]:
    case = make_case(12, 6, 12, 6, dtype=dtype)
    labels = torch.arange(6).repeat(2)
    return {"h": case["weights"], "f": case["means"], "labels": labels, "means": case["proj_means"]}


def of_cosine(dtype: torch.dtype) -> Results:
    eager, want = of_function(hycon_cosine_reference, cosine_case(dtype))
    assert not want.pop("means").any()  # constants of this loss
    return eager, want


def of_class_means(dtype: torch.dtype) -> Results:
    case, results = make_class_mean_case(dtype=dtype), []
    upstream = case.pop("upstream")
    for to in (dtype, torch.float64):
        features = case["features"].to(to, copy=True).requires_grad_()
        means = case["means"].to(torch.promote_types(to, torch.float32))
        value = class_mean_ema_reference(features, case["labels"], means, case["seen"])[0]
        value.backward(upstream.to(value.dtype))
        results.append({"value": value.detach(), "features": features.grad})
    return results[0], results[1]


REAL: dict[str, Callable[[torch.dtype], Results]] = {
    "hycon": lambda dtype: of_function(hycon_reference, make_case(dtype=dtype)),
    "hycon of 1000 rows": lambda dtype: of_function(hycon_reference, make_case(1000, 16, 9, dtype=dtype)),
    "hycon, cold": lambda dtype: of_function(hycon_reference, make_case(dtype=dtype), temperature=0.02),
    "hycon, tensor temperature": lambda dtype: of_function(
        hycon_reference, make_case(dtype=dtype), temperature=TENSOR_TAU
    ),
    "hycon without means, none": lambda dtype: of_function(
        hycon_reference, make_case(dtype=dtype, means=False), balance="none", reduction="none"
    ),
    "all_around": lambda dtype: of_function(
        all_around_reference, make_case(33, 9, 6, 11, dtype=dtype), temperature=0.2
    ),
    "all_around, softmax": lambda dtype: of_function(
        all_around_reference, make_case(20, 17, 12, 5, dtype=dtype), target="softmax"
    ),
    "p2p": lambda dtype: of_pairs(dtype, target="etf"),
    "p2p, softmax": lambda dtype: of_pairs(dtype, target="softmax"),
    "hycon_cosine": of_cosine,
    "class_mean_ema": of_class_means,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REAL)
def test_wrong_results_of_the_ops_are_rejected(name: str, dtype: torch.dtype) -> None:
    """Each value and gradient of a typical case, at its own tolerance and at that of its inputs' type."""
    eager, want = REAL[name](dtype)
    rejected = 0
    for result, wanted in want.items():
        for precision in {eager[result].dtype, dtype, *(["tf32"] if dtype == torch.float32 else [])}:
            assert_as_exact(eager[result], eager[result], wanted, dtype=precision)
            for wrong in WRONG.values():
                with pytest.raises(AssertionError, match="largest wanted entry"):
                    assert_as_exact(wrong(wanted), eager[result], wanted, dtype=precision)
                rejected += 1
    assert rejected >= 3 * len(want)


@pytest.mark.parametrize("precision", RELATIVE)
def test_every_row_of_the_table_rejects_wrong_values_of_any_size(precision: torch.dtype | str) -> None:
    for size in (1e-30, 1e-5, 1.0, 1e5):
        want = size * torch.linspace(-1, 0.5, 7, dtype=torch.float64)
        assert_near(want * (1 + RELATIVE[precision] / 2), want, dtype=precision)
        for wrong in (*WRONG.values(), lambda x: torch.full_like(x, torch.nan), lambda x: x * torch.inf):
            with pytest.raises(AssertionError):
                assert_near(wrong(want), want, dtype=precision)
    assert RELATIVE[precision] < SHARPEST


def test_a_tolerance_that_would_accept_wrong_values_is_refused() -> None:
    want = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for far_off in (0.9 * want, torch.zeros_like(want)):  # an eager version that is wrong itself
        with pytest.raises(AssertionError, match="would accept wrong values"):
            assert_as_exact(want, far_off, want)
    with pytest.raises(AssertionError, match="would accept wrong values"):
        assert_near(want, want, dtype=torch.bfloat16, growth=10)


def test_zeros_are_compared_exactly_or_with_a_stated_floor() -> None:
    want = torch.zeros(3, dtype=torch.float64)
    assert_near(want, want)
    off = torch.tensor([0.0, 1e-300, 0.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_near(off, want, dtype=torch.bfloat16)
    assert_near(off, want, floor=1.0)
    with pytest.raises(AssertionError):
        assert_near(want + 2e-12, want, floor=1.0)


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[torch.dtype], dict[str, Any]]]] = {
    "hycon": (hycon, hycon_reference, lambda dtype: {**make_case(dtype=dtype), "temperature": TENSOR_TAU}),
    "all_around": (all_around, all_around_reference, lambda dtype: make_case(33, 9, 6, 11, dtype=dtype)),
    "p2p": (p2p, p2p_reference, lambda dtype: {"x": make_case(1, 1, 9, 7, dtype=dtype)["means"]}),
    "hycon_cosine": (hycon_cosine, hycon_cosine_reference, cosine_case),
}


def with_gradient_times(function: Callable[..., Any], leaf: str, factor: float) -> Callable[..., Any]:
    """The function with its value as it is and the gradient of one argument multiplied."""

    def broken(**arguments: Any) -> Any:
        x = arguments[leaf]
        return function(**{**arguments, leaf: factor * x + (x - factor * x).detach()})

    return broken


def with_value_times(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def broken(**arguments: Any) -> Any:
        value = function(**arguments)
        scaled = [x + (factor * x - x).detach() for x in ([value] if isinstance(value, Tensor) else value)]
        return scaled[0] if isinstance(value, Tensor) else type(value)(*scaled)

    return broken


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_a_broken_op_fails_the_check_against_float64(op: str, dtype: torch.dtype, factor: float) -> None:
    """`check_against_float64`, which most tests of ops use: value or any one gradient wrong, everything else right."""
    function, reference, make = OPS[op]
    case = make(dtype)
    floating = [name for name, x in case.items() if x.is_floating_point() and (op, name) != ("hycon_cosine", "means")]
    check_against_float64(function, reference, case, dtype=dtype)
    breaks = {leaf: with_gradient_times(function, leaf, factor) for leaf in floating}
    for name, broken in {**breaks, "value|loss": with_value_times(function, factor)}.items():
        with pytest.raises(AssertionError, match=rf"^.*({name}):"):
            check_against_float64(broken, reference, case, dtype=dtype)


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_a_broken_class_mean_ema_fails_its_check(gradient: Any) -> None:
    """The check of tests/ops/test_class_mean.py finds a factor on the features' gradient, at an unchanged value."""
    from tests.ops import test_class_mean

    case = make_class_mean_case(dtype=torch.bfloat16)
    test_class_mean.check(case, "eager", gradient=gradient)

    def broken(features: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return class_mean_ema(1.1 * features + (features - 1.1 * features).detach(), *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_class_mean, "class_mean_ema", broken)
        with pytest.raises(AssertionError, match="largest wanted entry"):
            test_class_mean.check(case, "eager", gradient=gradient)


def explicit_tolerances(path: Path) -> list[tuple[int, str, float]]:
    """(line, keyword, number) of every tolerance that is written out in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg in ("rtol", "rel", "rel_tol", "atol", "abs", "abs_tol"):
            found.append((node.value.lineno, node.arg, float(ast.literal_eval(node.value))))
    return found


def test_explicit_tolerances_are_sharp() -> None:
    """Relative ones at most SHARPEST; absolute ones at most 1e-9, since no wanted gradient here is that small."""
    files = [path for room in ("gpu", "losses", "ops") for path in (Path(__file__).parent / room).glob("*.py")]
    loose = [
        f"{path.name}:{line} {keyword}={number}"
        for path in files
        for line, keyword, number in explicit_tolerances(path)
        if not number <= (SHARPEST if keyword.startswith("r") else 1e-9)
    ]
    assert len(files) > 10 and not loose, loose
