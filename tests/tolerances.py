"""The one table of tolerances: how far an op may be from its float64 reference.

    largest error <= FACTOR · (error of the same-dtype eager version) + RELATIVE[dtype] · max(largest |want|, floor)

Everything is relative to the largest entry of what is wanted: gradients shrink as 1/N, and an absolute tolerance that
fits a loss accepts a gradient of zeros. A bound of more than `SHARPEST` of the largest entry is refused, because beside
the error that a right result may have it could not tell 1.1 · want from want. So every use of the table is one in which
zeros, a wrong sign and a factor of 1.1 fail; tests/test_tolerances.py shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
SHARPEST = 0.05  # of the largest wanted entry: half of what 1.1 · want is off

# float32: exponents of size 1/τ = 50 are rounded, and the exponentials relatively by as much. 16-bit types: inputs of
# the matrix products, coefficients and gradients are rounded to 2^-9 (bfloat16) or 2^-12 (float16), and the class
# means, whose unit rows are rounded too, are multiplied by 1/τ. "tf32": float32 with factors rounded to 2^-11.
RELATIVE: dict[torch.dtype | str, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    "tf32": 5e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}


def error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, NaN and infinity mismatches counting as infinite."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: {list(got.shape)} and {list(want.shape)}")
    same = (got == want) | (got.isnan() & want.isnan())
    difference = torch.where(same, 0.0, (got - want).abs())
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def largest(x: Tensor) -> float:
    """The largest finite |entry|, 0 if there is none."""
    finite = x.detach()[x.detach().isfinite()]
    return float(finite.double().abs().max()) if finite.numel() else 0.0


def assert_as_exact(
    got: Tensor,
    eager: Tensor,
    reference: Tensor,
    *,
    dtype: torch.dtype | str | None = None,
    growth: float = 1.0,
    floor: float = 0.0,
) -> None:
    """Assert that `got` is about as near to the float64 `reference` as same-dtype `eager` is.

    Args:
        got: result under test.
        eager: the same-dtype eager result.
        reference: the float64 result on the same (rounded) inputs.
        dtype: key of RELATIVE, for an op that rounds inputs inside. Default: the type of `got`.
        growth: how many times larger than usual relative errors are, e.g. by a temperature below 0.02.
        floor: size of the terms that `reference` is made of, where they may cancel: their rounding errors stay when
            it gets smaller than they are. By default an all-zero reference allows `FACTOR` times eager's error only.
    """
    size, of_eager = largest(reference), error(eager, reference)
    noise = growth * RELATIVE[dtype or got.dtype] * max(size, floor)
    allowed = FACTOR * of_eager + noise
    rule = f"{allowed:.3g} = {FACTOR} x eager's error {of_eager:.3g} + {noise:.3g} ({dtype or got.dtype})"
    if size > floor and allowed > SHARPEST * size:
        raise AssertionError(f"a tolerance of {rule} would accept wrong values of largest entry {size:.3g}")
    actual = error(got, reference)
    assert actual <= allowed, f"error {actual:.3g} > {rule}; largest wanted entry {size:.3g}"


def assert_near(
    got: Tensor, want: Tensor, *, dtype: torch.dtype | str | None = None, growth: float = 1.0, floor: float = 0.0
) -> None:
    """`assert_as_exact` where there is no eager version: `got` is within the noise of its type of `want`."""
    assert_as_exact(got, want, want, dtype=dtype, growth=growth, floor=floor)
