"""Who looks at the ops: torch.func gets the gradients of `backward`, a second derivative is refused, graphs see ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from allnc import _extension, all_around, class_mean_ema, hycon, p2p
from allnc.ops._common import Backend
from tests.cases import make_case, make_class_mean_case
from tests.launches import Dispatches
from tests.ops.test_hycon import CPU_BACKENDS
from tests.tolerances import assert_near

Function = Callable[[Tensor], Tensor]
cpp_only = pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")


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

    def of_first(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: function(x).square())(x).sum()

    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.func.grad(of_first)(x)


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_constant_means_may_move_before_the_backward(backend: Backend) -> None:
    """As where two batches go forward before one goes back; what needs no gradient is not looked at again."""
    case = make_case(12, 6, 5, 7)
    running, weights = case["means"].clone(), case["weights"].requires_grad_()
    value = p2p(running, weights, target="etf", backend=backend)
    (want,) = torch.autograd.grad(value, weights, retain_graph=True)
    running.add_(1)
    assert torch.equal(torch.autograd.grad(value, weights)[0], want)


def _ops_of(step: Callable[[], object]) -> set[str]:
    """Names of the ops of torch.library that a call goes through."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return {event.key for event in profile.key_averages() if event.key.startswith(("allnc::", "allnc_C::"))}


@cpp_only
def test_unwatched_ops_are_called_as_they_are() -> None:
    """No op of torch.library between the loss and C++, but for who looks: a mode, fake tensors, a subclass."""
    case = make_case(12, 6, 5)
    leaf = case["z"].clone().requires_grad_()

    def step(z: Tensor = leaf) -> Tensor:
        return hycon(**{**case, "z": z}, backend="cpp")

    both_ways = {"allnc_C::hycon_loss_forward", "allnc_C::hycon_loss_backward"}
    assert _ops_of(lambda: step().backward()) == both_ways
    with Dispatches() as ops:
        step().backward()
    assert ops.named("allnc") == ["hycon_loss", "hycon_loss_backward"]
    graph = make_fx(lambda z: torch.autograd.grad(step(z), z)[0])(leaf)
    assert "allnc.hycon_loss_backward" in graph.code and "allnc_C" not in graph.code
    assert_near(graph(leaf), torch.autograd.grad(step(), leaf)[0])


@cpp_only
def test_fake_tensors_outside_their_mode() -> None:
    case = make_case(12, 6, 5)
    with FakeTensorMode() as mode:
        fakes: dict[str, Any] = {name: mode.from_tensor(tensor) for name, tensor in case.items()}
    assert isinstance(hycon(**fakes, backend="cpp"), FakeTensor)
