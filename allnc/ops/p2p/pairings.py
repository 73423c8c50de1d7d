"""The three pairings of P2P in AllNC: means with means, weights with weights, means with weights.

Legend: C classes, F features.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import torch
from torch import Tensor

from allnc.ops._common import Backend, resolve_backend
from allnc.ops.p2p.centred_unit import pair_dtype
from allnc.ops.p2p.forms import Target
from allnc.ops.p2p.p2p import check_centre_weights, check_p2p, p2p_values

Pairing = Literal["means", "weights", "duality"]
PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)


def p2p_pairings(
    means: Tensor,
    weights: Tensor,
    *,
    seen: Tensor | None = None,
    pairings: Collection[Pairing] = PAIRINGS,
    target: Target = "auto",
    temperature: float = 0.1,
    centre_weights: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """`p2p(means)`, `p2p(weights)` and `p2p(means, weights)`, which share their centred unit rows.

    Args:
        means: [C, F] floating, class means.
        weights: [C, F] floating, classifier weight.
        seen: [C] bool, classes that take part. Default: all.
        pairings: those that are wanted; the others are 0 and cost nothing.
        target, temperature, backend: as in `p2p`.
        centre_weights: whether the weights are centred, as means are; False for a normalised classifier's.

    Returns:
        [3] float32 (float64 when one of them is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device.
    """
    check_p2p(means, weights, seen, target, temperature)
    check_centre_weights(centre_weights)
    dtype = pair_dtype(means, weights)
    used = resolve_backend(backend, op="p2p", device=means.device, dtype=dtype, supported=("cpp", "triton"))
    seen = torch.ones(len(means), dtype=torch.bool, device=means.device) if seen is None else seen
    return pairings_of_checked(means, weights, seen, pairings, target, temperature, used, centre_weights)


def pairings_of_checked(
    means: Tensor,
    weights: Tensor,
    seen: Tensor,
    pairings: Collection[str],
    target: Target,
    temperature: float,
    backend: str,
    centre_weights: bool,
) -> Tensor:
    """`p2p_pairings` of arguments that are right, on a backend that can run."""
    options = {"target": target, "temperature": temperature, "backend": backend}
    centre = (True, centre_weights)
    # All at once form the gradients of both sides; of fixed means, as those of frozen features, nobody asks for them.
    one_sided = backend != "triton" and torch.is_grad_enabled() and weights.requires_grad and not means.requires_grad
    if set(pairings) == set(PAIRINGS) and not one_sided:
        return p2p_values(means, weights, seen, blocks="all", centre=centre, **options)
    zero = means.new_zeros(1, dtype=pair_dtype(means, weights))
    return torch.cat(
        [
            p2p_values(means, None, seen, blocks="own", **options) if "means" in pairings else zero,
            p2p_values(weights, None, seen, blocks="own", centre=(centre_weights, True), **options)
            if "weights" in pairings
            else zero,
            p2p_values(means, weights, seen, blocks="cross", centre=centre, **options)
            if "duality" in pairings
            else zero,
        ]
    )
