"""One of several processes of tests/losses/test_ranks.py: trains two steps in groups of 1 to W ranks, saves results.

python -m tests.losses._ranks_worker RANK WORLD FOLDER
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from allnc.config import LossConfig
from allnc.losses import Contrastive, build_loss
from allnc.losses.build import LOSSES
from allnc.ops.ranks import Ranks
from tests.processes import rank_main

ROOT = Path(__file__).resolve().parents[2]
COUNTS = torch.tensor([50, 20, 10, 5, 2, 1])
C, WIDTH, DIM, INPUT, IMAGES = len(COUNTS), 10, 8, 7, 23
STEPS = 2
WIDTHS: dict[str, Any] = {"feature_dim": WIDTH, "projection_dim": DIM, "classifier_scale": 16.0}
# How many of the images each rank of a group brings.
SIZES = {1: [23], 2: [15, 8], 3: [1, 9, 13], 4: [8, 0, 12, 3]}


def cases() -> dict[str, LossConfig]:
    """The loss of every recipe, and settings that no recipe has."""
    recipes = {
        path.stem: LossConfig(**yaml.safe_load(path.read_text())["loss"])
        for path in sorted((ROOT / "allnc" / "recipes").glob("*.yaml"))
    }
    digits = recipes["digits_lt"]
    others = {
        "exact gradient, eager": replace(digits, mean_gradient="exact", backend="eager"),
        "simplex": replace(digits, p2p_target="etf"),
        "no pairings": replace(digits, p2p_means=0.0, p2p_weights=0.0, p2p_duality=0.0),
        "means alone": replace(digits, p2p_weights=0.0, p2p_duality=0.0),
        "cosine": replace(digits, hycon="cosine"),
        "no contrast": replace(digits, hycon="none"),
        "focal branch": replace(digits, rebalance="focal"),
        "weighted branch": replace(digits, rebalance="class_balanced"),
        "smoothed branch": replace(digits, rebalance="ce", label_smoothing=0.2),
        "deferred weights": LossConfig(name="mse", drw=0.15),
        **{name: LossConfig(name=name) for name in LOSSES if name != "allnc"},  # pyright: ignore[reportArgumentType]
    }
    return {**recipes, **others}


class Model(nn.Module):
    """A layer for each output that a loss reads, in float64; without normalisation, which mixes the rows of a rank."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, shape in {
            "encoder": (WIDTH, INPUT),
            "classifier": (C, WIDTH),
            "projection": (DIM, WIDTH),
            "predictor": (WIDTH, WIDTH),
        }.items():
            weight = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5
            self.register_parameter(name, nn.Parameter(weight))


def step(
    model: Any, loss: nn.Module, images: Tensor, labels: Tensor, progress: float, num_views: int = 2
) -> dict[str, Tensor]:
    """Total and parts of one step; leaves gradients in the model. images [B, INPUT] are seen in two views."""
    rows = torch.cat([images, 1.1 * images + 0.1])
    labels = labels.repeat(2)
    features = torch.tanh(rows @ model.encoder.T)
    logits = features @ model.classifier.T
    prototypes = F.normalize(model.classifier @ model.projection.T, dim=1)
    output = loss(
        features,
        labels,
        model.classifier,
        (logits, labels),
        (2 * logits, labels),
        progress,
        z=F.normalize(features @ model.projection.T, dim=1),
        h=features @ model.predictor.T,
        num_views=num_views,
        **({"prototypes": prototypes} if isinstance(loss, Contrastive) else {}),
    )
    output.total.backward()
    return {"total": output.total.detach(), **output.parts}


def batch(number: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: images [IMAGES, INPUT] and labels, the last class absent, one image left out."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, C - 1, (IMAGES,), generator=generator)
    labels[3] = -100
    return torch.randn(IMAGES, INPUT, generator=generator, dtype=torch.float64), labels


def train(config: LossConfig, own: slice, group: Any) -> dict[str, Any]:
    """Two steps on a rank's images; the gradients are averaged over ranks, as DistributedDataParallel does."""
    model = Model()
    loss = build_loss(config, class_counts=COUNTS, **WIDTHS, group=group).double()
    parts, gradients = [], []
    for number in range(STEPS):
        images, labels = batch(number)
        parts.append(step(model, loss, images[own], labels[own], progress=0.1 * (1 + number)))
        for parameter in model.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if group is not None:
                dist.all_reduce(gradient, group=group)
                gradient /= group.size()
            gradients.append(gradient)
            parameter.grad = None
    return {"parts": parts, "gradients": gradients, "state": loss.state_dict()}


def wrong_call(rank: int, group: Any) -> list[str]:
    """What a rank is told when rank 1 alone has a label out of range or wrong views, and that the group works on."""
    told = []
    softmax, cosine, baseline = LossConfig(), LossConfig(hycon="cosine"), LossConfig(name="class_balanced")
    for wrong, config in (("label", softmax), ("views", cosine), ("label", baseline), ("", cosine)):
        loss = build_loss(config, class_counts=COUNTS, **WIDTHS, group=group).double()
        images, labels = batch(0)
        if wrong == "label" and rank == 1:
            labels = torch.full_like(labels, C)
        views = 4 if wrong == "views" and rank == 1 else 2
        try:
            step(Model(), loss, images, labels, 0.1, num_views=views)
            told.append("no error")
        except (RuntimeError, ValueError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def work(rank: int, world: int, _: list[str]) -> dict[Any, Any]:
    exchanges = []
    exchange = Ranks._exchange
    Ranks._exchange = lambda self, numbers: exchanges.append(1) or exchange(self, numbers)  # type: ignore[method-assign]
    results: dict[Any, Any] = {}
    for size, sizes in SIZES.items():
        group: Any = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        start = sum(sizes[:rank])
        for name, config in cases().items():
            exchanges.clear()
            results[size, name] = train(config, slice(start, start + sizes[rank]), group)
            results[size, name]["exchanges"] = len(exchanges)
        if size == world:
            results["wrong call"] = wrong_call(rank, group)
    return results


if __name__ == "__main__":
    rank_main(work)
