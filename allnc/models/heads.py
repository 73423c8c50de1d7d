"""What sits on the features: classifiers, projection and predictor.

Legend: N rows, F features, D columns of the projection, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormalisedClassifier(nn.Module):
    """Scaled cosine between features and class vectors; no bias.

    Args:
        features: width F.
        classes: number of classes C.
        scale: factor of the cosine, > 0.
    """

    bias: None = None

    def __init__(self, features: int, classes: int, *, scale: float) -> None:
        super().__init__()
        template = nn.Linear(features, classes, bias=False)
        self.weight, self.scale = template.weight, scale

    @property
    def class_vectors(self) -> Tensor:
        """The rows of the weight at unit length, [C, F]: what features are compared with."""
        return F.normalize(self.weight, dim=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=1), self.class_vectors)  # [N, C]


class Projection(nn.Module):
    """Two layers to the unit sphere on which softmax HyCon contrasts.

    Args:
        features: width F.
        hidden: width of the layer between.
        dim: width D of the result.
    """

    def __init__(self, features: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))

    def forward(self, features: Tensor) -> Tensor:
        rows = self.layers(features)
        # Under autocast the rows are scaled in float32 and go on in 16 bits, which the contrast's kernels multiply.
        scaled = rows if rows.dtype == torch.float64 else rows.float()
        return F.normalize(scaled, dim=1).to(rows.dtype)  # [N, D] unit rows


class Predictor(nn.Module):
    """Two layers from the features of one view to those of another (cosine HyCon).

    Args:
        features: width F of input, middle and result.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
            nn.Linear(features, features),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)  # [N, F]
