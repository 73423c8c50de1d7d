"""What the losses share: their output, the running class means, and checked class counts and logits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allnc._checks import check_choice, check_integer, check_interval
from allnc.config import LossConfig
from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_floating,
    check_labels,
    check_same_device,
    check_shape,
    validated_labels,
)
from allnc.ops.class_mean import MeanGradient, class_mean_ema
from allnc.ops.ranks import Ranks, sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
        check_choice("gradient", gradient, get_args(MeanGradient))
        check_choice("backend", backend, get_args(Backend))
        self.num_classes, self.dim = num_classes, dim
        self.momentum = momentum
        self.gradient: MeanGradient = gradient
        self.backend: Backend = backend
        self.register_buffer("means", torch.zeros(num_classes, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def update(
        self, features: Tensor, labels: Tensor, group: ProcessGroup | Ranks | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fold a batch into the means (in training mode only) and return means and mask for one loss.

        Args:
            features: [N, D] floating.
            labels: [N] int64 in [0, C) or -100.
            group: the batch is that of all ranks, as in `allnc.class_mean_ema`.

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
            group=group,
            backend=backend_for(self.backend, "cpp", "cuda"),
        )
        return means, self.seen.clone()

    def extra_repr(self) -> str:
        return f"{self.num_classes}, {self.dim}, momentum={self.momentum}, gradient={self.gradient!r}"


def backend_for(backend: Backend, *supported: str) -> Backend:
    """The backend for one of a loss's ops: the chosen one where the op has it, else "auto"."""
    return backend if backend in ("eager", *supported) else "auto"


def mean_of_rows(total: Tensor, count: Tensor, group: ProcessGroup | None) -> Tensor:
    """total / count, both 0-dim sums over rows; 0, not NaN, when there are none.

    With a group, both are summed over its ranks first; the gradient is this rank's share.
    """
    if group is not None:
        total, count = sum_over_ranks(torch.stack([total, count.to(total.dtype)]), group)
    return total / count.where(count > 0, 1)


