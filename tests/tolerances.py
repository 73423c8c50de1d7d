"""The one table of tolerances: how far an op may be from its float64 reference.

The rule is relative: the error of an op may be at most `FACTOR` times the error of the same-dtype eager version
plus `ATOL`, the noise floor of the type at the scale of the losses (values and gradients of order one).
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
ATOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, NaN and infinity mismatches counting as infinite."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: {list(got.shape)} and {list(want.shape)}")
    same = (got == want) | (got.isnan() & want.isnan())
    difference = torch.where(same, 0.0, (got - want).abs())
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def assert_as_exact(
    got: Tensor, eager: Tensor, reference: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Assert that `got` is about as near to the float64 `reference` as same-dtype `eager` is.

    Args:
        got: result under test.
        eager: the same-dtype eager result.
        reference: the float64 result on the same (rounded) inputs.
        scale: typical size of the values, for ATOL.
        dtype: type whose ATOL applies, for an op that rounds inputs inside. Default: that of `got`.
    """
    dtype = dtype or got.dtype
    allowed = FACTOR * error(eager, reference) + ATOL[dtype] * scale
    actual = error(got, reference)
    assert actual <= allowed, f"error {actual:.3g} > {allowed:.3g} = {FACTOR} x eager + atol ({dtype})"
