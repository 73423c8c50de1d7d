"""Class means and within-class scatter in one pass over batches, in float64, mergeable across processes.

Each batch's means and centred scatter are folded in with Chan's update. Raw moments (Σ f and Σ f fᵀ) would
lose the scatter of features with a large offset to cancellation.

Legend: N activations, F features, C classes; n_c, μ_c count and mean of a class;
S_c = Σ_{i in c} (f_i - μ_c)(f_i - μ_c)ᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from allnc.metrics.measures import Center, Moments, Within, check_measurable, collapse_from_moments
from allnc.metrics.spectrum import spectral_measures
from allnc.ops._common import check_choice, check_floating, check_labels, check_shape

Gather = Callable[[Any], list[Any]]  # what every process passes, in one order on all

_MATRIX_ENTRIES = 1 << 25  # 256 MB in float64: the largest scatter kept for each class separately


class CollapseAccumulator:
    """Neural-collapse measures of a data set that is seen once, batch by batch.

    NC4 compares each sample with the final class means. Either `update` gets the logits and keeps the
    features for it, or a second pass does it: `count_disagreement`.

    Args:
        num_classes: C >= 2.
        dim: F, width of the features.
        class_counts: [C] number of samples of each class that the whole pass will see, all ranks together.
            With it, or with within="pooled", one F x F matrix is kept. Without it one such matrix per class
            is kept, because classes cannot be weighed before they are counted.
        within: "classes" averages the within-class covariance over classes, "pooled" over samples.
        device: where the sums are kept.

    Raises:
        ValueError: an argument out of range, or no memory to keep a matrix per class.

    Example:
        >>> import torch
        >>> collapse_of = CollapseAccumulator(num_classes=3, dim=2)
        >>> labels = torch.tensor([0, 1, 2])
        >>> for _ in range(4):
        ...     collapse_of.update(torch.eye(3)[:, :2] + 0.01 * torch.randn(3, 2), labels)
        >>> measures = collapse_of.compute(weight=torch.eye(3)[:, :2])
        >>> "nc1" in measures, "nc4" in measures
        (True, False)
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        class_counts: Tensor | Sequence[int] | None = None,
        within: Within = "classes",
        device: torch.device | str = "cpu",
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2; got {num_classes}")
        if dim < 1:
            raise ValueError(f"dim must be >= 1; got {dim}")
        check_choice("within", within, ("classes", "pooled"))
        self.num_classes, self.dim = num_classes, dim
        self.within: Within = within
        f64 = {"dtype": torch.float64, "device": device}
        self.counts = torch.zeros(num_classes, **f64)  # [C]
        self.means = torch.zeros(num_classes, dim, **f64)  # [C, F]
        self.traces = torch.zeros(num_classes, **f64)  # [C], tr S_c
        self.nearest = torch.zeros(2, **f64)  # samples of the second pass: disagreeing, all
        self.kept: list[tuple[Tensor, Tensor]] = []  # features [N, F] and predictions [N] of batches with logits
        self.expected: Tensor | None = None  # [C], the announced class counts
        self.class_weight: Tensor | None = None  # [C], weight of S_c in the one matrix kept
        if within == "pooled":
            self.class_weight = torch.ones(num_classes, **f64)
        elif class_counts is not None:
            self.expected = torch.as_tensor(class_counts).to(**f64)
            check_shape("class_counts", self.expected, (num_classes,))
            self.class_weight = 1 / self.expected.clamp(min=1)
        elif num_classes * dim * dim > _MATRIX_ENTRIES:
            raise ValueError(
                f"class_counts must be given for {num_classes} classes of {dim} features: without it a "
                f"matrix of {dim} x {dim} is kept for each class. Or choose within='pooled'"
            )
        groups = num_classes if self.class_weight is None else 1
        self.scatter = torch.zeros(groups, dim, dim, **f64)  # [C, F, F] S_c, or [1, F, F] Σ_c weight_c S_c

    def update(self, features: Tensor, labels: Tensor, logits: Tensor | None = None) -> None:
        """Fold in a batch.

        Args:
            features: [N, F] floating, any device.
            labels: [N] int64 in [0, C).
            logits: [N, C] floating, bias included. With them NC4 needs no second pass, at the price of
                keeping the features (in their own type) until `compute`.

        Raises:
            TypeError, ValueError: wrong types, shapes or labels; features that are not finite or beyond 1e60, logits
                that are NaN. Nothing of the batch is folded in then.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        if logits is not None:
            check_shape("logits", logits, (labels.shape[0], self.num_classes))
            predictions = predictions_of(logits).to(self.counts.device)
            kept.append((features.detach().to(self.counts.device), predictions))
        features, labels = self._checked(features, labels)
        self.kept += kept
        classes, row_class = labels.unique(return_inverse=True)  # [U], [N]: of many classes a batch has few
        counts = torch.bincount(row_class, minlength=len(classes)).to(features)
        means = features.new_zeros(len(classes), self.dim).index_add_(0, row_class, features) / counts[:, None]
        centred = features - means[row_class]  # [N, F]
        traces = torch.zeros_like(counts).index_add_(0, row_class, centred.square().sum(1))
        self._add_scatter(centred, labels, torch.ones_like(centred[:, 0]))
        self._merge(classes, counts, means, traces)

    def merge(self, other: CollapseAccumulator) -> None:
        """Fold in what another accumulator of the same settings has seen.

        Raises:
            ValueError: the settings differ.
        """
        self.merge_state(other.state())
        self.kept += other.kept

    def state(self) -> dict[str, Tensor]:
        """The sums, as float64 tensors of fixed shapes: to save, or to gather across ranks.

        Samples kept for NC4 are not among them: across ranks, merge first and take the second pass, whose "nearest"
        adds up over ranks.
        """
        names = ("counts", "means", "traces", "scatter", "nearest")
        return {name: getattr(self, name).clone() for name in names}

    def merge_state(self, state: dict[str, Tensor]) -> None:
        """Fold in the `state` of another accumulator of the same settings.

        Raises:
            ValueError: the shapes differ, or an entry is not finite.
        """
        for name in ("counts", "means", "traces", "scatter", "nearest"):
            check_shape(f"state[{name!r}]", state[name], tuple(getattr(self, name).shape))
            if not bool(state[name].isfinite().all()):
                raise ValueError(f"state[{name!r}] must be finite; got NaN or infinity")
        moved = {name: tensor.to(self.counts) for name, tensor in state.items()}
        self.nearest += moved["nearest"]
        self.scatter += moved["scatter"]
        seen = torch.nonzero(moved["counts"] > 0).squeeze(1)
        self._merge(seen, *(moved[name][seen] for name in ("counts", "means", "traces")))

    def count_disagreement(self, features: Tensor, predictions: Tensor) -> None:
        """Second pass for NC4: count the samples whose predicted class is not that of the nearest class mean.

        Call it for every batch once all were folded in (and merged), instead of giving logits to `update`.

        Args:
            features: [N, F] floating.
            predictions: [N] int64, argmax of the logits.

        Raises:
            TypeError, ValueError: wrong types or shapes.
        """
        features, predictions = self._checked(features, predictions, name="predictions")
        self.nearest += self._disagreement(features, predictions)

    @property
    def moments(self) -> Moments:
        """Counts, means and traces of everything folded in so far, e.g. for `by_shot`; not copies."""
        return Moments(self.counts, self.means, self.traces)

    def compute(
        self,
        weight: Tensor | None,
        bias: Tensor | None = None,
        *,
        center: Center = "class",
        spectral: bool = False,
    ) -> dict[str, float]:
        """The measures of everything folded in so far; "nc4" only with logits or after the second pass.

        Args:
            weight: [C, F] floating, classifier weight; None for features that no classifier reads, and then the
                measures of the weight and NC3 are left out.
            bias: [C] or None; no measure but NC4 reads it, so it is only checked here.
            center: global mean, "class" (mean of the class means) or "samples".
            spectral: also those of `allnc.metrics.spectrum`.

        Returns:
            As `collapse`.

        Raises:
            ValueError: fewer than two classes seen, counts that are not the announced class_counts, or a weight or bias
                that is not finite.
        """
        if bias is not None:
            check_floating("bias", bias)
            check_shape("bias", bias, (self.num_classes,))
            check_measurable("bias", bias)
        if self.expected is not None and not torch.equal(self.counts, self.expected):
            wrong = int((self.counts != self.expected).nonzero()[0])
            raise ValueError(
                f"class_counts must be what the pass has seen; got {self.expected[wrong]:g} announced and "
                f"{self.counts[wrong]:g} seen of class {wrong}"
            )
        covariance = self.within_covariance()
        measures = collapse_from_moments(*self.moments, covariance, weight, center=center, within=self.within)
        if spectral:
            measures |= spectral_measures(self.counts, self.means, covariance, weight, center=center)
        nearest = self.nearest.clone()
        for features, predictions in self.kept:
            nearest += self._disagreement(features.to(self.counts), predictions)
        if nearest[1] > 0:
            measures["nc4"] = float(nearest[0] / nearest[1])
        return measures

    def _disagreement(self, features: Tensor, predictions: Tensor) -> Tensor:
        """[2]: samples whose prediction is not the nearest class mean, and all samples."""
        centre = self.means[self.counts > 0].mean(0)  # products of centred vectors lose nothing to an offset
        means = self.means - centre
        closeness = (features - centre) @ means.T - means.square().sum(1) / 2  # [N, C], (‖f‖² - ‖f - μ‖²) / 2
        nearest = closeness.masked_fill(self.counts == 0, -torch.inf).argmax(1)
        disagreeing = (predictions != nearest).sum()
        return torch.stack((disagreeing, torch.full_like(disagreeing, len(features)))).to(self.nearest)

    def within_covariance(self) -> Tensor:
        """Σ_W [F, F] of everything folded in so far, by the convention of `within`."""
        present = self.counts > 0
        if self.within == "pooled":
            return self.scatter[0] / self.counts.sum().clamp(min=1)
        num_present = present.sum().clamp(min=1)
        if self.class_weight is not None:
            return self.scatter[0] / num_present
        return torch.einsum("c,cfg->fg", 1 / self.counts.clamp(min=1), self.scatter) / num_present

    def _add_scatter(self, centred: Tensor, classes: Tensor, row_weight: Tensor) -> None:
        """Add Σ_i row_weight_i x_i x_iᵀ, per class or weighted over classes as `self.scatter` is kept."""
        if self.class_weight is not None:
            self.scatter[0] += (centred * (row_weight * self.class_weight[classes])[:, None]).T @ centred
            return
        for c in classes.unique().tolist():
            rows = centred[classes == c]
            self.scatter[c] += (rows * row_weight[classes == c, None]).T @ rows

    def _merge(self, classes: Tensor, counts: Tensor, means: Tensor, traces: Tensor) -> None:
        """Fold in counts > 0, means and traces of some classes [U], whose own scatter is added already."""
        before = self.counts[classes]
        share = counts / (before + counts)  # [U]
        shift = means - self.means[classes]  # [U, F]
        between = before * share  # [U], n_a n_b / (n_a + n_b)
        moved = between > 0
        self._add_scatter(shift[moved], classes[moved], between[moved])
        self.traces[classes] += traces + between * shift.square().sum(1)
        self.means[classes] += shift * share[:, None]
        self.counts[classes] = before + counts

    def _checked(self, features: Tensor, labels: Tensor, name: str = "labels") -> tuple[Tensor, Tensor]:
        check_floating("features", features)
        check_shape("features", features, ("N", self.dim))
        check_labels(labels, features.shape[0])
        labels = labels.to(self.counts.device)
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"{name} must be in [0, {self.num_classes}); got {int(wrong[0])}")
        check_measurable("features", features)
        return features.detach().to(self.counts), labels


def merged_over(
    gather: Gather,
    own: CollapseAccumulator | None,
    *,
    class_counts: Tensor | Sequence[int] | None = None,
    within: Within = "classes",
) -> CollapseAccumulator:
    """What the accumulators of all processes have seen, alike on all; for NC4 the second pass is still to come.

    Args:
        gather: returns what each process passes, in one order on all; all call this together.
        own: of this process; None where it has seen nothing, which some other has.
        class_counts, within: as in `CollapseAccumulator`, of all processes.
    """
    states = [state for state in gather(None if own is None else own.state()) if state is not None]
    merged = CollapseAccumulator(*states[0]["means"].shape, class_counts=class_counts, within=within)
    for state in states:
        merged.merge_state(state)
    return merged


def predictions_of(logits: Tensor) -> Tensor:
    """The class of the largest logit of each row [N], which NaN would be."""
    wrong = logits.isnan()
    if bool(wrong.any()):
        raise ValueError(f"logits must not be NaN; got {int(wrong.any(1).sum())} of {len(logits)} rows with NaN")
    return logits.argmax(1)
