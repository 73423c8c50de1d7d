"""Directions of rows of any length: squares of float32 overflow beyond 1.8e19 and vanish below 1e-19.

Lengths are powers of two, which round nothing: value and gradient times the length are bit for bit those of length 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from allnc import all_around, hycon, hycon_cosine, p2p
from allnc.ops._common import LEAST_ENTRY, Backend, normal_scale, unit_rows
from allnc.ops.p2p import Target
from tests.cases import generator_of, make_case, value_and_gradients
from tests.ops.test_hycon import CPU_BACKENDS
from tests.tolerances import assert_near

# Exponents of two. Entries of a normal distribution are below 2^3 and, of some dozens in a row, one is above 2^-1.
FLOAT32 = [-98, -70, -40, 33, 64, 100, 122]
FLOAT64 = [-98, 300, 600, 1000]


def check(function: Callable[..., Tensor], case: dict[str, Any], name: str, exponents: list[int], **rest: Any) -> None:
    """Value and gradients of `function` with case[name] times powers of two."""
    want = value_and_gradients(function, case, **rest)
    assert want["value"].isfinite() and want[name].any()
    for exponent in exponents:
        length = 2.0**exponent
        got = value_and_gradients(function, {**case, name: case[name] * length}, **rest)
        got[name] = got[name].double() * length
        for leaf, wanted in want.items():
            kept = wanted.abs() > 1e-30 * length  # float32 gradients of long rows are near its smallest numbers
            assert torch.equal(got[leaf].to(wanted.dtype)[kept], wanted[kept]), f"{leaf} at 2^{exponent}"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}], ids=["fused", "by lse"])
def test_hycon(backend: Backend, options: dict[str, Any]) -> None:
    function = functools.partial(hycon, backend=backend)
    check(function, make_case(), "means", FLOAT32, **options)
    if backend != "triton":
        check(function, make_case(dtype=torch.float64), "means", FLOAT64, **options)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_p2p(backend: Backend, target: Target) -> None:
    function = functools.partial(p2p, backend=backend, target=target)
    for dtype, exponents in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
        if backend == "triton" and dtype == torch.float64:
            continue
        rows = make_case(c=9, f=24, dtype=dtype)
        pair = {"x": rows["means"], "y": rows["weights"]}
        check(function, pair, "x", exponents)
        check(function, pair, "y", exponents)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rows_of_one_matrix_may_differ_in_length(backend: Backend) -> None:
    case = make_case()
    lengths = torch.tensor([1e-29, 1e-12, 1.0, 1e12, 1e29])[:, None]
    want = value_and_gradients(hycon, case, backend=backend)
    got = value_and_gradients(hycon, {**case, "means": case["means"] * lengths}, backend=backend)
    assert_near(got["value"], want["value"])
    assert_near(got["z"], want["z"])
    assert_near((got["means"].double() * lengths).float(), want["means"])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("length", [0.0, 1e-33])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}], ids=["fused", "by lse"])
def test_too_short_rows_have_no_direction(backend: Backend, length: float, options: dict[str, Any]) -> None:
    case = make_case()
    case["means"][2] *= length
    got = value_and_gradients(hycon, case, backend=backend, **options)
    assert not got["means"][2].any() and got["means"][3].any()
    case["means"][2] = 0
    want = value_and_gradients(hycon, case, backend=backend, **options)
    assert all(torch.equal(got[name], want[name]) for name in want)
    rows = {"x": length * make_case()["means"]}
    got = value_and_gradients(p2p, rows, backend=backend)
    assert got["value"].isfinite() and not got["x"].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(backend: Backend, value: float) -> None:
    case = make_case(c=5, f=8)
    for x in (case["proj_means"], case["means"]):
        x[2] = 0
        x[2, 1] = value  # alone: a search for the largest entry may pass over NaN
    assert hycon(case["z"], case["labels"], case["proj_means"], backend=backend).isnan()
    assert hycon(case["z"], case["labels"], case["proj_means"], reduction="sum", backend=backend).isnan()
    assert p2p(case["means"], backend=backend).isnan()
    assert p2p(case["means"] * 0, backend=backend).isnan()  # NaN and otherwise zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_are_powers_of_two(dtype: torch.dtype) -> None:
    largest = torch.exp2(torch.arange(-100, 127, dtype=dtype))
    for x in (largest, 1.5 * largest):
        scaled = x * normal_scale(x)
        assert scaled.min() >= 1 and scaled.max() < 2.01
        assert (torch.frexp(normal_scale(x)).mantissa == 0.5).all()
    assert unit_rows(torch.full((1, 4), LEAST_ENTRY, dtype=dtype)).tolist() == [[0.5] * 4]
    assert not unit_rows(torch.full((1, 4), 0.99 * LEAST_ENTRY, dtype=dtype)).any()


def test_cosine_rows_beyond_the_range_of_squares_are_not_silent() -> None:
    rows = make_case(n=36, c=6)
    labels = torch.randint(0, 6, (18,), generator=generator_of(1)).repeat(2)
    case = {"h": rows["z"], "f": rows["z"].flip(0), "labels": labels, "means": rows["means"]}
    want = value_and_gradients(hycon_cosine, case)
    for name in ("h", "f", "means"):
        for length in (2.0**-50, 2.0**50):
            got = value_and_gradients(hycon_cosine, {**case, name: case[name] * length})
            assert_near(got["value"], want["value"])
            assert_near(got[name] * length, want[name])
        assert hycon_cosine(**{**case, name: case[name] * 1e25}).isnan()
        assert hycon_cosine(**{**case, name: case[name] * 0}).isfinite()


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_a_temperature_is_finite_and_positive(value: float) -> None:
    case = make_case(c=5, f=8)
    with pytest.raises(ValueError, match=f"temperature must be > 0; got {value}"):
        p2p(case["means"], temperature=value)
    with pytest.raises(ValueError, match=f"p2p_temperature must be > 0; got {value}"):
        all_around(**case, p2p_temperature=value)
