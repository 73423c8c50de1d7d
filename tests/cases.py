"""Random inputs of the ops, and what a function makes of them: value and gradients, here or in float64.

Legend: N activations, D columns, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allnc.ops._common import accumulation_dtype
from tests.tolerances import RELATIVE, assert_as_exact

# Arguments of the ops that may need a gradient, in the order in which results are given.
LEAVES = ("h", "f", "z", "proj_means", "means", "weights", "x", "y", "temperature")

# Weights of the four losses of all_around in their sum, so that none hides behind another.
MIX = (1.0, 0.7, 1.3, 0.9)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_rows(n: int, d: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, D], drawn and normalised in float64 and then rounded."""
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def make_case(
    n: int = 37,
    d: int = 19,
    c: int = 5,
    f: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    labels: Tensor | None = None,
    means: bool = True,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Arguments of `hycon` (z, labels and means); with `f`, of `all_around` (z, labels, proj_means, means, weights).

    Args:
        n, d, c, f: N, D, C and F.
        dtype: type of all but the labels.
        seed: of the draw.
        labels: [N], instead of random ones.
        means: False for a contrast without class means.
        device: where the tensors lie; they are drawn on the CPU.
    """
    generator = generator_of(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    case: dict[str, Any] = {"z": unit_rows(n, d, generator, dtype)}
    case["labels"] = torch.randint(0, c, (n,), generator=generator) if labels is None else labels
    if means:
        case["means" if f is None else "proj_means"] = rows(c, d)
    if f is not None:
        case |= {"means": rows(c, f), "weights": rows(c, f)}
    return {name: value.to(device) for name, value in case.items()}


def make_class_mean_case(
    n: int = 41, f: int = 24, c: int = 7, *, dtype: torch.dtype = torch.float32, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """Arguments of `class_mean_ema` and an upstream gradient; half of the classes seen before.

    The features have an offset, so that their sums must keep digits.
    """
    generator, state = generator_of(n * 1000 + f * 10 + c), accumulation_dtype(dtype)
    return {
        "features": (torch.randn(n, f, generator=generator, dtype=torch.float64) + 2).to(dtype),
        "labels": torch.randint(0, c, (n,), generator=generator) if labels is None else labels,
        "means": torch.randn(c, f, generator=generator, dtype=torch.float64).to(state),
        "seen": torch.rand(c, generator=generator) < 0.5,
        "upstream": torch.randn(c, f, generator=generator, dtype=torch.float64).to(state),
    }


class LseCase(NamedTuple):
    """Arguments of HyCon's log-sum-exp, and an upstream gradient."""

    z: Tensor  # [N, D] unit rows
    mu: Tensor | None  # [C, D] unit rows
    a: Tensor  # [N] column weights
    b: Tensor | None  # [C]
    t: Tensor  # []
    grad: Tensor  # [N]


def make_lse_case(
    n: int,
    d: int,
    c: int,
    t: float = 0.1,
    *,
    dtype: torch.dtype = torch.float32,
    mu_dtype: torch.dtype | None = None,
    zeros: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> LseCase:
    """z in `dtype`, mu in `mu_dtype`, everything else in the accumulation type.

    Args:
        n, d, c: N, D and C; c = 0 for a case without class means.
        t: temperature.
        dtype: type of z.
        mu_dtype: type of mu. Default: the accumulation type.
        zeros: share of the weights and upstream gradients that are exactly 0.
        seed: of the draw.
        device: where the tensors lie.
    """
    generator, others = generator_of(seed), accumulation_dtype(dtype)

    def uniform(size: int) -> Tensor:
        kept = torch.rand(size, generator=generator) >= zeros
        return (torch.rand(size, generator=generator, dtype=torch.float64) * kept).to(device, others)

    z = unit_rows(n, d, generator, dtype).to(device)
    mu = unit_rows(c, d, generator, mu_dtype or others).to(device) if c else None
    tau = torch.tensor(t, dtype=others, device=device)
    return LseCase(z, mu, uniform(n), uniform(c) if c else None, tau, uniform(n) - uniform(n) / 2)


def value_and_gradients(
    function: Callable[..., Any], case: Mapping[str, Any], *, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """Value (or values) of `function(**case, **options)` and its gradient with respect to every leaf.

    Several values, and those of reduction="none", are summed with unequal weights for the gradient.

    Args:
        function: op or reference.
        case, options: its arguments; tensors named in LEAVES get gradients.
        dtype: type to which all floating tensors are converted first. Default: each keeps its own.

    Returns:
        By name: "value", or the names of the fields of a tuple of values, and the names of the leaves.
    """
    arguments = {**case, **options}
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach().to(dtype or x.dtype, copy=True)
            arguments[name] = x.requires_grad_() if name in LEAVES else x
    value = function(**arguments)
    if isinstance(value, Tensor):
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
        values, total = {"value": value}, (value * weights.reshape(value.shape)).sum() if value.dim() else value
    else:
        values = {f"{name} loss": x for name, x in value._asdict().items()}
        total = torch.stack([weight * x for weight, x in zip(MIX, value, strict=True)]).sum()
    leaves = {name: arguments[name] for name in LEAVES if isinstance(arguments.get(name), Tensor)}
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return {name: x.detach() for name, x in values.items()} | dict(zip(leaves, gradients, strict=True))


def rounding_of(backend: str, case: Mapping[str, Any]) -> torch.dtype | None:
    """The type to whose precision a backend rounds inside: z's own in Triton, in C++ if that is bfloat16; or None."""
    dtype = case["z"].dtype
    return dtype if backend == "triton" or (backend == "cpp" and dtype == torch.bfloat16) else None


def size_of_terms(name: str, case: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    """The largest logit for a HyCon loss; for a gradient, what one anchor's share of the loss makes of it.

    Class means are normalised, so their gradients grow as 1 / length: terms along a mean cancel.
    """
    tau = float(options.get("temperature", 0.1))
    used = (case["labels"] != options.get("ignore_index", -100)).double()
    share = used if options.get("anchor_weight") is None else options["anchor_weight"].double() * used
    whole = float(share.sum()) if options.get("reduction", "mean") == "mean" else 1.0
    one = min(1.0, float(share.max()) / whole) if whole else 1.0
    if name == "value" and options.get("reduction") == "sum":
        return float(share.sum()) / tau
    if name == "means":
        one /= min(1.0, float(case["means"].double().norm(dim=1).min()))
    return {"value": 1 / tau, "temperature": tau**-2}.get(name, one / tau)


def check_against_float64(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    case: Mapping[str, Any],
    *,
    dtype: torch.dtype | str | None = None,
    floors: bool = False,
    **options: Any,
) -> None:
    """Value and every gradient of `function` against `reference` in float64 on the same inputs.

    Args:
        function: op under test, with arguments that are its own (`functools.partial(hycon, backend="cpp")`).
        reference: the formula as written.
        case, options: arguments of both, see `value_and_gradients`.
        dtype: key of the tolerances' table for the values and the gradients of smaller types. Default: their own types.
        floors: whether the wanted values may be differences of larger terms, as they are for odd sets of labels.
    """
    want = value_and_gradients(reference, case, dtype=torch.float64, **options)
    eager = value_and_gradients(reference, case, **options)
    got = value_and_gradients(function, case, **options)
    tau = float(options.get("temperature", 0.1))
    assert got.keys() == want.keys()
    for name, wanted in want.items():
        assert got[name].dtype == eager[name].dtype, name
        rounded = dtype or got[name].dtype
        if name == "temperature" and dtype is None:  # computed from the gradient of z, which is rounded to z's type
            rounded = max(rounded, case["z"].dtype, key=RELATIVE.__getitem__)
        growth = max(1.0, 0.02 / tau) if rounded == torch.float32 else 1.0
        floor = size_of_terms(name, case, options) if floors else 0.0
        try:
            assert_as_exact(got[name], eager[name], wanted, dtype=rounded, growth=growth, floor=floor)
        except AssertionError as wrong:
            raise AssertionError(f"{name}: {wrong}") from wrong
