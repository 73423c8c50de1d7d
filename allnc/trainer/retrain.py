"""The second stage of decoupled training (cRT): a new classifier on features that rest.

Whatever loss trained the features, the classifier that predicts starts anew and learns by cross-entropy on
class-balanced batches of augmented views; encoder and other heads stay in evaluation mode, without a graph. Its start
depends on the seed alone and its batches on (seed, epoch), so that it resumes as the first stage does.

Source: Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition (ICLR 2020), section 4.1.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from allnc.config import LossConfig
from allnc.data.samplers import generator
from allnc.losses.build import build_loss
from allnc.models import renew_classifier
from allnc.trainer.optim import build_optimizer

if TYPE_CHECKING:
    from allnc.trainer.run import Run


def start_retraining(run: Run) -> None:
    """Begin the second stage; all processes call it, before its first epoch.

    With a moving average the features are those that it has by then: those that are measured.
    """
    if run.average is not None:
        run.model.load_state_dict(run.measured.state_dict())
    seed = int(torch.randint(2**62, (), generator=generator(run.config.seed, "classifier", 0)))
    renew_classifier(run.model, run.config.model, seed=seed)
    run.start_classifier()
    prepare_retraining(run)


def prepare_retraining(run: Run) -> None:
    """Let a run be in its second stage: batches, loss and optimiser of the classifier alone."""
    config = run.config
    run.retrains = True
    run.model.rest_features()
    run.network = run.model  # its gradients are averaged once they are there, as those of a batch in parts
    balanced = dataclasses.replace(config.data, sampler="class_balanced")
    run.loader = run.make_loader(balanced, two_batches=False, epochs=config.train.epochs)
    run.loss = build_loss(
        LossConfig(name="ce"),
        class_counts=run.counts,
        feature_dim=run.model.feature_dim,
        group=run.processes.group,
    ).to(run.device)
    run.optimizer = build_optimizer(run.model.classifier, config.train)
