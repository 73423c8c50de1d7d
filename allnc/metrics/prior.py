"""Predictions under another class prior than that which a classifier assumes.

Legend: N rows, C classes.
"""

from __future__ import annotations

from torch import Tensor


def adjust_prior(logits: Tensor, assumed: Tensor, wanted: Tensor) -> Tensor:
    """Return the logits under another class prior: logits + log(wanted) - log(assumed).

    Where softmax(logits) is the probability of each class when classes are as frequent as `assumed` says, that of the
    result is the one when they are as frequent as `wanted` says and images of a class look alike in both.

    Args:
        logits: [N, C], float; where they are float16 or bfloat16, so is the result.
        assumed: [C], float, > 0: the prior for which the logits are right; its sum does not matter.
        wanted: [C], float, >= 0, one of them > 0; a class of 0 gets the logit -inf.

    Raises:
        ValueError: shapes that do not fit, or priors out of their range.

    Source: Saerens et al., Adjusting the Outputs of a Classifier to New a Priori Probabilities, Neural Computation
        2002, equation 2.4; Menon et al., Long-tail learning via logit adjustment, ICLR 2021, section 4.1 (wanted
        uniform).

    Example:
        >>> import torch
        >>> even = torch.zeros(1, 2)  # a half each where both classes are as frequent
        >>> adjust_prior(even, torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])).softmax(1)
        tensor([[0.8000, 0.2000]])
    """
    if logits.dim() != 2 or not assumed.shape == wanted.shape == logits.shape[1:]:
        raise ValueError(
            f"logits must be [N, C], assumed and wanted [C]; got {list(logits.shape)}, {list(assumed.shape)} and "
            f"{list(wanted.shape)}"
        )
    assumed, wanted = _probabilities("assumed", assumed), _probabilities("wanted", wanted)
    if not bool((assumed > 0).all()):
        raise ValueError(f"assumed must be > 0; got {float(assumed.min())}")
    return logits + (wanted.log() - assumed.log()).to(logits.device, logits.dtype)


def _probabilities(name: str, prior: Tensor) -> Tensor:
    prior = prior.detach().cpu().double()
    if not (bool(prior.isfinite().all()) and bool((prior >= 0).all()) and float(prior.sum()) > 0):
        raise ValueError(f"{name} must be finite numbers >= 0, one of them > 0; got {prior.tolist()[:20]}")
    return prior / prior.sum()
