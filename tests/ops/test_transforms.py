"""Reverse mode through torch.func gives the gradients that `backward` gives; a second derivative is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from allnc import all_around, class_mean_ema, hycon, p2p
from allnc.ops._common import Backend
from tests.cases import make_case, make_class_mean_case
from tests.ops.test_hycon import CPU_BACKENDS

Function = Callable[[Tensor], Tensor]


def functions(backend: Backend) -> dict[str, tuple[Function, Tensor]]:
    """Name -> a scalar function of one tensor, and that tensor."""
    case = make_case(12, 6, 5, 7)
    z, labels, proj_means, x, y = (case[name] for name in ("z", "labels", "proj_means", "means", "weights"))
    means: dict[str, Any] = make_class_mean_case(9, 5, 4)
    features, upstream = means.pop("features"), means.pop("upstream")
    options: Any = {"backend": backend}

    def moved(features: Tensor) -> Tensor:
        state = {"means": means["means"].clone(), "seen": means["seen"].clone()}
        backend_ = "eager" if backend == "triton" else backend
        return (class_mean_ema(features, **{**means, **state}, backend=backend_) * upstream).sum()

    return {
        "hycon": (lambda z: hycon(z, labels, proj_means, **options), z),
        "hycon of its means": (lambda m: hycon(z, labels, m, **options), proj_means),
        "hycon by lse": (lambda z: hycon(z, labels, proj_means, reduction="sum", **options), z),
        "p2p": (lambda x: p2p(x, y, target="etf", **options), x),
        "softmax p2p": (lambda x: p2p(x, target="softmax", **options), x),
        "all_around": (lambda y: torch.stack(all_around(z, labels, proj_means, x, y, **options)).sum(), y),
        "class_mean_ema": (moved, features),
    }


NAMES = ("hycon", "hycon of its means", "hycon by lse", "p2p", "softmax p2p", "all_around", "class_mean_ema")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_reverse_mode(backend: Backend, name: str) -> None:
    function, x = functions(backend)[name]
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    (want,) = torch.autograd.grad(value, leaf)
    assert want.any()
    assert torch.equal(torch.func.grad(function)(x), want)
    got, pullback, *_ = torch.func.vjp(function, x)
    assert torch.equal(got, value) and torch.equal(pullback(torch.ones(()))[0], want)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_second_derivative(backend: Backend, name: str) -> None:
    """Refused, where a term of it would be missing."""
    function, x = functions(backend)[name]
    leaf = x.clone().requires_grad_()
    value = function(leaf).square()  # whose second derivative would have a part that autograd knows
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(first.sum(), leaf)
