"""The loss: section `loss` of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from allnc._checks import check_interval
from allnc.config.fields import check_fields

CONTRASTIVE = ("supcon", "bcl", "proco")  # the baselines that contrast projections beside a classification loss
COMPARING = ("allnc", *CONTRASTIVE, "ntce", "nonl")  # the losses that look at the class of several images at once
REWEIGHTED = ("ce", "focal", "ldam", "mse")  # the losses that deferred re-weighting serves

_NOT_NEGATIVE = (
    "hycon_weight",
    "classification_weight",
    "alpha",
    "mean_weight",
    "p2p_means",
    "p2p_weights",
    "p2p_duality",
    "tau",
    "focal_gamma",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The loss: AllNC with its parts, or one classification loss alone.

    Args:
        name: allnc, or the baseline trained on the uniform branch alone: ce, logit_adjusted, focal, class_balanced,
            ldam, mse, ntce and nonl (which normalise each class over the batch; for a normalised classifier), etf_dr
            (dot regression, for the etf classifier); or with a contrast of the projections, weighed by hycon_weight,
            supcon (beside ce), bcl and proco (beside logit_adjusted).
        hycon: form of HyCon: softmax (projected, with negatives), cosine (positives only) or none.
        hycon_weight: weight of HyCon beside P2P on the means, or of the contrast of supcon, bcl and proco, >= 0.
        classification_weight: weight of the classification loss of supcon, bcl and proco beside the contrast, >= 0; 0:
            the encoder learns by the contrast alone, and the classifier in the second stage (train.retrain_epochs).
        alpha: weight of HyCon and P2P on the means against classification, >= 0.
        temperature: temperature of softmax HyCon, or of the contrast of supcon, bcl and proco, > 0.
        mean_weight: weight of the own class mean among the positives of softmax HyCon, >= 0.
        balance: column weights of softmax HyCon: class (each class counts once) or none (as SupCon).
        ema_momentum: share of the old class mean kept at each step, in [0, 1).
        mean_gradient: gradient through the class means: exact, or straight_through (that of the batch mean).
        p2p_means: weight of P2P between the class means, >= 0.
        p2p_weights: weight of P2P between the classifier's vectors, >= 0; None: 1 where there is a simplex for them
            (C <= F + 1), else 0.
        p2p_duality: weight of P2P between means and classifier vectors, >= 0; None as for p2p_weights.
        p2p_target: softmax (separation), etf (squared distance to a simplex), or auto: etf where there is a simplex.
        p2p_temperature: temperature of P2P's softmax target, > 0.
        p2p_centre: whether P2P subtracts from the class vectors what all of them share, as it does from the class
            means. True suits a linear classifier, whose softmax is the same without it; false compares the vectors of a
            normalised classifier as they predict.
        rebalance: loss of the re-balancing branch.
        tau: strength of the logit adjustment, wherever it is used, >= 0.
        label_smoothing: share of the target that is spread over all classes, in [0, 1), for cross-entropy and logit
            adjustment, alone or in the re-balancing branch.
        focal_gamma: exponent of the focal loss, wherever it is used, >= 0.
        drw: share of training, in [0, 1), after which classes weigh by the inverse of their effective number of images
            (deferred re-weighting), for ce, focal, ldam and mse; None: never.
        class_weights: weights of the classes in the loss, for ce, focal, ldam and mse, instead of drw: auto, the
            inverse of the class's number of images; or {name: weight}, >= 0, such as {"lynx": 3}, 1 for classes that
            are not named. The mean is over the weights, so that only their ratios matter. (class_balanced, the
            published form, weighs by effective numbers of images.) None: all alike.
        gamma: exponent of the schedule: eta = 1 - min(1, progress / horizon) ** gamma, > 0.
        horizon: share of training after which the re-balancing branch alone remains, in [0, 1]; 1 is the source's, 0:
            from the start.
        backend: implementation of the ops; auto takes the fastest that can run.
    """

    name: Literal[
        "allnc",
        "ce",
        "logit_adjusted",
        "focal",
        "class_balanced",
        "ldam",
        "mse",
        "ntce",
        "nonl",
        "etf_dr",
        "supcon",
        "bcl",
        "proco",
    ] = "allnc"
    hycon: Literal["softmax", "cosine", "none"] = "softmax"
    hycon_weight: float = 1.0
    classification_weight: float = 1.0
    alpha: float = 1.0
    temperature: float = 0.1
    mean_weight: float = 1.0
    balance: Literal["class", "none"] = "class"
    ema_momentum: float = 0.9
    mean_gradient: Literal["exact", "straight_through"] = "straight_through"
    p2p_means: float = 1.0
    p2p_weights: float | None = None
    p2p_duality: float | None = None
    p2p_target: Literal["auto", "etf", "softmax"] = "softmax"
    p2p_temperature: float = 0.1
    p2p_centre: bool = True
    rebalance: Literal["ce", "logit_adjusted", "focal", "class_balanced", "ldam"] = "logit_adjusted"
    tau: float = 1.0
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    drw: float | None = None
    class_weights: Literal["auto"] | dict[str, float] | None = field(default=None, hash=False)  # a dict has no hash
    gamma: float = 2.0
    horizon: float = 0.3
    backend: Literal["auto", "eager", "cpp", "triton", "cuda"] = "auto"

    @property
    def contrast(self) -> Literal["softmax", "cosine", "none"]:
        """The form of HyCon that is computed: none where its weight is 0."""
        return self.hycon if self.alpha * self.hycon_weight > 0 else "none"

    def p2p(self, num_classes: int, feature_dim: int) -> tuple[float, float, float]:
        """The weights of P2P on means, classifier and duality for C classes and F features.

        More classes than a simplex has vertices cannot all be equally far from each other: which are near is left to
        the images, as far as the classifier goes.
        """
        default = 1.0 if num_classes <= feature_dim + 1 else 0.0
        given = (self.p2p_means, self.p2p_weights, self.p2p_duality)
        means, weights, duality = (default if weight is None else weight for weight in given)
        return means, weights, duality

    def __post_init__(self) -> None:
        if isinstance(self.class_weights, dict):  # YAML reads the name 3 as a number
            named = {str(name) if type(name) is int else name: w for name, w in self.class_weights.items()}
            object.__setattr__(self, "class_weights", named)
        check_fields("loss", self)
        for name in _NOT_NEGATIVE:
            if getattr(self, name) is not None:
                check_interval(f"loss.{name}", getattr(self, name), 0, math.inf)
        for name in ("temperature", "p2p_temperature", "gamma"):
            check_interval(f"loss.{name}", getattr(self, name), 0, math.inf, open_low=True)
        check_interval("loss.ema_momentum", self.ema_momentum, 0, 1, open_high=True)
        check_interval("loss.horizon", self.horizon, 0, 1)
        check_interval("loss.label_smoothing", self.label_smoothing, 0, 1, open_high=True)
        if self.drw is not None:
            check_interval("loss.drw", self.drw, 0, 1, open_high=True)
            if self.class_weights is not None:
                raise ValueError(
                    f"loss.drw and loss.class_weights exclude each other: both weigh the classes; got drw {self.drw}: "
                    "set loss.drw null or loss.class_weights null"
                )
        if isinstance(self.class_weights, dict):
            for name, weight in self.class_weights.items():
                check_interval(f"loss.class_weights of {name!r}", weight, 0, math.inf)
