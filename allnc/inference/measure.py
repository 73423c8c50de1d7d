"""Measure a trained run on images of any kind, without its training images."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from allnc.data import ImageSet
from allnc.inference.predictor import Restored
from allnc.trainer.classes import ClassScore, class_scores
from allnc.trainer.measure import predictions
from allnc.trainer.predictions import scores
from allnc.trainer.processes import Processes
from allnc.trainer.runtime import prepare

GROUPS = ("many", "medium", "few", "ece_many", "ece_medium", "ece_few")


class Measured(NamedTuple):
    """Accuracy by shot, calibration and more (`scores`), and the scores of every class."""

    values: dict[str, Any]
    classes: list[ClassScore]


def measure(run: Restored, images: ImageSet, *, prior: str | None = None, measured_on: str) -> Measured:
    """Measure a run on labelled images, as the trainer does.

    Args:
        run: the trained model.
        images: with the classes of the run; those without an image count nowhere.
        prior: class prior for which the logits are adjusted and under which is measured, as `wanted_prior` takes it.
        measured_on: what the images are called.

    Raises:
        ValueError: the run has no logits that can be adjusted to a prior.
    """
    train, data = run.config.train, run.config.data
    prepare(train, run.device)
    priors = None if prior is None else run.prior(prior)
    found = predictions(run.model, images, data, run.device, Processes(), priors)
    counts: Tensor = run.counts
    values: dict[str, Any] = scores(found, counts, many=data.many, few=data.few, prior=priors and priors[1])
    if not bool(counts.any()):  # the run does not know which classes have many images
        values |= dict.fromkeys(GROUPS)
    values |= {
        "epochs": run.epoch,
        "weights": run.which,
        "measured_on": measured_on,
        "many_above": data.many,
        "few_below": data.few,
    }
    return Measured(values, class_scores(found, counts, run.classes))
