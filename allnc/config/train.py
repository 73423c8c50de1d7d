"""The optimisation: section `train` of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from allnc._checks import check_interval
from allnc.config.fields import check_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The optimisation.

    Args:
        epochs: passes over the training set, >= 1.
        batch_size: images (not views) in a step, of all processes together, >= 2.
        micro_batch: images of a process (of both branches' batches, where there are two) that pass the encoder at a
            time, >= 1, in parts as equal as can be: memory is that of a part, the step takes one forward more, and all
            images of a batch contrast as before. BatchNorm takes the statistics of a part. None: the whole batch.
        optimizer: sgd with Nesterov momentum, lars, adamw or lamb.
        lr: peak learning rate, > 0; of a batch of 256 images where lr_scaling is not none.
        lr_scaling: how the peak grows with the batch: none, linear (lr x batch_size / 256) or sqrt (its square root).
        momentum: momentum of sgd and lars, and beta1 of adamw and lamb (beta2 is 0.999), in [0, 1).
        weight_decay: of matrices and kernels (not of biases or normalisation), >= 0: L2 penalty for sgd, lars and lamb,
            decoupled for adamw.
        ema_decay: share of the old weights kept at each step by the moving average that is then measured and saved, in
            (0, 1); it grows from 0 by 1 - (1 + step)^(-2/3), so that the first weights are soon forgotten. None: the
            weights themselves.
        mixup: alpha >= 0 of mixup, for losses of logits and labels alone: every image is mixed with another of its
            batch, with one share from Beta(alpha, alpha) a step, and the loss is the mixture of those of both labels
            (Zhang et al., ICLR 2018). A second stage (retrain_epochs) has plain images. 0: no mixing.
        remix: let mixtures have the label of a class that is at least 3 times rarer alone where its image has more than
            half of the pixels (Chou et al., ECCV 2020 workshops).
        retrain_epochs: how many of the epochs, the last ones, train a new classifier alone, in [0, epochs): the encoder
            rests in evaluation mode, batches are class-balanced, the loss is cross-entropy whatever the first stage's
            is, and the rate falls from its peak to zero once more, by half a cosine (classifier re-training, Kang et
            al., ICLR 2020). Schedule, warm-up and milestones are of the epochs before. 0: no second stage.
        warmup_epochs: epochs of linear warm-up, >= 0 (fractions allowed); at most half of all epochs are
            used.
        schedule: cosine to zero by step, or step (x 0.1 at the milestones).
        milestones: epochs after which the step schedule divides the rate by ten.
        grad_clip: largest norm of the whole gradient; None does not clip.
        precision: autocast type; auto takes bf16 where the device multiplies it faster than fp32 (CPU: with AMX), else
            fp16 on a GPU and fp32 on a CPU.
        matmul_precision: how float32 matrices are multiplied, in torch's words: highest (float32), high (TF32 on a
            GPU), medium (bfloat16 where the hardware has it); auto takes high on a GPU and highest on a CPU.
        device: auto takes a GPU when there is one.
        threads: CPU threads of torch, in [1, 1024]; None takes one a core. A small network is as fast with one, and
            much faster when other programs want the cores, too; results depend on the number in the last bits.
        channels_last: memory order of the images; faster for convolutions on CPU and GPU.
        eval_every: epochs between measurements of the accuracy, >= 1 (the last epoch is always measured).
        patience: stop after so many epochs without a better balanced accuracy on the validation images (which
            data.validation holds out), >= 1, and end with the weights of the best epoch. The schedules of the rate and
            of the loss are those of all epochs and are cut: a rate that falls by a cosine is not near zero yet. None:
            all epochs, and the weights of the last one.
        collapse_every: epochs between measurements of neural collapse on the training set, 0: only after
            the last.
        collapse_layers: measure the blocks of the encoder, too, after every collapse_every epochs and after the last of
            all epochs, for pictures by layer and epoch; two more passes over the training images, in float64.
        save: which weights a checkpoint holds where pretrained ones stay frozen (model.pretrained with a model.tune
            other than full): tuned, those that train, with the SHA-256 of the frozen ones, which evaluating and
            resuming then read from the pretrained weights again; or whole. Without frozen pretrained weights, whole.
    """

    epochs: int = 30
    batch_size: int = 128
    micro_batch: int | None = None
    optimizer: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    lr: float = 0.1
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ema_decay: float | None = None
    mixup: float = 0.0
    remix: bool = False
    retrain_epochs: int = 0
    warmup_epochs: float = 1.0
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[int, ...] = ()
    grad_clip: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    channels_last: bool = True
    eval_every: int = 1
    patience: int | None = None
    collapse_every: int = 5
    collapse_layers: bool = False
    save: Literal["tuned", "whole"] = "tuned"

    @property
    def feature_epochs(self) -> int:
        """The epochs in which the whole network trains: all but those of the second stage."""
        return self.epochs - self.retrain_epochs

    def __post_init__(self) -> None:
        if isinstance(self.milestones, list):
            object.__setattr__(self, "milestones", tuple(self.milestones))
        check_fields("train", self)
        check_interval("train.epochs", self.epochs, 1, math.inf)
        check_interval("train.batch_size", self.batch_size, 2, math.inf)
        if self.micro_batch is not None:
            check_interval("train.micro_batch", self.micro_batch, 1, self.batch_size)
        if self.ema_decay is not None:
            check_interval("train.ema_decay", self.ema_decay, 0, 1, open_low=True, open_high=True)
        check_interval("train.mixup", self.mixup, 0, math.inf)
        check_interval("train.retrain_epochs", self.retrain_epochs, 0)  # below epochs: see together.py
        check_interval("train.lr", self.lr, 0, math.inf, open_low=True)
        check_interval("train.momentum", self.momentum, 0, 1, open_high=True)
        check_interval("train.weight_decay", self.weight_decay, 0, math.inf)
        check_interval("train.warmup_epochs", self.warmup_epochs, 0, math.inf)
        if self.grad_clip is not None:
            check_interval("train.grad_clip", self.grad_clip, 0, math.inf, open_low=True)
        if self.threads is not None:
            check_interval("train.threads", self.threads, 1, 1024)  # more cannot be started
        check_interval("train.eval_every", self.eval_every, 1, math.inf)
        if self.patience is not None:
            check_interval("train.patience", self.patience, 1, math.inf)
            if self.retrain_epochs:
                raise ValueError(
                    f"train.patience must be null with train.retrain_epochs; got {self.patience}: a run that stops "
                    "early would never train its second stage"
                )
        check_interval("train.collapse_every", self.collapse_every, 0, math.inf)
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"train.milestones must be given with train.schedule step, and only then; "
                f"got schedule {self.schedule} and milestones {list(self.milestones)}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"train.milestones must increase; got {list(self.milestones)}")
