"""SGD and its learning rate, a plain function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

import torch
from torch import nn

from allnc.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum for what trains; weight decay acts on matrices and kernels only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]  # biases and normalisation
    optimizer = torch.optim.SGD([{"params": decayed}, {"params": plain}], lr=config.lr)
    configure(optimizer, config)
    return optimizer


def configure(optimizer: torch.optim.SGD, config: TrainConfig) -> None:
    """Give the two parameter groups of `build_optimizer` the settings of a configuration."""
    for group, weight_decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group |= {"momentum": config.momentum, "nesterov": config.momentum > 0, "weight_decay": weight_decay}


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step (0-based).

    Linear warm-up to `lr` over `warmup_epochs`; then half a cosine to zero over the rest, or `lr` divided
    by ten after each milestone.
    """
    warmup = min(config.warmup_epochs, config.epochs / 2) * steps_per_epoch  # a short trial has its peak, too
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return config.lr * 0.1**passed
    rest = config.epochs * steps_per_epoch - warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / rest))
