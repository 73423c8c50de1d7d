"""Expected exponential similarity to a von Mises-Fisher distribution, in closed form.

A class whose unit rows z' have mean direction μ and concentration κ has, for a unit row z and a temperature τ,

    log E[ exp(z·z'/τ) ] = g(κ') - g(κ)        κ'² = κ² + 2 κ z·μ/τ + 1/τ²        g(x) = log( I_ν(x) / x^ν )

with ν = D/2 - 1 and I_ν the modified Bessel function. Both g are near κ, which may be 1e5, and their difference is not:
it is formed of differences throughout, so that float32 has its digits. For the order ν >= 31, g has the uniform
expansion (Olver; NIST DLMF 10.41.3) with s = sqrt(ν² + x²):

    g(x) = s - ν log(ν + s) - ½ log(2π s) + log Σ_k U_k(ν/s) / ν^k

A smaller order is reached from above by g_ν = g_{ν+1} - log ρ_ν, where ρ_ν(x) = I_{ν+1}(x) / (x I_ν(x)) has the stable
recurrence ρ_{ν-1} = 1 / (2ν + x² ρ_ν).

Legend: N rows, D columns, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_KAPPA = 1e5  # beyond it a class is a point, for any temperature in use
_LEAST_ORDER = 31.0  # of the expansion: its first term left out is then below 5e-9


def concentration(resultant: Tensor, dim: int) -> Tensor:
    """κ of unit rows whose mean has this length, R (D - R²) / (1 - R²), at most 1e5.

    Args:
        resultant: [...] floating, R in [0, 1].
        dim: D >= 2.

    Example:
        >>> import torch
        >>> concentration(torch.tensor([0.0, 0.5, 1.0]), dim=4).tolist()  # 0.5 (4 - 0.25) / 0.75
        [0.0, 2.5, 100000.0]

    Source: Banerjee et al., Clustering on the Unit Hypersphere using von Mises-Fisher Distributions, JMLR 2005.
    """
    room = (1 - resultant.square()).clamp(min=torch.finfo(resultant.dtype).tiny)
    return (resultant * (dim - resultant.square()) / room).clamp(max=LARGEST_KAPPA)


def log_expected_exponential(cosine: Tensor, kappa: Tensor, *, temperature: float, dim: int) -> Tensor:
    """log E[exp(z·z'/τ)] over z' ~ vMF(μ, κ) of D dimensions.

    Args:
        cosine: [N, C] float32 or float64, z·μ; the gradient reaches it.
        kappa: [C] of the same type, κ in [0, 1e5], constants.
        temperature: τ > 0.
        dim: D >= 2.

    Returns:
        [N, C], to 1e-8 of exact in float64.

    Example:
        >>> import math, torch
        >>> cosine, kappa = torch.tensor([[0.3]]).double(), torch.tensor([2.0]).double()
        >>> value = log_expected_exponential(cosine, kappa, temperature=0.5, dim=3)
        >>> moved = math.sqrt(2**2 + 2 * 2 * 0.3 / 0.5 + 1 / 0.5**2)  # in three dimensions I_½(x) / √x is sinh(x) / x
        >>> math.isclose(value.item(), math.log(math.sinh(moved) / moved * 2 / math.sinh(2)), rel_tol=1e-7)
        True

    Source: Du et al., Probabilistic Contrastive Learning for Long-Tailed Visual Recognition, TPAMI 2024, Proposition 2.
    """
    order, inverse = dim / 2 - 1, 1 / temperature
    steps = max(0, math.ceil(_LEAST_ORDER - order))
    top = order + steps
    square = kappa.square()  # [C], κ²
    change = inverse * (2 * kappa * cosine + inverse)  # [N, C], κ'² - κ²
    moved_square = (square + change).clamp(min=0)  # [N, C], κ'²
    root, moved = (top**2 + square).sqrt(), (top**2 + moved_square).sqrt()
    grown = change / (root + moved)  # [N, C], how far s grows
    value = grown - top * (grown / (top + root)).log1p() - 0.5 * (grown / root).log1p()
    value = value + _log_series(moved, top) - _log_series(root, top)
    if steps:
        ratio, moved_ratio = _ratio(square, top), _ratio(moved_square, top)  # [C], [N, C]
        for step in range(steps):
            ratio = 1 / (2 * (top - step) + square * ratio)
            moved_ratio = 1 / (2 * (top - step) + moved_square * moved_ratio)
            value = value + ratio.log() - moved_ratio.log()
    return value


def _log_series(root: Tensor, order: float) -> Tensor:
    """log Σ_k U_k(p) / ν^k with p = ν / s, for s [...] and ν >= 31, to the fourth power of 1 / s."""
    q = (order / root).square()  # p²
    terms = (
        (3 - 5 * q) / 24,
        (81 + q * (-462 + 385 * q)) / 1152,
        (30375 + q * (-369603 + q * (765765 - 425425 * q))) / 414720,
        (4465125 + q * (-94121676 + q * (349922430 + q * (-446185740 + 185910725 * q)))) / 39813120,
    )  # U_k(p) / p^k, and p / ν is 1 / s
    total = terms[3]
    for term in terms[2::-1]:
        total = total / root + term
    return (total / root).log1p()


def _ratio(square: Tensor, order: float) -> Tensor:
    """ρ = I_{ν+1}(x) / (x I_ν(x)) for x² [...] and ν >= 31: exp(g_{ν+1} - g_ν), again of differences."""
    above = order + 1
    root, root_above = (order**2 + square).sqrt(), (above**2 + square).sqrt()
    grown = (2 * order + 1) / (root + root_above)
    log_ratio = grown - (above + root_above).log() - order * ((1 + grown) / (order + root)).log1p()
    log_ratio = log_ratio - 0.5 * (grown / root).log1p()
    return (log_ratio + _log_series(root_above, above) - _log_series(root, order)).exp()
