"""The numbers of other programs, against restatements of their formulas sample by sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from allnc.metrics import collapse
from tests.metrics.test_collapse import _clouds


def _parts(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class means [C, F] and the covariance of all samples around their class means [F, F]."""
    means = torch.stack([features[labels == c].mean(0) for c in range(5)])
    covariance = torch.zeros(7, 7, dtype=torch.float64)
    for row, label in zip(features, labels, strict=True):
        covariance += torch.outer(row - means[label], row - means[label]) / len(features)
    return means, covariance


def _to_simplex(product: Tensor) -> float:
    target = (torch.eye(5, dtype=torch.float64) - 1 / 5) / math.sqrt(4)
    return float((product / product.norm() - target).norm())


def _trace(covariance: Tensor, M: Tensor) -> float:
    return float(torch.trace(covariance @ torch.linalg.pinv(M.T @ M / 5, rtol=1e-10)))


def _nearest(features: Tensor, means: Tensor) -> Tensor:
    return torch.stack([(row - means).norm(dim=1).argmin() for row in features])


def _papyan(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float]:
    means, covariance = _parts(features, labels)
    M = means - means.mean(0)
    result = {"nc1": _trace(covariance, M)}
    for of, rows in (("means", M), ("weights", weight)):
        lengths = rows.norm(dim=1)
        result[f"equinorm_{of}"] = float(lengths.std() / lengths.mean())
        cosines = (rows / lengths[:, None]) @ (rows / lengths[:, None]).T
        result[f"equiangular_{of}"] = float((cosines + 1 / 4)[~torch.eye(5, dtype=torch.bool)].abs().mean())
    result["nc3"] = float((weight / weight.norm() - M / M.norm()).square().sum())
    mismatch = (features @ weight.T + bias).argmax(1) != _nearest(features, means)
    return result | {"nc4": float(mismatch.double().mean())}


def _of_product(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, centred: bool) -> dict[str, float]:
    means, covariance = _parts(features, labels)
    origin = features.mean(0)
    W = weight - weight.mean(0) if centred else weight
    return {
        "nc1": _trace(covariance, means - origin) / 5,
        "nc2_weights": _to_simplex(W @ W.T),
        "nc3_product": _to_simplex(W @ (means - origin).T),
        "bias": float((weight @ origin + bias).norm()),
    }


def _rhubarbwu(features: Tensor, labels: Tensor, weight: Tensor, _: Tensor) -> dict[str, float]:
    means, covariance = _parts(features, labels)
    M = means - means.mean(0)
    variance = torch.stack([(features[labels == c] - means[c]).square().sum(1).mean() for c in range(5)])
    pairs = [(i, j) for i in range(5) for j in range(i)]
    cdnv = [float((variance[i] + variance[j]) / 2 / (means[i] - means[j]).square().sum()) for i, j in pairs]
    match = (features @ weight.T).argmax(1) == _nearest(features, means)  # without bias
    return {
        "nc1": _trace(covariance, M) / 5,
        "trace_ratio": float(torch.trace(covariance) / (M.square().sum() / 5)),
        "cdnv": sum(cdnv) / len(cdnv),
        "nc2_means": _to_simplex(M @ M.T),
        "nc3_product": _to_simplex(weight @ M.T),
        "nc4_agreement": float(match.double().mean()),
    }


RIVALS: dict[Any, Any] = {
    "papyan": _papyan,
    "zhu": lambda *data: _of_product(*data, centred=False),
    "nc_loss": lambda *data: _of_product(*data, centred=True),
    "rhubarbwu": _rhubarbwu,
}


@pytest.mark.parametrize("convention", RIVALS)
def test_convention_against_its_formulas(convention) -> None:
    features, labels, weight = _clouds()
    bias = 5 * torch.randn(5, dtype=torch.float64)
    got = collapse(features + 1, labels, weight, bias, convention=convention)
    wanted = RIVALS[convention](features + 1, labels, weight, bias)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert math.isclose(got[name], value, rel_tol=1e-9), name


def test_conventions_are_different_numbers_of_the_same_features() -> None:
    features, labels, weight = _clouds()
    bias = 5 * torch.randn(5, dtype=torch.float64)
    found = {name: collapse(features, labels, weight, bias, convention=name) for name in RIVALS}
    ours = collapse(features, labels, weight, bias)
    assert len({values["nc1"] for values in [*found.values(), ours]}) == 4  # zhu's and nc_loss's are the same
    assert found["zhu"]["nc1"] == found["nc_loss"]["nc1"]
    assert found["zhu"]["nc2_weights"] == ours["nc2_weights"] != found["nc_loss"]["nc2_weights"]
    assert found["papyan"]["nc3"] == pytest.approx(ours["nc3"] ** 2)
    assert 1 - found["rhubarbwu"]["nc4_agreement"] != ours["nc4"] == found["papyan"]["nc4"]


def test_what_a_convention_would_ignore_is_refused() -> None:
    features, labels, weight = _clouds()
    arguments: dict[str, Any]
    for arguments in ({"center": "samples"}, {"within": "pooled"}, {"spectral": True}):
        with pytest.raises(ValueError, match="would be ignored with convention 'zhu'"):
            collapse(features, labels, weight, convention="zhu", **arguments)
    with pytest.raises(ValueError, match="logits would be ignored with convention 'rhubarbwu'"):
        collapse(features, labels, weight, logits=features @ weight.T, convention="rhubarbwu")
    with pytest.raises(ValueError, match="convention must be one of"):
        collapse(features, labels, weight, convention="paper")  # pyright: ignore[reportArgumentType]
