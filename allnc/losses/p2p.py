"""P2P as a module: the op `p2p` on running class means and a classifier's weight.

Legend: N activations, F features, C classes.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

from torch import Tensor

from allnc._checks import check_choice, check_interval
from allnc.losses.base import ClassMeans, MeanGradient, backend_for
from allnc.ops._common import Backend, check_floating, check_shape
from allnc.ops.p2p import Target
from allnc.ops.p2p.pairings import PAIRINGS, p2p_pairings


class P2PTerms(NamedTuple):
    """The three pairings before their weights, and their weighted sum; 0 for a pairing of weight 0."""

    total: Tensor  # w_mm means + w_ww weights + w_mw duality
    means: Tensor  # P2P(A, A), A the centred unit class means
    weights: Tensor  # P2P(B, B), B the unit classifier vectors, centred or not
    duality: Tensor  # P2P(A, B)


class P2P(ClassMeans):
    """Peer-to-peer loss: class means and classifier vectors towards one simplex ETF (NC2 and NC3).

    Args:
        num_classes: C >= 2.
        dim: F, width of the features and of the classifier's weight.
        means_weight: w_mm >= 0, means with means.
        classifier_weight: w_ww >= 0, classifier vectors with classifier vectors.
        duality_weight: w_mw >= 0, means with classifier vectors.
        target: "etf", "softmax" or "auto" (softmax where F < C - 1 leaves no room for a simplex ETF).
        temperature: τ > 0 of the softmax target.
        centre_weights: whether what all classifier vectors share is subtracted from them; False for a normalised
            classifier.
        momentum: share of the old class mean kept at each step, in [0, 1).
        gradient: gradient through the class means, "exact" or "straight_through".
        backend: "auto", "eager", "cpp" or "cuda" for the class means, or "triton" for P2P; the other is "auto".

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = P2P(num_classes=4, dim=16)
        >>> classifier = torch.nn.Linear(16, 4)
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> terms = loss(features, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), classifier.weight)
        >>> terms.total.backward()
        >>> bool((terms.total - terms.means - terms.weights - terms.duality).abs() < 1e-6)
        True

    Source: ours, after AllNC (arXiv 2408.07253); see `allnc.p2p`.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        means_weight: float = 1.0,
        classifier_weight: float = 1.0,
        duality_weight: float = 1.0,
        target: Target = "auto",
        temperature: float = 0.1,
        centre_weights: bool = True,
        momentum: float = 0.9,
        gradient: MeanGradient = "exact",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_classes, dim, momentum=momentum, gradient=gradient, backend=backend)
        check_interval("means_weight", means_weight, 0)
        check_interval("classifier_weight", classifier_weight, 0)
        check_interval("duality_weight", duality_weight, 0)
        check_choice("target", target, get_args(Target))
        check_interval("temperature", temperature, 0, open_low=True)
        self.means_weight, self.classifier_weight = means_weight, classifier_weight
        self.duality_weight = duality_weight
        self.target: Target = target
        self.temperature, self.centre_weights = temperature, centre_weights

    def forward(self, features: Tensor, labels: Tensor, weight: Tensor) -> P2PTerms:
        """Update the class means with the features (in training mode) and return the three terms.

        Args:
            features: [N, F] floating.
            labels: [N] int64 in [0, C), -100 for rows that take no part.
            weight: [C, F] floating, classifier weight.

        Returns:
            `P2PTerms` of scalars, float32 (float64 for float64 inputs).
        """
        check_floating("features", features)
        check_shape("features", features, ("N", self.dim))
        check_floating("weight", weight)
        check_shape("weight", weight, (self.num_classes, self.dim))
        means, seen = self.update(features, labels)
        return self.terms(means, seen, weight)

    def terms(self, means: Tensor, seen: Tensor, weight: Tensor) -> P2PTerms:
        """The three terms for given means [C, F], seen [C] and classifier weight [C, F]."""
        scales = (self.means_weight, self.classifier_weight, self.duality_weight)
        values = p2p_pairings(
            means,
            weight,
            seen=seen,
            pairings=[pairing for pairing, scale in zip(PAIRINGS, scales, strict=True) if scale > 0],
            target=self.target,
            temperature=self.temperature,
            centre_weights=self.centre_weights,
            backend=backend_for(self.backend, "cpp", "triton"),
        )
        mm, ww, mw = values.unbind()
        return P2PTerms(scales[0] * mm + scales[1] * ww + scales[2] * mw, mm, ww, mw)

    def extra_repr(self) -> str:
        weights = f"weights=({self.means_weight}, {self.classifier_weight}, {self.duality_weight})"
        return f"{super().extra_repr()}, {weights}, target={self.target!r}"
