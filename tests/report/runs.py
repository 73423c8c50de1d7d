"""Run folders as training leaves them: configuration, records, summary and predictions of a made-up network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from allnc.config import Config, DataConfig
from allnc.trainer.options import to_dict


def made_up(
    folder: Path,
    *,
    classes: list[str],
    counts: np.ndarray,
    per_class: int,
    right: float = 0.7,
    seed: int = 0,
    data: DataConfig | None = None,
    paths: list[str] | None = None,
    **files: Any,
) -> dict[str, np.ndarray]:
    """Write a run folder of `per_class` measured images of each class and return its predictions.

    Args:
        folder: made, with its parents.
        classes: names, [C].
        counts: training images, [C].
        per_class: measured images of each class.
        right: share of them that the largest classes are given rightly; small ones less.
        seed: of everything random.
        data: section of the configuration.
        paths: files of the images, [C * per_class].
        files: arrays that replace those of predictions.npz; None leaves one out.
    """
    random = np.random.RandomState(seed)
    num_classes = len(classes)
    labels = np.repeat(np.arange(num_classes), per_class).astype(np.int32)
    skill = right * (0.4 + 0.6 * np.log1p(counts) / np.log1p(counts.max()))
    wrong = random.rand(len(labels)) > skill[labels]
    predicted = np.where(wrong, random.choice(num_classes, len(labels), p=counts / counts.sum()), labels)
    confidence = random.uniform(1 / num_classes, 1, len(labels)).astype(np.float32)
    arrays = {
        "labels": labels,
        "predicted": predicted.astype(np.int32),
        "confidence": confidence,
        "second": ((predicted + 1) % num_classes).astype(np.int32),
        "second_confidence": (1 - confidence) / 2,
        "true_confidence": np.where(predicted == labels, confidence, (1 - confidence) / 2).astype(np.float32),
        "positions": np.arange(len(labels)),
        "classes": np.array(classes),
        "class_counts": counts.astype(np.int64),
        "measured_on": np.array("test"),
        **({} if paths is None else {"paths": np.array(paths)}),
        **files,
    }
    folder.mkdir(parents=True)
    np.savez_compressed(folder / "predictions.npz", **{k: v for k, v in arrays.items() if v is not None})
    config = Config(data=data or DataConfig(), seed=seed)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    records = [
        {
            "epoch": e,
            "loss": 3 / e,
            "loss_cls": 2 / e,
            "loss_hycon": 1 / e,
            "eta": 1 - e / 30,
            "lr": 0.1,
            "accuracy": 50 + e,
        }
        for e in range(1, 31)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {
        "accuracy": 100 * float((arrays["labels"] == arrays["predicted"]).mean()),
        "nc1": 0.5 + seed,
        "seconds": 100.0,
        "epochs": 30,
        "seed": seed,
        "versions": {"allnc": "0", "torch": "2"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return arrays
