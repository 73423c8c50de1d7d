"""A run: everything that a configuration becomes, and what is measured of it.

What it saves of itself is in state.py, a step of its training in step.py.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from allnc.config import SMALL_SETS, Config, DataConfig
from allnc.data import FeatureSet, ImageSet, TrainLoader, load, loader_for
from allnc.losses.build import LOSSES, build_loss
from allnc.metrics import drift
from allnc.models import LongTailModel, build_model, pixel_statistics, sum_of_tensors
from allnc.trainer import checkpoint
from allnc.trainer.classes import ClassScore, class_scores, write_classes
from allnc.trainer.folder import CLASSES, PREDICTIONS
from allnc.trainer.measure import (
    ENCODER,
    blocks_of,
    check_blocks,
    check_images_fit,
    collapse_of_layers,
    features_by_class,
    neural_collapse,
    predictions,
    short_name,
)
from allnc.trainer.optim import build_optimizer, moving_average
from allnc.trainer.options import OF_A_MACHINE, dotted
from allnc.trainer.predictions import Predictions, class_names, scores, write_predictions
from allnc.trainer.prior import assumed_prior
from allnc.trainer.processes import Processes
from allnc.trainer.runtime import check_backend, pick_device, pick_precision, prepare, seed_everything
from allnc.trainer.selection import SCORE, Selection

OF_LAYERS = ("nc1", "trace_ratio", "cdnv", "nc2_means", "cosine_std_means", "nc3", "nc4")  # measures in the records


class Run:
    """Everything that a configuration becomes: data, model, loss, optimiser, and how far they are.

    Args:
        config: the configuration.
        images: training and test set, where they are at hand already; None loads what the configuration names.
        processes: those that share the run; None for this one alone.
        tested: measure on the test images also where validation images are held out.

    Raises:
        ValueError: the configuration asks for what is not there (files, device, model).
    """

    def __init__(
        self,
        config: Config,
        images: tuple[ImageSet, ImageSet] | None = None,
        processes: Processes | None = None,
        *,
        tested: bool = False,
    ) -> None:
        config.check()  # also of one's own images that nobody has looked at
        self.config, self.processes = config, processes or Processes()
        self.measured_on = "test" if tested or config.data.validation == 0 else "validation"
        self.device = pick_device(config.train)
        if config.loss.name in ("allnc", "supcon", "proco"):
            check_backend(config.loss.backend, self.device)
        prepare(config.train, self.device)
        self.dtype = pick_precision(config.train, self.device)
        seed_everything(config.seed)
        self.train_set, self.measured_set = images or load(config.data, tested=tested)
        config = self._with_statistics()
        self.counts = self.train_set.class_counts
        if int(self.counts.min()) == 0:
            raise ValueError(
                f"the training set must have an image of every class; class {int(self.counts.argmin())} has none"
            )

        entry = LOSSES[config.loss.name]
        two_batches = entry.two_branches and config.data.rebalance_sampler != "uniform"
        self.loader = self.make_loader(config.data, two_batches=two_batches, epochs=config.train.feature_epochs)
        self.retrains = False  # whether a new classifier trains on features that rest, see trainer/retrain.py
        model = build_model(
            config.model,
            in_channels=self.train_set.channels,
            num_classes=self.train_set.num_classes,
            image_size=tuple(self.train_set.shape(config.data)[1:]),
            head=entry.head(config.loss),
            two_branches=entry.two_branches,
            class_counts=self.counts,
        )
        channels_last = config.train.channels_last and len(self.train_set.shape(config.data)) == 3
        self.memory = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=self.memory)
        check_images_fit(self.model, self.train_set, config.data)
        if config.train.collapse_layers:
            check_blocks(self.model, self.train_set, config.data, self.device)
        self.network: torch.nn.Module = self.model  # what is trained; see `connect`
        self.loss = build_loss(
            config.loss,
            class_counts=self.counts,
            feature_dim=model.feature_dim,
            projection_dim=config.model.projection_dim,
            classifier_scale=None if config.model.classifier == "linear" else config.model.classifier_scale,
            group=self.processes.group,
            classes=self.train_set.classes,
        ).to(self.device)
        self.average = moving_average(self.model, config.train.ema_decay)
        self.optimizer = build_optimizer(self.model, config.train)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.epoch = 0  # epochs done
        self.seconds = {"total": 0.0, "training": 0.0}
        self.selection = Selection()
        self.weights: checkpoint.Which = "last"  # of which epoch they are
        self.predictions: Predictions | None = None  # of the last measurement
        self.class_means: torch.Tensor | None = None  # [C, F] of the last measurement during training
        self.changes: tuple[dict[str, Any], ...] = ()  # options changed on resuming
        self.recipe: str | None = None  # by what name its configuration was asked for

    def make_loader(self, data: DataConfig, *, two_batches: bool, epochs: int) -> TrainLoader:
        """Return the batches of the training set up to an epoch, drawn and augmented as `data` says."""
        return loader_for(self.train_set)(
            self.train_set,
            data,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            two_batches=two_batches,
            device=self.device,
            share=self.processes.share,
            epochs=epochs,
        )

    @property
    def measured(self) -> LongTailModel:
        """The model that is measured and that other programs get: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    def _with_statistics(self) -> Config:
        """Let the pixels have mean and deviation of the configuration, or of the pretrained weights, which it notes."""
        if isinstance(self.train_set, FeatureSet) or isinstance(self.measured_set, FeatureSet):
            return self.config
        data, own = self.config.data, (self.train_set.mean, self.train_set.std)
        if data.mean is None or data.std is None:
            found = None if data.name in SMALL_SETS else pixel_statistics(self.config.model)
            if found in (None, own):
                return self.config
            data = dataclasses.replace(data, mean=found[0], std=found[1])
            self.config = dataclasses.replace(self.config, data=data)
        elif len(data.mean) != len(own[0]):
            raise ValueError(
                f"data.mean and data.std must have {len(own[0])} numbers, one for each channel; got {len(data.mean)}"
            )
        assert data.mean is not None and data.std is not None
        self.train_set = dataclasses.replace(self.train_set, mean=data.mean, std=data.std)
        self.measured_set = dataclasses.replace(self.measured_set, mean=data.mean, std=data.std)
        return self.config

    def start_classifier(self) -> None:
        """Let a new run's class vectors be class means, where the configuration wants it; all processes call it."""
        if self.config.model.classifier_init == "class_means":
            data, seed = self.config.data, self.config.seed
            means = features_by_class(self.model, self.train_set, data, self.device, self.processes, seed=seed)
            self.model.start_classifier(means)

    def autocast(self) -> torch.autocast:
        """The context in which the model runs in training."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def connect(self) -> None:
        """Let BatchNorm and the gradients be those of all processes; all must call it, once each has its run.

        Raises:
            ValueError: a process has other images, weights or options, on another machine perhaps.
        """
        if self.processes.size > 1:
            self.processes.together(lambda: self.processes.check_alike(self._facts()))
        self.processes.together(lambda: self.processes.connect(self.model))
        if self.passes == 1:  # a batch in parts averages its gradients once it has them all
            may_rest = self.model.uniform_classifier is not None
            self.network = self.processes.averaging(self.model, may_rest=may_rest)

    def _facts(self) -> dict[str, str]:
        """Return what must be the same in all processes: images, weights and options."""
        facts = {f"{name} images": text for name, text in self.images().items()}
        facts["weights"] = f"those of SHA-256 {sum_of_tensors(self.model.state_dict())[:16]}"
        return facts | {name: str(value) for name, value in dotted(self.config).items() if name not in OF_A_MACHINE}

    @property
    def passes(self) -> int:
        """In how many parts a batch passes the encoder, on every process."""
        micro_batch, size = self.config.train.micro_batch, self.config.train.batch_size
        if micro_batch is None or self.config.model.name == "linear":  # which has no encoder
            return 1
        most, least = -(-size // self.processes.size), size // self.processes.size
        of_a_branch = max(1, micro_batch // (2 if self.loader.two_batches else 1))
        return min(-(-most // of_a_branch), least)  # at most: a part has an image of each branch

    def select(self, measured: dict[str, Any]) -> bool:
        """Note what was measured after an epoch, on validation images; return whether it is the best one so far."""
        if self.measured_on != "validation" or SCORE not in measured:
            return False
        self.selection = self.selection.after(self.epoch, measured[SCORE])
        return self.selection.epoch == self.epoch

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.epoch >= self.config.train.epochs or self.selection.stops(self.config.train.patience)

    @functools.cached_property
    def frozen_sum(self) -> str:
        """SHA-256 of the model's frozen tensors, which stay what they are."""
        return self.model.frozen_sum()

    def load_model(self, weights: checkpoint.Weights, epoch: int) -> None:
        """Take the weights that a checkpoint has after an epoch.

        Raises:
            ValueError: they do not fit the model, or were tuned beside other frozen weights than the model has.
        """
        weights.fill(self.measured, None if weights.frozen is None else self.frozen_sum)
        self.epoch, self.weights = epoch, weights.which

    def measure(self, prior: torch.Tensor | None = None) -> tuple[dict[str, Any], torch.Tensor]:
        """Return accuracy and calibration with collapse (of the training set), and the class means [C, F].

        Args:
            prior: as `measure_accuracy` takes it.
        """
        collapse, means = self.measure_collapse()
        return {**self.measure_accuracy(prior), **collapse}, means

    def measure_accuracy(self, prior: torch.Tensor | None = None) -> dict[str, float | None]:
        """Return accuracy by shot and calibration on the images that are measured, see `scores`.

        Args:
            prior: [C] class prior for which the logits are adjusted and under which is measured; None: neither.

        Raises:
            ValueError: the loss has no logits that can be adjusted to a prior.
        """
        data, priors = self.config.data, None
        if prior is not None:
            names = self.train_set.classes
            priors = assumed_prior(self.config, self.counts, epoch=self.epoch, classes=names), prior
        self.predictions = predictions(self.measured, self.measured_set, data, self.device, self.processes, priors)
        return scores(self.predictions, self.counts, many=data.many, few=data.few, prior=prior)

    def class_scores(self) -> list[ClassScore]:
        """Return the scores of all classes in the last measurement."""
        assert self.predictions is not None
        return class_scores(self.predictions, self.counts, class_names(self.measured_set))

    def write_predictions(self, folder: Path) -> None:
        """Write what the last measurement has predicted, image by image and class by class."""
        assert self.predictions is not None
        root = self.config.data.root
        write_predictions(
            folder / PREDICTIONS,
            self.predictions,
            self.measured_set,
            self.counts,
            measured_on=self.measured_on,
            root=root,
        )
        write_classes(folder / CLASSES, self.class_scores())

    def measure_collapse(self) -> tuple[dict[str, float], torch.Tensor]:
        """Return the collapse metrics of the training set and its class means [C, F]."""
        return neural_collapse(self.measured, self.train_set, self.config.data, self.device, self.processes)

    def measure_layers(self) -> dict[str, dict[str, float]]:
        """Return the collapse of the encoder's blocks on the training set, as the records of the epochs have it.

        A last block that returns the features themselves is left out beside them.

        Raises:
            ValueError: a block that cannot be measured; see `check_blocks`.
        """
        layers = blocks_of(self.measured.encoder)
        found = collapse_of_layers(
            self.measured, self.train_set, self.config.data, self.device, self.processes, layers, spectral=False
        )
        return {
            short_name(name): {key: layer.measures[key] for key in OF_LAYERS if key in layer.measures}
            for name, layer in found.items()
            if name == ENCODER or layer.weight is None
        }

    def moved(self, means: torch.Tensor) -> dict[str, float]:
        """Keep the class means [C, F] of a measurement, and return how far they are from those of the one before."""
        before, self.class_means = self.class_means, means.float().cpu()
        return {} if before is None else drift(before, self.class_means)

    def images(self) -> dict[str, str]:
        """Return number and fingerprint of the training images and of those that are measured."""
        sets = {"training": self.train_set, self.measured_on: self.measured_set}
        return {name: f"{len(s):,} (SHA-256 {s.fingerprint()[:16]})" for name, s in sets.items()}

    def conventions(self) -> dict[str, Any]:
        """Return what the measured numbers refer to: epochs done, the images, and the limits of many and few."""
        return {
            "epochs": self.epoch,
            "weights": self.weights,
            "measured_on": self.measured_on,
            "many_above": self.config.data.many,
            "few_below": self.config.data.few,
        }
