"""A run: everything that a configuration becomes, how it is saved and restored, and what is measured of it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from allnc.config import SMALL_SETS, Config
from allnc.data import ImageSet, TrainLoader, load
from allnc.losses.build import LOSSES, build_loss
from allnc.models import build_model, pixel_statistics
from allnc.trainer import checkpoint
from allnc.trainer.manifest import changes_on_resuming
from allnc.trainer.measure import accuracy, check_images_fit, features_by_class, neural_collapse
from allnc.trainer.optim import build_optimizer, configure
from allnc.trainer.processes import Processes
from allnc.trainer.runtime import (
    check_backend,
    pick_device,
    pick_matmul_precision,
    pick_precision,
    random_state,
    restore_random_state,
    seed_everything,
)


class DivergenceError(ValueError):
    """The loss or the weights stopped being numbers."""


class Run:
    """Everything that a configuration becomes: data, model, loss, optimiser, and how far they are.

    Args:
        config: the configuration.
        images: training and test set, where they are at hand already; None loads what the configuration names.
        processes: those that share the run; None for this one alone.

    Raises:
        ValueError: the configuration asks for what is not there (files, device, model).
    """

    def __init__(
        self,
        config: Config,
        images: tuple[ImageSet, ImageSet] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.processes = config, processes or Processes()
        self.device = pick_device(config.train)
        if config.loss.name == "allnc":
            check_backend(config.loss.backend, self.device)
        torch.set_float32_matmul_precision(pick_matmul_precision(config.train, self.device))
        self.dtype = pick_precision(config.train, self.device)
        if self.device.type == "cpu":
            if config.train.threads is not None:
                torch.set_num_threads(config.train.threads)
            torch.set_flush_denormal(True)  # denormals of a nearly perfect fit slow CPU kernels tenfold
        seed_everything(config.seed)
        self.train_set, self.test_set = images or load(config.data)
        config = self._with_statistics()
        self.counts = self.train_set.class_counts
        if int(self.counts.min()) == 0:
            raise ValueError(
                f"the training set must have an image of every class; class {int(self.counts.argmin())} has none"
            )

        entry = LOSSES[config.loss.name]
        self.loader = TrainLoader(
            self.train_set,
            config.data,
            batch_size=config.train.batch_size,
            seed=config.seed,
            two_batches=entry.two_branches and config.data.rebalance_sampler != "uniform",
            device=self.device,
            share=self.processes.share,
        )
        model = build_model(
            config.model,
            in_channels=self.train_set.channels,
            num_classes=self.train_set.num_classes,
            head=entry.head(config.loss),
            two_branches=entry.two_branches,
        )
        self.memory = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=self.memory)
        check_images_fit(self.model, self.train_set, config.data)
        self.network: torch.nn.Module = self.model  # what is trained; see `connect`
        self.loss = build_loss(
            config.loss,
            class_counts=self.counts,
            feature_dim=model.feature_dim,
            projection_dim=config.model.projection_dim,
            group=self.processes.group,
        ).to(self.device)
        self.optimizer = build_optimizer(self.model, config.train)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.epoch = 0  # epochs done
        self.seconds = {"total": 0.0, "training": 0.0}
        self.best = 0.0
        self.changes: tuple[dict[str, Any], ...] = ()  # options changed on resuming
        self.final: tuple[dict[str, Any], torch.Tensor] | None = None  # what was measured after the last epoch

    def _with_statistics(self) -> Config:
        """Let the pixels have mean and deviation of the configuration, or of the pretrained weights, which it notes."""
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
        self.test_set = dataclasses.replace(self.test_set, mean=data.mean, std=data.std)
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
        """Let the gradients be those of all processes; all must call it, once each has its run."""
        may_rest = self.model.uniform_classifier is not None
        self.network = self.processes.averaging(self.model, may_rest=may_rest)

    def save(self, folder: Path) -> None:
        """Write the checkpoint of the epochs done."""
        training = {
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
            "class_counts": self.counts,
            "seconds": self.seconds,
            "best": self.best,
        }
        model = self._saved_weights()
        checkpoint.save(folder, self.config, epoch=self.epoch, model=model, training=training, changes=self.changes)

    def _saved_weights(self) -> checkpoint.Weights:
        """Return the model's state without the pretrained weights that stay frozen, unless the run wants all of it."""
        model, state = self.config.model, self.model.state_dict()
        frozen = self.model.frozen_names() if model.pretrained and self.config.train.save == "tuned" else []
        if not frozen:
            return checkpoint.Weights(state)
        for name in frozen:
            del state[name]
        return checkpoint.Weights(state, self.frozen_sum)

    @functools.cached_property
    def frozen_sum(self) -> str:
        """SHA-256 of the model's frozen tensors, which stay what they are."""
        return self.model.frozen_sum()

    def restore(self, folder: Path) -> None:
        """Continue from the checkpoint in a run folder.

        Raises:
            ValueError: there is none, it is damaged, or configuration or training set are not those of the run.
        """
        manifest, weights, state = checkpoint.load(folder)
        self.changes = (*manifest.changes, *changes_on_resuming(manifest, self.config))
        if not torch.equal(state["class_counts"], self.counts):
            wrong = int((state["class_counts"] != self.counts).nonzero()[0])
            raise ValueError(
                f"a resumed run must have the training images it began with; class {wrong} has "
                f"{int(self.counts[wrong])}, and had {int(state['class_counts'][wrong])}"
            )
        self.load_model(weights, manifest.epoch)
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        configure(self.optimizer, self.config.train)  # the state has the old settings
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        restore_random_state(state["random"])
        self.seconds, self.best = state["seconds"], state["best"]

    def load_model(self, weights: checkpoint.Weights, epoch: int) -> None:
        """Take the weights that a checkpoint has after an epoch.

        Raises:
            ValueError: they do not fit the model, or were tuned beside other frozen weights than the model has.
        """
        state: dict[str, torch.Tensor] = weights
        if weights.frozen is not None:
            if weights.frozen != self.frozen_sum:
                raise ValueError(
                    "the pretrained weights must be those that the checkpoint was tuned with, of which it holds no "
                    f"copy: their SHA-256 is {weights.frozen[:16]}..., got {self.frozen_sum[:16]}...; name their file "
                    "by --model.weights"
                )
            own = self.model.state_dict()
            state = {name: own[name] for name in self.model.frozen_names()} | weights
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:  # torch lists every name and shape
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the checkpoint's weights must fit the model of its configuration: {reason}") from None
        self.epoch = epoch

    def check_weights(self) -> None:
        """Raise DivergenceError unless all of the model, of the class means and of the optimiser is finite."""
        tensors = {**self.model.state_dict(), **{f"loss.{n}": t for n, t in self.loss.state_dict().items()}}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{n}": t for n, t in values.items() if isinstance(t, torch.Tensor)}
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if broken:
            raise DivergenceError(
                f"the weights must stay finite; after epoch {self.epoch}, {len(broken)} of {len(tensors)} tensors are "
                f"not ({broken[0]} ...)"
            )

    def measure(self) -> tuple[dict[str, Any], torch.Tensor]:
        """Return accuracy by shot (test set) with collapse (training set), and the class means [C, F]."""
        collapse, means = self.measure_collapse()
        return {**self.measure_accuracy(), **collapse}, means

    def measure_accuracy(self) -> dict[str, float | None]:
        """Return accuracy by shot on the test set."""
        return accuracy(self.model, self.test_set, self.counts, self.config.data, self.device, self.processes)

    def measure_collapse(self) -> tuple[dict[str, float], torch.Tensor]:
        """Return the collapse metrics of the training set and its class means [C, F]."""
        return neural_collapse(self.model, self.train_set, self.config.data, self.device, self.processes)

    def conventions(self) -> dict[str, Any]:
        """Return what the measured numbers refer to: epochs done, and the limits of many and few."""
        return {"epochs": self.epoch, "many_above": self.config.data.many, "few_below": self.config.data.few}
