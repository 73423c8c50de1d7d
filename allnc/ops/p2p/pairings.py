"""The three pairings of P2P in AllNC: means with means, weights with weights, means with weights.

Legend: C classes, F features.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import torch
from torch import Tensor

from allnc.ops._common import Backend, resolve_backend
from allnc.ops.p2p.centred_unit import centred_units, pair_dtype
from allnc.ops.p2p.p2p import Target, check_p2p, p2p_blocks, pair_form

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
    backend: Backend = "auto",
) -> Tensor:
    """`p2p(means)`, `p2p(weights)` and `p2p(means, weights)`, which share their centred unit rows.

    Args:
        means: [C, F] floating, class means.
        weights: [C, F] floating, classifier weight.
        seen: [C] bool, classes that take part. Default: all.
        pairings: those that are wanted; the others are 0 and cost nothing.
        target, temperature, backend: as in `p2p`.

    Returns:
        [3] float32 (float64 when one of them is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device.
    """
    check_p2p(means, weights, seen, target, temperature)
    dtype = pair_dtype(means, weights)
    used = resolve_backend(backend, op="p2p", device=means.device, dtype=dtype, supported=("triton",))
    with torch.autocast(means.device.type, enabled=False):
        everyone = torch.ones(len(means), dtype=torch.bool, device=means.device) if seen is None else seen
        x, y = centred_units(means, weights, everyone, backend=used)
        assert y is not None
        return pairings_of_units(x, y, everyone, pairings, target, temperature, used)


def pairings_of_units(
    x: Tensor, y: Tensor, seen: Tensor, pairings: Collection[str], target: Target, temperature: float, backend: str
) -> Tensor:
    """The pairings [3] of centred unit rows of means, x, and of weights, y."""

    def blocks(x: Tensor, y: Tensor | None, which: Literal["own", "cross", "all"]) -> Tensor:
        form, used = pair_form(target, (x.shape[0], x.shape[1]), blocks=which, backend=backend)
        return p2p_blocks(x, y, seen, blocks=which, form=form, temperature=temperature, backend=used)

    if set(pairings) == set(PAIRINGS):
        return blocks(x, y, "all")
    zero = x.new_zeros(1)
    return torch.cat(
        [
            blocks(x, None, "own") if "means" in pairings else zero,
            blocks(y, None, "own") if "weights" in pairings else zero,
            blocks(x, y, "cross") if "duality" in pairings else zero,
        ]
    )
