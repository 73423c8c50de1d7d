"""Runs that were never trained: what loads, predicts and exports them does not mind. Images are rendered here."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from allnc.config import Config, DataConfig
from allnc.trainer import state
from allnc.trainer.run import Run
from tests.trainer.test_training import TINY, changed

CLASSES: tuple[str, ...] = ("apple, red", 'the "pear"', "Ügli")
SIDE = 32


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Runs set the number of threads; the other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ of three classes with odd names, colour images of one size, and one grey and one odd shape."""
    root, random = tmp_path_factory.mktemp("tree"), np.random.RandomState(0)
    for part, counts in (("train", (12, 8, 4)), ("test", (4, 3, 2))):
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.randint(0, 150, (40, 48 if index else 30, 3), dtype=np.uint8)
                pixels[:, :, label] += 90
                image = Image.fromarray(pixels)
                (image.convert("L") if index == 1 else image).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of grey images of 12 x 16 pixels."""
    random, labels = np.random.RandomState(1), np.arange(70) % 3
    images = random.randint(0, 256, (70, 12, 16), dtype=np.uint8)
    path = tmp_path_factory.mktemp("arrays") / "set.npz"
    parts = {"images": images, "labels": labels, "test_images": images[:9], "test_labels": labels[:9]}
    np.savez(path, classes=np.array(CLASSES), **parts)  # pyright: ignore[reportArgumentType]
    return path


def on_files(tree: Path, **settings: Any) -> Config:
    data = DataConfig(name="image_folder", root=str(tree), image_size=SIDE, augmentation="none", workers=0, few=5)
    config = changed(TINY, train={"batch_size": 8}, loss={"backend": "eager", "horizon": 0.0})
    whole = Config(data=data, model=config.model, loss=config.loss, train=config.train)
    return changed(whole, **settings)


def on_arrays(arrays: Path, **settings: Any) -> Config:
    return changed(TINY, data={"name": "arrays", "root": str(arrays), "imbalance": "none"}, **settings)


def saved(config: Config, folder: Path) -> Run:
    """Write the checkpoint of a run of no epochs, whose statistics of the batches have moved; return the run."""
    run = Run(config)
    with torch.no_grad():
        for name, buffer in run.measured.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.1, 0.1)
    folder.mkdir(exist_ok=True)
    state.save(run, folder)
    return run


@pytest.fixture(scope="session")
def run_of_files(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "files"
    saved(on_files(tree), folder)
    return folder


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))
