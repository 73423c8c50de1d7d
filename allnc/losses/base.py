"""What the losses share: their output, the running class means, and the checks of constructor arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_choice,
    check_floating,
    check_labels,
    check_same_device,
    check_shape,
    validated_labels,
)
from allnc.ops.class_mean import class_mean_ema

MeanGradient = Literal["exact", "straight_through"]
IGNORE_INDEX = -100


class LossOutput(NamedTuple):
    """A loss and what it is made of."""

    total: Tensor  # scalar to call backward() on
    parts: dict[str, Tensor]  # detached scalars for the log, before their weights


class ClassMeans(nn.Module):
    """Running class means: the state of the losses that compare activations with their class.

    Attributes (buffers):
        means: [C, D] float32 exponential moving averages; zero rows for classes not seen yet.
        seen: [C] bool.
    """

    means: Tensor
    seen: Tensor

    def __init__(
        self, num_classes: int, dim: int, *, momentum: float, gradient: MeanGradient, backend: Backend
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, minimum=2)
        check_integer("dim", dim, minimum=1)
        check_interval("momentum", momentum, 0, 1, open_high=True)
        check_choice("gradient", gradient, ("exact", "straight_through"))
        check_choice("backend", backend, ("auto", "eager", "cpp", "triton", "cuda"))
        self.num_classes, self.dim = num_classes, dim
        self.momentum = momentum
        self.gradient: MeanGradient = gradient
        self.backend: Backend = backend
        self.register_buffer("means", torch.zeros(num_classes, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def update(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Fold a batch into the means (in training mode only) and return means and mask for one loss.

        Args:
            features: [N, D] floating.
            labels: [N] int64 in [0, C) or -100.

        Returns:
            means [C, D], differentiable with respect to features in training mode, and seen [C]. Both are
            free of the state's storage: a second forward before the first backward stays correct.
        """
        if not self.training:
            return self.means.clone(), self.seen.clone()
        means = class_mean_ema(
            features,
            labels,
            self.means,
            self.seen,
            momentum=self.momentum,
            gradient=self.gradient,
            ignore_index=IGNORE_INDEX,
            backend=self.backend_for("cpp", "cuda"),
        )
        return means, self.seen.clone()

    def backend_for(self, *supported: str) -> Backend:
        """The backend for one of this loss's ops: the chosen one where the op has it, else "auto"."""
        fits = self.backend in ("eager", *supported)
        return self.backend if fits else "auto"

    def extra_repr(self) -> str:
        return f"{self.num_classes}, {self.dim}, momentum={self.momentum}, gradient={self.gradient!r}"


def cross_entropy(logits: Tensor, labels: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the rows whose label is not -100; 0, not NaN, when there are none.

    Args:
        logits: [N, C] floating.
        labels: [N] int64, already checked.
        weight: [C] weight of each class; the mean is then over the weights, as in torch.

    Returns:
        Scalar, float32 (float64 for float64 logits).
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    weight = None if weight is None else weight.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORE_INDEX, reduction="sum")
    use = labels != IGNORE_INDEX  # [N]
    rows = use.to(logits.dtype) if weight is None else weight[labels.where(use, 0)] * use
    count = rows.sum()
    return total / count.where(count > 0, 1)


def checked_logits(logits: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Logits in their accumulation type and labels, after checking both.

    Raises:
        TypeError, ValueError: logits not [N, num_classes] floating, or labels not [N] int64 in range.
    """
    check_floating("logits", logits)
    check_shape("logits", logits, ("N", num_classes))
    check_labels(labels, logits.shape[0])
    check_same_device(logits=logits, labels=labels)
    labels = validated_labels(labels, num_classes, IGNORE_INDEX)
    return logits.to(accumulation_dtype(logits.dtype)), labels


def checked_counts(class_counts: Tensor | Sequence[int]) -> Tensor:
    """Class counts as float64 [C] on the CPU, classes without a training image counted as one image.

    One image instead of none keeps log-frequencies, margins and inverse frequencies finite; such a class
    has no label in training, so the value only says how far its logit is pushed down.

    Raises:
        TypeError, ValueError: not one-dimensional whole numbers >= 0, fewer than two classes, or no image
            at all.
    """
    counts = torch.as_tensor(class_counts).detach().cpu()
    if counts.dim() != 1 or len(counts) < 2:
        raise ValueError(f"class_counts must have shape [C] with C >= 2; got {list(counts.shape)}")
    if counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"class_counts must be whole numbers; got {counts.dtype}")
    values = counts.double()
    if not bool((values.isfinite() & (values >= 0) & (values == values.round())).all()):
        raise ValueError(f"class_counts must be whole numbers >= 0; got {counts.tolist()}")
    if not bool((values > 0).any()):
        raise ValueError("class_counts must hold at least one training image; got zeros only")
    return values.clamp(min=1)


def check_integer(name: str, value: object, *, minimum: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer >= minimum."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}; got {value}")


def check_interval(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number in the interval."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below and math.isfinite(value)):
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == math.inf else ']'}"
        raise ValueError(f"{name} must be in {bounds}; got {cast(float, value):g}")
