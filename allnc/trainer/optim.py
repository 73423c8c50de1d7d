"""Optimisers, the moving average of the weights, and the learning rate.

The rate is a plain function of the step, so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from allnc.config import TrainConfig

REFERENCE_BATCH = 256  # images, to which train.lr refers where it is scaled
BETA2 = 0.999


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser of a configuration; weight decay and layer-wise rates act on matrices and kernels only.

    Source: LARS: You et al., Large Batch Training of Convolutional Networks (2017); LAMB: You et al., Large Batch
        Optimization for Deep Learning (ICLR 2020); both are timm's.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]  # biases and normalisation
    optimizer = _kind(config.optimizer)([{"params": decayed}, {"params": plain}], lr=config.lr)
    configure(optimizer, config)
    return optimizer


def configure(optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
    """Give the two parameter groups of `build_optimizer` the settings of a configuration."""
    for group, is_decayed in zip(optimizer.param_groups, (True, False), strict=True):
        group |= _settings(config, is_decayed)


def _kind(name: str) -> Any:
    if name in ("sgd", "adamw"):
        return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    from timm.optim.lamb import Lamb
    from timm.optim.lars import Lars

    return {"lars": Lars, "lamb": partial(Lamb, max_grad_norm=None)}[name]  # train.grad_clip clips


def _settings(config: TrainConfig, is_decayed: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"weight_decay": config.weight_decay if is_decayed else 0.0}
    if config.optimizer in ("sgd", "lars"):
        settings["momentum"] = config.momentum
    else:
        settings["betas"] = (config.momentum, BETA2)
    if config.optimizer == "sgd":
        settings["nesterov"] = config.momentum > 0
    if config.optimizer in ("lars", "lamb"):
        settings["always_adapt"] = is_decayed  # else a weight decay of 0 would turn the layer-wise rates off
    return settings


def peak_rate(config: TrainConfig) -> float:
    """Return the learning rate after the warm-up: `lr`, scaled to the batch as `lr_scaling` says.

    Source: linear: Goyal et al., Accurate, Large Minibatch SGD (2017); sqrt: You et al. (ICLR 2020).
    """
    ratio = config.batch_size / REFERENCE_BATCH
    return config.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step (0-based).

    Linear warm-up to the peak over `warmup_epochs`; then half a cosine to zero over the rest, or the peak divided by
    ten after each milestone. A second stage (`retrain_epochs`) has half a cosine from the peak of its own.
    """
    peak = peak_rate(config)
    steps = config.feature_epochs * steps_per_epoch
    if step >= steps:
        return _cosine(peak, step - steps, config.retrain_epochs * steps_per_epoch)
    warmup = min(config.warmup_epochs, config.feature_epochs / 2) * steps_per_epoch  # a short trial has its peak, too
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return peak * 0.1**passed
    return _cosine(peak, step - warmup, steps - warmup)


def _cosine(peak: float, step: float, steps: float) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def moving_average(model: nn.Module, decay: float | None) -> Any:
    """Return the moving average of a model's weights and buffers: timm's ModelEmaV3, or None without a decay."""
    if decay is None:
        return None
    from timm.utils.model_ema import ModelEmaV3  # where it is used: timm takes a second

    return ModelEmaV3(model, decay=decay, use_warmup=True)
