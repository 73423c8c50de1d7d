"""HyCon as modules: the ops `hycon` and `hycon_cosine` with their running class means.

Legend: N activations, D columns, F features, C classes.
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from allnc._checks import check_choice, check_interval
from allnc.losses.base import IGNORE_INDEX, ClassMeans, MeanGradient, backend_for
from allnc.ops._common import Backend, check_floating, check_shape
from allnc.ops.hycon import Balance, hycon
from allnc.ops.hycon_cosine import hycon_cosine


class HyCon(ClassMeans):
    """Softmax HyCon: each activation against all other activations and all class means (NC1).

    Args:
        num_classes: C >= 2.
        dim: D, width of the projections z.
        temperature: τ > 0.
        mean_weight: κ >= 0, weight of the own class mean among the positives.
        balance: "class" (each class counts once in the denominator) or "none" (each column counts once).
        momentum: share of the old class mean kept at each step, in [0, 1).
        gradient: gradient through the class means, "exact" or "straight_through".
        backend: "auto", "eager", "cpp", "triton" or "cuda", for those ops that have it; the others use
            "auto".

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> loss = HyCon(num_classes=10, dim=16)
        >>> z = F.normalize(torch.randn(8, 16), dim=1)
        >>> loss(z, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])).shape
        torch.Size([])
        >>> loss.seen.sum().item()
        4

    Source: ours, after AllNC (arXiv 2408.07253); see `allnc.hycon`.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        temperature: float = 0.1,
        mean_weight: float = 1.0,
        balance: Balance = "class",
        momentum: float = 0.9,
        gradient: MeanGradient = "exact",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(num_classes, dim, momentum=momentum, gradient=gradient, backend=backend)
        check_interval("temperature", temperature, 0, open_low=True)
        check_interval("mean_weight", mean_weight, 0)
        check_choice("balance", balance, get_args(Balance))
        self.temperature, self.mean_weight = temperature, mean_weight
        self.balance: Balance = balance

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Update the class means with z (in training mode) and return the loss.

        Args:
            z: [N, D] floating, unit rows.
            labels: [N] int64 in [0, C), -100 for rows that take no part.

        Returns:
            Scalar, float32 (float64 for float64 z).
        """
        check_floating("z", z)
        check_shape("z", z, ("N", self.dim))
        means, seen = self.update(z, labels)
        return hycon(
            z,
            labels,
            means,
            seen=seen,
            temperature=self.temperature,
            mean_weight=self.mean_weight,
            balance=self.balance,
            ignore_index=IGNORE_INDEX,
            backend=backend_for(self.backend, "cpp", "triton"),
        )

    def extra_repr(self) -> str:
        settings = f"temperature={self.temperature}, mean_weight={self.mean_weight}, balance={self.balance!r}"
        return f"{super().extra_repr()}, {settings}"


class HyConCosine(ClassMeans):
    """Cosine HyCon: predictions towards the other view's features, features towards their class mean (NC1).

    The class means are constants of this loss, so it has no choice of their gradient.

    Args:
        num_classes: C >= 2.
        dim: F, width of the features.
        momentum: share of the old class mean kept at each step, in [0, 1).
        backend: "auto", "eager", "cpp" or "cuda", for the class means; the cosines are torch operations.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = HyConCosine(num_classes=10, dim=16)
        >>> f = torch.randn(8, 16, requires_grad=True)  # four images, two views: rows 0-3 and 4-7
        >>> h = torch.nn.Linear(16, 16)(f)
        >>> value = loss(h, f, torch.tensor([0, 1, 2, 2, 0, 1, 2, 2]))
        >>> bool(-2 <= value <= 2)
        True

    Source: ours, after AllNC (arXiv 2408.07253); see `allnc.hycon_cosine`.
    """

    def __init__(self, num_classes: int, dim: int, *, momentum: float = 0.9, backend: Backend = "auto") -> None:
        super().__init__(num_classes, dim, momentum=momentum, gradient="exact", backend=backend)

    def forward(self, h: Tensor, f: Tensor, labels: Tensor, num_views: int = 2) -> Tensor:
        """Update the class means with f (in training mode) and return the loss.

        Args:
            h: [N, F] floating, predictor output, view-major.
            f: [N, F] floating, features.
            labels: [N] int64 in [0, C), -100 for rows that take no part.
            num_views: V >= 1, a divisor of N.

        Returns:
            Scalar, float32 (float64 for float64 inputs).
        """
        for name, rows in (("h", h), ("f", f)):
            check_floating(name, rows)
            check_shape(name, rows, ("N", self.dim))
        means, seen = self.update(f.detach(), labels)
        return hycon_cosine(h, f, labels, means, num_views=num_views, seen=seen, ignore_index=IGNORE_INDEX)