def mean_of_losses(
    losses: Tensor, labels: Tensor, *, class_weight: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Mean over the rows whose label is not -100, each weighed by its class; 0, not NaN, when there are none.

    Args:
        losses: [N] floating, the loss of each row.
        labels: [N] int64, already checked.
        class_weight: [C] weight of each class; None weighs all rows alike.
        group: the rows are those of all ranks, as in `mean_of_rows`.
    """
    use = labels != IGNORE_INDEX  # [N]
    weight = use.to(losses.dtype)
    if class_weight is not None:
        weight = class_weight.to(losses.dtype)[labels.where(use, 0)] * use
    return mean_of_rows((weight * losses.where(use, 0)).sum(), weight.sum(), group)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Mean cross-entropy of the rows whose label is not -100; 0, not NaN, when there are none.

    Args:
        logits: [N, C] floating.
        labels: [N] int64, already checked.
        class_weight: [C] weight of the rows of each class; the mean is then over the weights.
        label_smoothing: share of the target that is spread over all C classes, in [0, 1).
        group: the rows are those of all ranks, as in `mean_of_rows`.

    Returns:
        Scalar, float32 (float64 for float64 logits).
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    options = {"ignore_index": IGNORE_INDEX, "label_smoothing": label_smoothing}
    if class_weight is not None:  # of the row's class alone: torch would weigh the smoothed share by the other classes
        losses = F.cross_entropy(logits, labels, reduction="none", **options)
        return mean_of_losses(losses, labels, class_weight=class_weight, group=group)
    total = F.cross_entropy(logits, labels, reduction="sum", **options)
    return mean_of_rows(total, (labels != IGNORE_INDEX).sum().to(logits.dtype), group)


def effective_number_weights(class_counts: Tensor | Sequence[int], beta: float = 0.9999) -> Tensor:
    """Class weights (1 - β) / (1 - β^n_c), the inverse of the effective number of images, as float32 [C].

    Args:
        class_counts: [C] training images of each class, >= 0.
        beta: β in [0, 1); 0 weighs all classes alike, β -> 1 by 1/n_c.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019.
    """
    check_interval("beta", beta, 0, 1, open_high=True)
    return ((1 - beta) / (1 - beta ** checked_counts(class_counts))).float()


def class_weights(
    weights: Literal["auto"] | Mapping[str, float], class_counts: Tensor | Sequence[int], classes: Sequence[str]
) -> Tensor:
    """Weights of the classes for a loss that takes a `class_weight`, as float32 [C].

    Args:
        weights: auto, the inverse of the class's number of images, C classes of which have the mean 1; or the weight
            >= 0 of classes by name, 1 for those that are not named.
        class_counts: [C] training images of each class, >= 0.
        classes: the C names.

    Raises:
        TypeError, ValueError: a name that no class has, a weight that is no number >= 0, or zeros alone.

    Example:
        >>> class_weights("auto", [3, 1], ["cat", "lynx"]).tolist()
        [0.5, 1.5]
        >>> class_weights({"lynx": 2}, [3, 1], ["cat", "lynx"]).tolist()
        [1.0, 2.0]
    """
    counts = checked_counts(class_counts)
    if isinstance(weights, str):
        check_choice("class_weights", weights, ("auto",))
        return (1 / counts / (1 / counts).mean()).float()
    if not isinstance(weights, Mapping):
        raise TypeError(f"class_weights must be auto or a weight for each name of a class; got {weights!r}")
    if len(classes) != len(counts):
        raise ValueError(f"classes must be the names of {len(counts)} classes; got {len(classes)}")
    place = {name: index for index, name in enumerate(classes)}
    found = torch.ones(len(counts))
    for name, weight in weights.items():
        if name not in place:
            near = difflib.get_close_matches(str(name), classes, n=1)
            hint = (
                f"; did you mean {near[0]!r}?"
                if near
                else f": the classes are {', '.join(classes[:10])}" + (" ..." if len(classes) > 10 else "")
            )
            raise ValueError(f"class_weights must name classes of the training images; got {name!r}{hint}")
        check_interval(f"class_weights of {name!r}", weight, 0)
        found[place[name]] = weight
    if not bool((found > 0).any()):
        raise ValueError("class_weights must be > 0 for one class at least; got zeros only")
    return found


def check_branch(name: str, branch: object) -> None:
    """Raise TypeError unless a branch of the classification is a pair of logits and labels."""
    if not isinstance(branch, (tuple, list)) or len(branch) != 2:
        got = f"{len(branch)} values" if isinstance(branch, (tuple, list)) else type(branch).__name__
        raise TypeError(f"{name} must be a pair (logits [N, C], labels [N]); got {got}")


def check_config(config: object, names: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless a loss's settings are a `LossConfig` of one of these names."""
    if not isinstance(config, LossConfig):
        raise TypeError(f"config must be an allnc.config.LossConfig; got {type(config).__name__}")
    if config.name not in names:
        raise ValueError(f"config.name must be {' or '.join(names)}; got {config.name}, which build_loss builds")


def checked_logits(
    logits: Tensor, labels: Tensor, num_classes: int, class_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits in their accumulation type and labels, after checking both, and the weights of the classes if given.

    Raises:
        TypeError, ValueError: logits not [N, num_classes] floating, labels not [N] int64 in range, or class_weight not
            [num_classes] floating.
    """
    check_floating("logits", logits)
    check_shape("logits", logits, ("N", num_classes))
    check_labels(labels, logits.shape[0])
    if class_weight is not None:
        check_floating("class_weight", class_weight)
        check_shape("class_weight", class_weight, (num_classes,))
    check_same_device(logits=logits, labels=labels, class_weight=class_weight)
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
    try:
        counts = torch.as_tensor(class_counts).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"class_counts must be the training images of each class, a list or a tensor [C]; got {class_counts!r}"
        ) from None
    if counts.dim() != 1 or len(counts) < 2:
        raise ValueError(
            f"class_counts must have shape [C] with C >= 2; got {list(counts.shape)}. "
            "It holds the training images of each class"
        )
    if counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"class_counts must be whole numbers; got {counts.dtype}")
    values = counts.double()
    if not bool((values.isfinite() & (values >= 0) & (values == values.round())).all()):
        raise ValueError(f"class_counts must be whole numbers >= 0; got {counts.tolist()}")
    if not bool((values > 0).any()):
        raise ValueError("class_counts must hold at least one training image; got zeros only")
    return values.clamp(min=1)
