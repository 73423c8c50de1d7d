"""The unconstrained-feature model: last-layer features and classifier as free variables of the losses that train.

    f(W, H, b) = Σ_i ℓ(W h_i + b, y_i) / N + ½ (λ_W ‖W‖² + λ_H ‖H‖² + λ_b ‖b‖²) + w·P2P

ℓ is a loss of `allnc.losses`, in float64. The squared error is ½ ‖z - onehot‖², which is `MeanSquaredError` in other
units: K/450 of its value at 15 z. Of SupCon there are only features, on the unit sphere, and no penalty. A normalised
classifier's logits are s times the cosine, so that lengths, penalty and bias have no meaning and are left out.

The features of a class may be held together ("classes": one row h_k that counts n_k times). For losses that are convex
in the logits this loses no minimiser: replacing the features of a class by their mean lowers f.

Legend: K classes, n_k samples of class k, N samples in all, R rows of features (N, or K), d columns, P variables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from allnc._checks import check_choice, check_integer, check_interval
from allnc.losses.longtail import CrossEntropy, Focal
from allnc.losses.regression import MeanSquaredError
from allnc.ops.hycon import hycon_reference
from allnc.ops.p2p import p2p_reference

LossName = Literal["ce", "ls", "fl", "mse", "logit_adjusted", "supcon"]
Rows = Literal["samples", "classes"]
Classifier = Literal["linear", "normalised"]
P2PTarget = Literal["etf", "softmax"]
CONVEX: tuple[LossName, ...] = ("ce", "ls", "mse", "logit_adjusted")  # in the logits


class Point(NamedTuple):
    """The variables by name."""

    W: Tensor  # [K, d] classifier vectors; no rows for SupCon
    H: Tensor  # [R, d] features, already non-negative with `relu`
    b: Tensor  # [K] bias, zeros without one


class Coefficients(NamedTuple):
    """What may differ between problems that are minimised together."""

    share: Tensor  # [K] n_k / N
    row_count: Tensor  # [R] samples that a row of features stands for
    log_prior: Tensor  # [K] τ log(n_k / N), zeros unless the logits are adjusted
    lambdas: Tensor  # [3] λ_W, λ_H, λ_b


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An objective of the unconstrained-feature model.

    Attributes:
        loss: "ce", "ls" (label smoothing), "fl" (focal), "mse" (½ ‖z - onehot‖²), "logit_adjusted" or "supcon".
        counts: n_k >= 1 for each of K >= 2 classes; >= 2 for SupCon, which needs a positive.
        dim: d >= 1.
        lambda_w, lambda_h: penalties > 0 of a linear classifier; 0 where lengths have no meaning.
        lambda_b: penalty >= 0 of the bias, None for no bias.
        smoothing: share in [0, 1) of "ls".
        gamma: exponent >= 0 of "fl".
        tau: strength >= 0 of "logit_adjusted".
        temperature: > 0, of "supcon".
        rows: "samples" for a feature of each sample, "classes" for one of each class; not for "fl", which is not
            convex, and "supcon", which compares samples.
        relu: features h >= 0. They are squares, h = x², which reach the same set as relu(x) without its dead half.
        classifier: "linear", or "normalised" for logits scale · cos(w_k, h_i).
        scale: s > 0 of the normalised classifier.
        p2p: weights w_mm, w_ww, w_mw >= 0 of P2P of class means, classifier vectors, and both.
        p2p_target: "etf" (squared distance of the cosines to a simplex's) or "softmax" (separation).
        p2p_temperature: > 0, of the target "softmax".

    Raises:
        TypeError, ValueError: a value out of its range, or one that another makes meaningless.

    Source: Zhou et al., Are All Losses Created Equal, NeurIPS 2022; P2P and normalised classifier: ours.
    """

    loss: LossName
    counts: tuple[int, ...]
    dim: int
    lambda_w: float = 5e-3
    lambda_h: float = 5e-3
    lambda_b: float | None = 1e-2
    smoothing: float = 0.05
    gamma: float = 3.0
    tau: float = 1.0
    temperature: float = 0.5
    rows: Rows = "samples"
    relu: bool = False
    classifier: Classifier = "linear"
    scale: float = 16.0
    p2p: tuple[float, float, float] = (0.0, 0.0, 0.0)
    p2p_target: P2PTarget = "etf"
    p2p_temperature: float = 0.1

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, get_args(LossName))
        check_choice("rows", self.rows, get_args(Rows))
        check_choice("classifier", self.classifier, get_args(Classifier))
        check_choice("p2p_target", self.p2p_target, get_args(P2PTarget))
        if len(self.counts) < 2:
            raise ValueError(f"counts must hold at least two classes; got {self.counts}")
        for count in self.counts:
            check_integer("counts", count, minimum=2 if self.loss == "supcon" else 1)
        check_integer("dim", self.dim, minimum=1)
        check_interval("smoothing", self.smoothing, 0, 1, open_high=True)
        check_interval("gamma", self.gamma, 0)
        check_interval("tau", self.tau, 0)
        check_interval("temperature", self.temperature, 0, open_low=True)
        check_interval("scale", self.scale, 0, open_low=True)
        check_interval("p2p_temperature", self.p2p_temperature, 0, open_low=True)
        for weight in self.p2p:
            check_interval("p2p", weight, 0)
        if self.lambda_b is not None:
            check_interval("lambda_b", self.lambda_b, 0)
        spherical = self.spherical
        for name, value in (("lambda_w", self.lambda_w), ("lambda_h", self.lambda_h)):
            check_interval(name, value, 0, open_low=not spherical)
            if spherical and value:
                raise ValueError(f"{name} must be 0 where only directions count; got {value}")
        if spherical and self.lambda_b is not None:
            raise ValueError(f"lambda_b must be None where only directions count; got {self.lambda_b}")
        if self.rows == "classes" and self.loss not in CONVEX:
            raise ValueError(f"rows must be 'samples' with loss {self.loss!r}; got 'classes'")
        if self.loss == "supcon" and (any(self.p2p) or self.classifier == "normalised"):
            raise ValueError("loss supcon has no classifier: p2p must be zeros and classifier 'linear'")

    @property
    def spherical(self) -> bool:
        """Whether only directions count, and no penalty can hold the lengths."""
        return self.loss == "supcon" or self.classifier == "normalised"

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.counts)

    @property
    def num_samples(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def labels(self) -> Tensor:
        """[R] int64, the class of each row of features."""
        classes = torch.arange(self.num_classes)
        return classes if self.rows == "classes" else classes.repeat_interleave(torch.tensor(self.counts))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of variables of W, H and b."""
        rows = self.num_classes if self.rows == "classes" else self.num_samples
        of_w = 0 if self.loss == "supcon" else self.num_classes * self.dim
        return of_w, rows * self.dim, 0 if self.lambda_b is None else self.num_classes

    @property
    def root_of_penalties(self) -> float:
        """sqrt(λ_W λ_H), to which the gradient by the logits is compared."""
        return math.sqrt(self.lambda_w * self.lambda_h)

    @property
    def per_class(self) -> int:
        """n, for equal counts.

        Raises:
            ValueError: counts that differ.
        """
        if len(set(self.counts)) > 1:
            raise ValueError(f"counts must be equal for a closed form; got {self.counts}")
        return self.counts[0]

    def coefficients(self) -> Coefficients:
        """The numbers of the objective, float64."""
        counts = torch.tensor(self.counts, dtype=torch.float64)
        share = counts / counts.sum()
        adjusted = self.loss == "logit_adjusted"
        row_count = counts if self.rows == "classes" else torch.ones(self.num_samples, dtype=torch.float64)
        lambdas = torch.tensor([self.lambda_w, self.lambda_h, self.lambda_b or 0.0], dtype=torch.float64)
        return Coefficients(share, row_count, self.tau * share.log() if adjusted else torch.zeros_like(share), lambdas)

    def point(self, x: Tensor) -> Point:
        """W, H and b of the variables x [P]."""
        of_w, of_h, of_b = self.sizes
        W, raw, b = x.split([of_w, of_h, of_b])
        H = raw.view(-1, self.dim)
        b = b if of_b else x.new_zeros(self.num_classes)
        return Point(W.view(-1, self.dim), H.square() if self.relu else H, b)

    def variables(self, W: Tensor, H: Tensor, b: Tensor | None = None) -> Tensor:
        """x [P] of W [K, d], H [R, d] and b [K] (zeros by default), the inverse of `point`."""
        of_b = self.sizes[2]
        b = W.new_zeros(of_b) if b is None else b[:of_b]
        return torch.cat([W.flatten()[: self.sizes[0]], (H.sqrt() if self.relu else H).flatten(), b])

    def logits(self, point: Point) -> Tensor:
        """z [R, K] without the log prior."""
        if self.classifier == "normalised":
            return self.scale * F.normalize(point.H, dim=1) @ F.normalize(point.W, dim=1).T
        return point.H @ point.W.T + point.b

    def mean_loss(self, logits: Tensor, coefficients: Coefficients) -> Tensor:
        """Σ_i ℓ(z_i, y_i) / N of logits [R, K], a scalar. SupCon has no logits."""
        adjusted = logits + coefficients.log_prior
        weight = coefficients.share if self.rows == "classes" else None
        num_classes = self.num_classes
        if self.loss == "fl":
            return Focal(num_classes, gamma=self.gamma)(adjusted, self.labels, weight)
        if self.loss == "mse":
            return MeanSquaredError(num_classes)(15 * adjusted, self.labels, weight) * (num_classes / 450)
        # `LogitAdjusted` takes no class weights and keeps its log prior in float32: the same formula in float64.
        smoothing = self.smoothing if self.loss == "ls" else 0.0
        return CrossEntropy(num_classes, label_smoothing=smoothing)(adjusted, self.labels, weight)

    def value(self, x: Tensor, coefficients: Coefficients | None = None) -> Tensor:
        """f at x, differentiable any number of times.

        Args:
            x: [P] float64.
            coefficients: of another problem of the same structure; default: this one's.

        Returns:
            Scalar float64.
        """
        coefficients = coefficients or self.coefficients()
        point = self.point(x)
        if self.loss == "supcon":
            z = F.normalize(point.H, dim=1)
            return hycon_reference(z, self.labels, temperature=self.temperature, balance="none")
        total = self.mean_loss(self.logits(point), coefficients)
        if not self.spherical:
            squares = [point.W.square().sum(), coefficients.row_count @ point.H.square().sum(1), point.b.square().sum()]
            total = total + coefficients.lambdas @ torch.stack(squares) / 2
        if any(self.p2p):
            total = total + self.p2p_value(point)
        return total

    def p2p_value(self, point: Point) -> Tensor:
        """w_mm P2P(means) + w_ww P2P(classifier) + w_mw P2P(both); the classifier's unit vectors if normalised."""
        W, H = point.W, point.H
        if self.classifier == "normalised":
            W, H = F.normalize(W, dim=1), F.normalize(H, dim=1)
        means = H if self.rows == "classes" else class_means(H, self.labels, self.num_classes)
        pairs = ((means, None), (W, None), (means, W))
        form = {"target": self.p2p_target, "temperature": self.p2p_temperature}
        terms = [weight * p2p_reference(x, y, **form) for weight, (x, y) in zip(self.p2p, pairs, strict=True) if weight]
        return torch.stack(terms).sum()

    def random_starts(self, number: int, *, seed: int = 0, size: float = 1.0) -> Tensor:
        """Variables [number, P] from a normal distribution of standard deviation `size`."""
        check_integer("number", number, minimum=1)
        generator = torch.Generator().manual_seed(seed)
        return size * torch.randn(number, sum(self.sizes), dtype=torch.float64, generator=generator)


def class_means(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean of the rows [R, d] of each class, [K, d]."""
    onehot = F.one_hot(labels, num_classes).to(rows.dtype)  # [R, K]
    return (onehot / onehot.sum(0)).T @ rows
