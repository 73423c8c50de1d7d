"""All-around against the float64 reference and against the single ops it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allnc import AllAroundLosses, all_around, hycon, p2p
from allnc.ops._common import Backend
from allnc.ops.all_around import all_around_reference
from tests.ops.test_hycon import CPU_BACKENDS
from tests.tolerances import assert_as_exact

NAMES = ("z", "proj_means", "means", "weights")


def make_case(n: int, d: int, c: int, f: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n + d + c + f)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "z": F.normalize(rows(n, d), dim=1).to(dtype),
        "labels": torch.randint(0, c, (n,), generator=generator),
        "proj_means": rows(c, d).to(dtype),
        "means": rows(c, f).to(dtype),
        "weights": rows(c, f).to(dtype),
    }


def run(function, case: dict[str, Any], dtype: torch.dtype | None = None, **options: Any):
    leaves = {name: case[name].detach().clone().to(dtype or case[name].dtype).requires_grad_() for name in NAMES}
    losses = function(leaves["z"], case["labels"], *(leaves[name] for name in NAMES[1:]), **options)
    (losses[0] + 0.7 * losses[1] + 1.3 * losses[2] + 0.9 * losses[3]).backward()
    return losses, [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("target", ["auto", "etf", "softmax"])
@pytest.mark.parametrize("shape", [(33, 9, 6, 11), (20, 17, 12, 5)], ids=["F >= C-1", "F < C-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(backend: Backend, target: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype=dtype)
    seen = torch.ones(shape[2], dtype=torch.bool)
    seen[1] = False
    options = {"target": target, "seen": seen, "temperature": 0.2}
    want, want_grads = run(all_around_reference, case, torch.float64, **options)
    eager, eager_grads = run(all_around_reference, case, **options)
    got, grads = run(all_around, case, backend=backend, **options)
    assert isinstance(got, AllAroundLosses)
    rounds_to = dtype if backend == "triton" else None
    for mine, same, exact in zip([*got, *grads], [*eager, *eager_grads], [*want, *want_grads], strict=True):
        assert_as_exact(mine, same.to(mine.dtype), exact, scale=5.0, dtype=rounds_to)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equals_the_single_ops(backend: Backend) -> None:
    case = make_case(21, 8, 4, 7)
    got = all_around(**case, backend=backend)
    means, weights = case["means"], case["weights"]
    want = (
        hycon(case["z"], case["labels"], case["proj_means"], backend=backend),
        p2p(means),
        p2p(weights),
        p2p(means, weights),
    )
    torch.testing.assert_close(tuple(got), want)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_learnable_temperature_gets_the_gradient_of_hycon(backend: Backend) -> None:
    case = make_case(21, 8, 4, 7)
    gradients = []
    for loss_of in (
        lambda tau: all_around(**case, temperature=tau, backend=backend).hycon,
        lambda tau: hycon(case["z"], case["labels"], case["proj_means"], temperature=tau, backend="eager"),
    ):
        tau = torch.tensor(0.2, requires_grad=True)
        loss_of(tau).backward()
        gradients.append(tau.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_seen_class_leaves_p2p_zero(backend: Backend) -> None:
    case = make_case(10, 6, 3, 5)
    seen = torch.tensor([True, False, False])
    losses, grads = run(all_around, case, backend=backend, seen=seen)
    assert [loss.item() for loss in losses[1:]] == [0.0, 0.0, 0.0]
    assert len(grads) == len(NAMES) and all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_compiles_without_a_graph_break(backend: Backend) -> None:
    case = make_case(21, 8, 4, 7)

    def total(z: Tensor) -> Tensor:
        return torch.stack(all_around(**{**case, "z": z}, backend=backend)).sum()

    torch.testing.assert_close(torch.compile(total, fullgraph=True, backend="aot_eager")(case["z"]), total(case["z"]))


def test_wrong_arguments_say_what_is_wrong() -> None:
    case = make_case(10, 6, 3, 5)
    for change, message in [
        ({"means": case["means"][:2]}, r"means must have shape \[3, F\]; got \[2, 5\]"),
        ({"weights": case["weights"][:, :4]}, r"weights must have shape \[3, 5\]; got \[3, 4\]"),
        ({"target": "simplex"}, r"target must be one of 'auto', 'etf', 'softmax'; got 'simplex'"),
        ({"p2p_temperature": 0.0}, r"p2p_temperature must be > 0; got 0.0"),
        ({"labels": case["labels"] + 3}, r"labels must be in \[0, 3\)"),
        ({"means": case["means"].double(), "backend": "triton"}, r"does not take float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            all_around(**{**case, **change})
