"""What a run is made of: frozen dataclasses, one per owner, checked when they are built.

Only the standard library is imported, and allnc._checks, which imports nothing else. allnc/trainer/options.py turns
configurations into dictionaries and back; the command line (allnc/train.py) builds the same classes from a YAML recipe
and dotted overrides. What one section asks of another is checked in `Config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from allnc._checks import check_interval
from allnc.config.data import (
    ARRAY_ENDINGS,
    BALANCED_SETS,
    BATCH_AUGMENTATIONS,
    FEATURES_MANIFEST,
    SMALL_SETS,
    TEST,
    TRAIN,
    VALIDATION,
    DataConfig,
)
from allnc.config.fields import fits
from allnc.config.loss import COMPARING, CONTRASTIVE, REWEIGHTED, LossConfig
from allnc.config.model import FEATURE_MODELS, ModelConfig
from allnc.config.train import TrainConfig

__all__ = [
    "ARRAY_ENDINGS",
    "BALANCED_SETS",
    "BATCH_AUGMENTATIONS",
    "CONTRASTIVE",
    "FEATURES_MANIFEST",
    "FEATURE_MODELS",
    "REWEIGHTED",
    "SECTIONS",
    "SMALL_SETS",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "Config",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run.

    Args:
        data: the images.
        model: the network.
        loss: the loss.
        train: the optimisation.
        seed: seed of the weights, the batches and the augmentation, in [0, 2**32).
        out: run folder; None makes runs/RECIPE-LOSS-OPTIONS-seedSEED, OPTIONS being those of the command line, with a
            number behind it if that exists.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise ValueError(f"{name} must be a {section.__name__}; got {getattr(self, name)!r}")
        if not (self.out is None or isinstance(self.out, str)):
            raise ValueError(f"out must be of type str or null; got {self.out!r}")
        if not fits(self.seed, int):
            raise ValueError(f"seed must be of type int; got {self.seed!r}")
        check_interval("seed", self.seed, 0, 2**32 - 1)
        if self.loss.name == "allnc" and self.loss.contrast == "cosine" and self.data.views != 2:
            raise ValueError(f"data.views must be 2 with loss.hycon cosine; got {self.data.views}")
        needs = {"etf_dr": ("etf",), "ntce": ("normalised", "etf"), "nonl": ("normalised", "etf")}.get(self.loss.name)
        if needs is not None and self.model.classifier not in needs:
            raise ValueError(
                f"model.classifier must be {' or '.join(needs)} with loss.name {self.loss.name}; got "
                f"{self.model.classifier}"
            )
        if self.model.classifier == "etf" and (self.model.name == "linear" or self.model.tune == "head"):
            raise ValueError("model.classifier etf needs an encoder that trains, as it does not; got a frozen one")
        if self.loss.name in CONTRASTIVE and self.loss.classification_weight == 0:
            if self.loss.hycon_weight == 0:
                raise ValueError(
                    "loss.classification_weight or loss.hycon_weight must be > 0, or nothing trains; got 0 for both"
                )
            if self.train.retrain_epochs == 0:
                raise ValueError(
                    "loss.classification_weight 0 needs train.retrain_epochs >= 1, as the classifier then trains in "
                    "the second stage alone; got 0"
                )
        if self.train.mixup > 0 and self.loss.name in COMPARING:
            raise ValueError(
                f"train.mixup needs a loss of logits and labels alone; got loss.name {self.loss.name}, which compares "
                "images of the same class, and a mixed image has none: set train.mixup 0, or another loss"
            )
        adjusted = self.train.retrain_epochs > 0 or (
            (
                self.loss.name in ("logit_adjusted", "bcl", "proco")
                or (self.loss.name == "allnc" and self.loss.rebalance == "logit_adjusted")
            )
            and self.loss.tau > 0
        )
        if self.model.posthoc == "logit_adjusted" and adjusted:
            raise ValueError(
                "model.posthoc logit_adjusted needs a classifier that was trained without any balancing; got "
                f"loss.name {self.loss.name} and train.retrain_epochs {self.train.retrain_epochs}, which would balance "
                "it twice"
            )
        if self.train.patience is not None and self.data.validation == 0:
            raise ValueError(
                f"train.patience needs validation images; got {self.train.patience} without any: set data.validation, "
                "such as 0.1"
            )
        if self.train.retrain_epochs and self.model.classifier == "etf":
            raise ValueError("train.retrain_epochs needs a model.classifier that trains, linear or normalised; got etf")
        if self.model.pretrained and self.data.channels != 3:
            raise ValueError("data.channels must be 3 with model.pretrained, whose weights are of colour images; got 1")
        if (self.data.name == "features") != (self.model.name in FEATURE_MODELS):
            raise ValueError(
                f"model.name must be {' or '.join(FEATURE_MODELS)} with data.name features, and only then; got "
                f"{self.model.name} with data.name {self.data.name}"
            )


SECTIONS = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig, "train": TrainConfig}
