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
from tests.backends import needs_interpreter
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
    # The matrix units' type, for Triton and for C++ with bfloat16; the others compute in float32.
    rounds_to = dtype if backend == "triton" or (backend == "cpp" and dtype == torch.bfloat16) else None
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


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_without_a_graph_break(backend: Backend) -> None:
    case = make_case(21, 8, 4, 7)

    def total(z: Tensor) -> Tensor:
        return torch.stack(all_around(**{**case, "z": z}, backend=backend)).sum()

    results = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        z = case["z"].clone().requires_grad_()
        value = function(z)
        value.backward()
        results.append((value.detach(), z.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_every_option(backend: Backend, target: str) -> None:
    """Anchor weights, ignored rows, plain balance, a mean weight; also weights that need a gradient themselves."""
    case = make_case(40, 12, 6, 9)
    case["labels"][::7] = -100
    weight = torch.rand(40, generator=torch.Generator().manual_seed(3))
    options = {"target": target, "temperature": 0.3, "balance": "none", "mean_weight": 0.4, "p2p_temperature": 0.2}
    want, want_grads = run(all_around_reference, case, torch.float64, anchor_weight=weight.double(), **options)
    eager, eager_grads = run(all_around_reference, case, anchor_weight=weight, **options)
    for of_weights in (False, True):
        leaf = weight.clone().requires_grad_(of_weights)
        got, grads = run(all_around, case, anchor_weight=leaf, backend=backend, **options)
        for mine, same, exact in zip([*got, *grads], [*eager, *eager_grads], [*want, *want_grads], strict=True):
            assert_as_exact(mine, same, exact, scale=4.0)
        assert (leaf.grad is not None) == of_weights


@needs_interpreter
@pytest.mark.parametrize("learned", [False, True])
def test_ops_of_the_one_launch_pass_opcheck(learned: bool) -> None:
    case = make_case(9, 6, 4, 5)
    leaves = [case[name].requires_grad_() for name in NAMES]
    tau = torch.tensor(0.2, requires_grad=True) if learned else None
    seen = torch.tensor([True, True, False, True])
    weight = torch.rand(9) if learned else None
    rest = (0.0 if learned else 0.2, 1.0, "class", -100, not learned, True, "softmax", 0.1)
    arguments = (leaves[0], case["labels"], *leaves[1:], seen, weight, tau, *rest)
    torch.library.opcheck(torch.ops.allnc.all_around.default, arguments)
    loss, values, *kept = (t.detach() for t in torch.ops.allnc.all_around(*arguments))
    saved = (*(leaf.detach() for leaf in leaves), seen, *kept)
    backward = (torch.ones_like(loss), torch.ones_like(values), *saved, not learned, learned, "softmax", 0.1)
    torch.library.opcheck(torch.ops.allnc.all_around_backward.default, backward)


@needs_interpreter
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_one_launch_forward_and_two_backward_beside_the_preparations(target: str, monkeypatch) -> None:
    import allnc.kernels.all_around
    import allnc.kernels.centred_unit
    import allnc.kernels.hycon
    import allnc.kernels.hycon_loss
    import allnc.kernels.p2p

    launched = []

    class Counted:
        def __init__(self, module, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    kernels = allnc.kernels
    for module in (kernels.all_around, kernels.centred_unit, kernels.hycon, kernels.hycon_loss, kernels.p2p):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(module, name))
    run(all_around, make_case(9, 6, 4, 5), backend="triton", target=target)
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
    ]:
        with pytest.raises(ValueError, match=message):
            all_around(**{**case, **change})
