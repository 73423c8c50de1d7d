"""The von Mises-Fisher expectation of ProCo: against scipy's Bessel functions, at its limits, and its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from allnc.losses.vmf import concentration, log_expected_exponential

special = pytest.importorskip("scipy.special")


def log_g(order: float, x: np.ndarray) -> np.ndarray:
    """log(I_ν(x) / x^ν) by scipy."""
    return np.log(special.ive(order, x)) + x - order * np.log(x)


@pytest.mark.parametrize("dim", [2, 3, 16, 64, 65, 128])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_against_scipy(dim: int, temperature: float) -> None:
    """float64 to 3e-9; kappa stays where the Bessel function is not 0 in float64."""
    kappa = torch.tensor([0.05, 1.0, 7.0, 40.0, 300.0, 3e4], dtype=torch.float64)
    cosine = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None].expand(-1, len(kappa))
    moved = (kappa**2 + 2 * kappa * cosine / temperature + 1 / temperature**2).sqrt()
    want = log_g(dim / 2 - 1, moved.numpy()) - log_g(dim / 2 - 1, kappa.numpy())
    got = log_expected_exponential(cosine, kappa, temperature=temperature, dim=dim)
    assert float((got - torch.from_numpy(want)).abs().max()) < 3e-9


@pytest.mark.parametrize("dim", [3, 128])
def test_float32_keeps_its_digits_at_the_largest_concentration(dim: int) -> None:
    """Both terms of the difference are about 1e5, where float32 has steps of 0.008."""
    kappa = torch.tensor([1e-3, 50.0, 1e5])
    cosine = torch.linspace(-1, 1, 9)[:, None].expand(-1, 3)
    exact = log_expected_exponential(cosine.double(), kappa.double(), temperature=0.1, dim=dim)
    got = log_expected_exponential(cosine, kappa, temperature=0.1, dim=dim)
    assert float((got - exact).abs().max()) < 1e-4


def test_a_point_and_the_whole_sphere() -> None:
    """κ = 1e13 is z·μ/τ; κ = 0 does not see the cosine, and on the circle its value is log I_0(1/τ)."""
    cosine = torch.tensor([[-0.5], [0.8]], dtype=torch.float64)
    point = log_expected_exponential(cosine, torch.tensor([1e13]).double(), temperature=0.1, dim=8)
    torch.testing.assert_close(point, cosine / 0.1, atol=1e-10, rtol=0)
    whole = log_expected_exponential(cosine, torch.zeros(1).double(), temperature=0.5, dim=2)
    assert all(math.isclose(value, math.log(special.iv(0, 2.0)), rel_tol=1e-8) for value in whole.flatten().tolist())


@pytest.mark.parametrize("dim", [2, 128])
def test_the_gradient_is_the_mean_direction_of_the_tilted_class(dim: int) -> None:
    """d/d(z·μ) is κ A(κ') / (τ κ') with A the ratio of Bessel functions; also where κ' is 0."""
    kappa = torch.tensor([10.0, 200.0], dtype=torch.float64)
    cosine = torch.tensor([[0.3, -0.7]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(log_expected_exponential(cosine, kappa, temperature=0.1, dim=dim).sum(), cosine)
    moved = (kappa**2 + 20 * kappa * cosine.detach() + 100).sqrt().numpy()
    order = dim / 2 - 1
    want = 10 * kappa.numpy() * special.ive(order + 1, moved) / special.ive(order, moved) / moved
    np.testing.assert_allclose(grad.numpy(), want, rtol=1e-7)
    opposite = torch.tensor([[-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(log_expected_exponential(opposite, kappa, temperature=0.1, dim=dim).sum(), opposite)
    assert bool(grad.isfinite().all())


def test_concentration_recovers_what_was_drawn() -> None:
    """R = A(κ) of the distribution itself gives κ back to the 2% that the approximation has."""
    for dim, kappa in ((16, 20.0), (128, 400.0)):
        resultant = special.ive(dim / 2, kappa) / special.ive(dim / 2 - 1, kappa)
        got = concentration(torch.tensor(float(resultant), dtype=torch.float64), dim).item()
        assert math.isclose(got, kappa, rel_tol=0.02)
