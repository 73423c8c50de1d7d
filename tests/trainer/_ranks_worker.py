"""One of several processes of tests/trainer/test_ranks.py: trains some steps in float64 in groups of 1 to W.

python -m tests.trainer._ranks_worker RANK WORLD FOLDER
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch.distributed as dist

from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.trainer import loop
from allnc.trainer import run as run_module
from allnc.trainer.mixing import batches
from allnc.trainer.processes import Processes
from allnc.trainer.retrain import start_retraining
from tests.processes import rank_main

PLAIN = Config(
    data=DataConfig(max_per_class=30, imbalance_ratio=6, many=20, few=10),
    model=ModelConfig(name="resnet8", width=4, projection_dim=16, classifier="normalised"),
    loss=LossConfig(alpha=0.3),
    train=TrainConfig(epochs=2, batch_size=45, lr=0.02, precision="fp32", device="cpu", threads=1),
)
STEPS = 4
GHOSTS = dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, micro_batch=4))  # BatchNorm in parts


def cases() -> dict[str, Config]:
    """Settings that differ in what crosses processes."""

    def changed(**sections: dict[str, Any]) -> Config:
        parts = {name: dataclasses.replace(getattr(PLAIN, name), **values) for name, values in sections.items()}
        return dataclasses.replace(PLAIN, **parts)

    return {
        "plain": PLAIN,
        "two samplers, two heads": changed(data={"rebalance_sampler": "reversed"}, model={"heads": "separate"}),
        "cosine": changed(loss={"hycon": "cosine"}),
        "baseline, clipped": changed(loss={"name": "logit_adjusted"}, train={"grad_clip": 0.5}),
        "in parts": changed(model={"norm": "group"}, train={"micro_batch": 4, "grad_clip": 0.5, "ema_decay": 0.9}),
        "a new classifier alone": changed(model={"heads": "separate"}, train={"retrain_epochs": 1}),
        "mixed": changed(loss={"name": "logit_adjusted"}, train={"mixup": 0.5, "remix": True}),
        "views through transforms": changed(data={"augmentation": "autoaugment", "workers": 0}),
    }


def train(config: Config, processes: Processes) -> dict[str, Any]:
    """Some steps in float64, then everything that is measured."""
    with pytest.MonkeyPatch.context() as patch:
        build_loss = run_module.build_loss
        patch.setattr(run_module, "check_images_fit", lambda model, *_: model.double())
        patch.setattr(run_module, "build_loss", lambda *a, **k: build_loss(*a, **k).double())
        run = run_module.Run(config, processes=processes)
        run.connect()
        if config.train.retrain_epochs:
            start_retraining(run)
            run.model.train()
            run.loss.double()
        parts = []
        for step, batch in enumerate(batches(run)):
            batch = batch._replace(images=batch.images.double())
            parts.append(loop.train_step(run, batch, progress=step / (2 * STEPS)))
            if run.average is not None:
                run.average.update(run.model, step=step + 1)
    loss = {name: value.clone() for name, value in run.loss.state_dict().items()}
    model = {name: value.clone() for name, value in run.model.state_dict().items()}
    for network in (run.model, run.measured):
        network.float()
    measured, means = run.measure()
    for layer, measures in run.measure_layers().items():
        measured |= {f"{layer}: {name}": value for name, value in measures.items()}
    return {"parts": parts, "model": model, "loss": loss, "measured": measured, "means": means}


def work(rank: int, world: int, _: list[str]) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for size in range(2, world + 1):
        group: Any = dist.new_group(list(range(size)))
        if rank < size:
            for name, config in cases().items():
                results[size, name] = train(config, Processes(rank, size, group))
            results[size, "ghosts"] = train(GHOSTS, Processes(rank, size, group))
    return results


if __name__ == "__main__":
    rank_main(work)
