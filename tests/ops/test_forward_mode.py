"""Forward-mode derivatives: the ops have gradients only and must say so, not give zeros or half of the terms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from allnc import all_around, class_mean_ema, hycon, hycon_cosine, p2p
from allnc.ops.all_around import all_around_reference
from allnc.ops.class_mean import class_mean_ema_reference
from allnc.ops.hycon import hycon_reference
from allnc.ops.hycon_cosine import hycon_cosine_reference
from allnc.ops.p2p import p2p_reference
from tests.cases import make_case, make_class_mean_case
from tests.ops.test_hycon import CPU_BACKENDS
from tests.tolerances import assert_near

Function = Callable[[Tensor], Tensor]


def by_jvp(function: Function, x: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (tangent,))[1]


def by_jacfwd(function: Function, x: Tensor, tangent: Tensor) -> Tensor:
    jacobian = torch.func.jacfwd(function)(x)
    return (jacobian * tangent).flatten(-tangent.dim()).sum(-1)


def by_dual_numbers(function: Function, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        value = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
        return torch.zeros_like(value.primal) if value.tangent is None else value.tangent


def check(function: Callable[..., Any], reference: Callable[..., Any], way, case: dict[str, Any], name: str) -> None:
    """The derivative along a random change of one argument is that of the reference, or refused by name."""
    x = case[name]
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    want = way(lambda x: reference(**{**case, name: x}), x, tangent)
    assert want.any()
    try:
        got = way(lambda x: function(**{**case, name: x}), x, tangent)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as refusal:
        known = ("forward", "jvp", "vmap")  # jacfwd maps over directions first
        assert any(word in str(refusal) for word in known), f"refused for another reason: {refusal}"
        return
    assert_near(got, want, dtype=torch.float32)


WAYS = [by_jvp, by_jacfwd, by_dual_numbers]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
@pytest.mark.parametrize("name", ["z", "means", "anchor_weight"])
def test_hycon(backend, name: str, way) -> None:
    case = make_case(12, 6, 3, dtype=torch.float64)
    case["anchor_weight"] = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    check(functools.partial(hycon, backend=backend), hycon_reference, way, case, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("name", ["x", "y"])
def test_p2p(target, name: str, way) -> None:
    pair = make_case(4, 3, 5, 7, dtype=torch.float64)
    case = {"x": pair["means"], "y": pair["weights"], "target": target}
    check(p2p, p2p_reference, way, case, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["h", "f"])
def test_hycon_cosine(name: str, way) -> None:
    rows = make_case(6, 6, 6, 5, dtype=torch.float64)
    case = {"h": rows["weights"], "f": rows["means"], "labels": torch.arange(3).repeat(2)}
    case["means"] = make_case(6, 5, 3, dtype=torch.float64)["means"]

    def reference(h: Tensor, f: Tensor, **others: Any) -> Tensor:  # whose detached targets must carry no tangent
        if name == "h":
            return hycon_cosine_reference(h, f, **others)
        fixed = case["f"]
        own_only = hycon_cosine_reference(case["h"], f, **others, num_views=1)
        return own_only + hycon_cosine_reference(h, fixed, **others) * 0

    check(hycon_cosine, reference, way, case, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
@pytest.mark.parametrize("name", ["z", "proj_means", "means", "weights"])
def test_all_around(backend, name: str, way) -> None:
    case = make_case(12, 6, 5, 7, dtype=torch.float64)

    def total(function: Callable[..., Any], **arguments: Any) -> Tensor:
        return torch.stack(tuple(function(**arguments))).sum()

    function = functools.partial(total, functools.partial(all_around, backend=backend))
    check(function, functools.partial(total, all_around_reference), way, case, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_class_mean_ema(backend, way) -> None:
    case: dict[str, Any] = make_class_mean_case(9, 5, 4, dtype=torch.float64)
    del case["upstream"]

    def function(means: Tensor, seen: Tensor, **others: Any) -> Tensor:
        return class_mean_ema(means=means.clone(), seen=seen.clone(), **others, backend=backend)

    check(function, lambda **arguments: class_mean_ema_reference(**arguments)[0], way, case, "features")
