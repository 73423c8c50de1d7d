"""What is done to a trained classifier before it predicts: logit adjustment and τ-normalisation.

Both are part of the model in evaluation mode alone. The loss trains the classifier as it is, every measurement (in
mid-training, too) is of the predictor that the run ends with, the checkpoint holds the trained weights from which
training goes on, and whoever loads it predicts the same.

Legend: N rows, F features, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allnc.config import ModelConfig


class PosthocAdjustment(nn.Module):
    """Logits minus τ log π, π the class frequencies in training; with any classifier, also one without a bias.

    Args:
        class_counts: [C] training images of each class, >= 1.
        tau: τ > 0; 1 makes posteriors of the training distribution those of balanced classes.

    Source: Menon et al., Long-tail learning via logit adjustment (ICLR 2021), section 4.1.
    """

    log_prior: Tensor

    def __init__(self, class_counts: Tensor, *, tau: float) -> None:
        super().__init__()
        self.tau = tau
        counts = class_counts.double()
        self.register_buffer("log_prior", (counts / counts.sum()).log().float())  # [C]; saved with the weights

    def forward(self, features: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """Return the logits [N, C] that predict, from those of the classifier."""
        return logits - self.tau * self.log_prior

    def class_vectors(self, weight: Tensor) -> Tensor:
        """Return the class vectors [C, F] that predict: the classifier's."""
        return weight


class TauNormalisation(nn.Module):
    """A linear classifier whose class vectors are divided by their length to the power τ, without its bias.

    Frequent classes have the longer vectors; τ = 1 gives all the same length.

    Args:
        tau: τ > 0.

    Source: Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition (ICLR 2020), section 4.2.
    """

    def __init__(self, *, tau: float) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, features: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """Return the logits [N, C] that predict, of features [N, F]."""
        return F.linear(features, self.class_vectors(weight))

    def class_vectors(self, weight: Tensor) -> Tensor:
        """Return the class vectors [C, F] that predict; one of zero stays zero."""
        length = weight.norm(dim=1, keepdim=True)  # [C, 1]
        return weight / length.clamp(min=torch.finfo(weight.dtype).tiny) ** self.tau


def posthoc(config: ModelConfig, class_counts: Tensor | None) -> PosthocAdjustment | TauNormalisation | None:
    """Return what a configuration does to the classifier that predicts, if anything.

    Raises:
        ValueError: no class counts where they are wanted.
    """
    if config.posthoc == "none":
        return None
    if config.posthoc == "tau_normalised":
        return TauNormalisation(tau=config.posthoc_tau)
    if class_counts is None:
        raise ValueError("class_counts must be given with model.posthoc logit_adjusted; got None")
    return PosthocAdjustment(class_counts, tau=config.posthoc_tau)
