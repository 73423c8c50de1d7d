"""What a run is made of: frozen dataclasses, one per owner, checked when they are built.

Only the standard library is imported, and allnc._checks, which imports nothing else. allnc/trainer/options.py turns
configurations into dictionaries and back; the command line (allnc/train.py) builds the same classes from a YAML recipe
and dotted overrides. What one section asks of another is in together.py, which `Config` checks.
"""

from __future__ import annotations

from collections.abc import Collection
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
from allnc.config.loss import CONTRASTIVE, REWEIGHTED, LossConfig
from allnc.config.model import FEATURE_MODELS, ModelConfig
from allnc.config.together import contradictions
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
        self.check(() if self.data.undecided or self.data.name == "arrays" else None)

    def check(self, given: Collection[str] | None = None) -> None:
        """Raise ValueError where options do not go together.

        Args:
            given: dotted options that stay as they are while one's own images have not been looked at, which then
                decide the others: what contradicts one of those is left for later, to the command line or `Run`. None:
                all stay.
        """
        for message, by_images in contradictions(self):
            if given is None or {*by_images} <= {*given}:
                raise ValueError(message)


SECTIONS = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig, "train": TrainConfig}
