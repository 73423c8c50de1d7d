"""NC5: how far images of no class are orthogonal to the class means.

Legend: N images out of distribution, F features, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allnc.metrics.measures import check_measurable, unit
from allnc.ops._common import check_floating, check_shape


class OODAccumulator:
    """NC5 of images that are seen once, batch by batch, against final class means.

    Args:
        means: [C, F] floating class means, as they are (not centred); a row of zeros is an absent class.

    Raises:
        TypeError, ValueError: not a finite floating matrix.
    """

    def __init__(self, means: Tensor) -> None:
        check_floating("means", means)
        check_shape("means", means, ("C", "F"))
        check_measurable("means", means)
        means = means.detach().double()
        self.directions = unit(means[(means != 0).any(1)])  # [K, F]
        self.total = torch.zeros_like(means[0])  # [F]
        self.cosines = 0.0  # sum over images of the mean over classes
        self.num = 0

    def update(self, features: Tensor) -> None:
        """Fold in a batch of features [N, F].

        Raises:
            TypeError, ValueError: not a finite floating matrix of the width of the means.
        """
        check_floating("features", features)
        check_shape("features", features, ("N", len(self.total)))
        check_measurable("features", features)
        features = features.detach().to(self.total)
        self.total += features.sum(0)
        self.cosines += float((unit(features) @ self.directions.T).abs().mean(1).sum())
        self.num += len(features)

    def compute(self) -> dict[str, float]:
        """As `nc5`.

        Raises:
            ValueError: no image, or no class mean.
        """
        if self.num == 0 or len(self.directions) == 0:
            raise ValueError("NC5 needs at least one image out of distribution and one class mean; got none")
        mean = unit(self.total[None])[0]  # the direction of a mean is that of the sum
        return {"nc5": float((self.directions @ mean).abs().mean()), "nc5_vectors": self.cosines / self.num}


def nc5(means: Tensor, features: Tensor) -> dict[str, float]:
    """Mean absolute cosine between class means and features of images that belong to no class.

    Neither is centred, as in the source: features after a ReLU have no negative entry, and their cosines none either.

    Args:
        means: [C, F] floating class means; a row of zeros is an absent class.
        features: [N, F] floating, of images out of distribution.

    Returns:
        nc5: mean over classes of |cos(μ_c, mean of the features)|, in [0, 1], 0 if they are orthogonal.
        nc5_vectors: mean over classes and images of |cos(μ_c, f_i)| (ours: opposite vectors do not cancel in it).

    Raises:
        TypeError, ValueError: wrong types or shapes, no image, no class.

    Source: Ammar et al., NECO: Neural Collapse Based Out-of-distribution Detection, ICLR 2024, equation 5.

    Example:
        >>> nc5(torch.eye(3)[:2], torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))["nc5_vectors"]
        0.25
    """
    accumulator = OODAccumulator(means)
    accumulator.update(features)
    return accumulator.compute()
