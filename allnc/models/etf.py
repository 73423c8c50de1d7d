"""A classifier whose class vectors are a simplex ETF from the start and never move."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ETFClassifier(nn.Module):
    """Scaled cosine between features and the vertices of a fixed simplex, randomly turned; no bias.

    Any two class vectors have the cosine -1/(C - 1), which takes F >= C - 1. The rotation comes from torch's global
    generator; the vectors are a buffer, which is saved but not trained.

    Args:
        features: width F.
        classes: number of classes C.
        scale: factor of the cosine, > 0.

    Raises:
        ValueError: F < C - 1, where no such vectors exist.

    Source: Yang et al., Inducing Neural Collapse in Imbalanced Learning, NeurIPS 2022.
    """

    weight: Tensor
    bias: None = None

    def __init__(self, features: int, classes: int, *, scale: float) -> None:
        super().__init__()
        if features < classes - 1:
            raise ValueError(
                f"model.classifier etf needs at least C - 1 = {classes - 1} features for {classes} classes; got "
                f"{features}: take a wider network (model.width or model.feature_dim), or another classifier"
            )
        rotation, _ = torch.linalg.qr(torch.randn(features, classes - 1, dtype=torch.float64))  # [F, C - 1]
        self.register_buffer("weight", (_simplex(classes) @ rotation.T).float())  # [C, F]
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=1), self.weight)  # [N, C]


def _simplex(classes: int) -> Tensor:
    """The C unit vertices of a simplex around the origin of C - 1 dimensions, [C, C - 1] float64."""
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes  # rank C - 1
    basis = torch.linalg.svd(centred)[0][:, : classes - 1]  # [C, C - 1], orthonormal columns that sum to 0
    return math.sqrt(classes / (classes - 1)) * basis
