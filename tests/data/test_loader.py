"""Loaders: layout of views and branches, repeatability, independence of workers."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from allnc.config import DataConfig
from allnc.data import Batch, ImageSet, TrainLoader, load, plain_batches
from allnc.data.paths import PathList
from allnc.data.views import normalise

CPU = torch.device("cpu")


def digits(**changes: object) -> tuple[ImageSet, DataConfig]:
    config = DataConfig(**{"max_per_class": 40, "imbalance_ratio": 4, **changes})  # pyright: ignore[reportArgumentType]
    return load(config)[0], config


def loader(images: ImageSet, config: DataConfig, *, two_batches: bool = False, batch_size: int = 16) -> TrainLoader:
    return TrainLoader(images, config, batch_size=batch_size, seed=3, two_batches=two_batches, device=CPU)


def test_rows_are_view_major() -> None:
    images, config = digits(augmentation="none", views=3)
    source = loader(images, config)
    batch = next(iter(source.epoch(0)))
    assert images.images is not None
    index = source.indices(0)[0]
    expected = normalise(images.images[index], images.mean, images.std)
    for view in range(3):
        rows = slice(view * 16, (view + 1) * 16)
        assert torch.equal(batch.images[rows], expected)
        assert torch.equal(batch.labels[rows], images.labels[index])
    assert torch.equal(batch.branch(batch.labels, rebalance=False), batch.labels)
    assert torch.equal(batch.branch(batch.labels, rebalance=True), batch.labels)


def test_branches_split_each_view() -> None:
    images, config = digits(augmentation="none", rebalance_sampler="reversed")
    source = loader(images, config, two_batches=True)
    batch, index = next(iter(source.epoch(0))), source.indices(0)[0]
    assert len(batch.images) == 2 * (16 + 16) == len(batch.labels)
    uniform = batch.branch(batch.labels, rebalance=False)
    rebalance = batch.branch(batch.labels, rebalance=True)
    assert torch.equal(uniform, images.labels[index[:16]].repeat(2))
    assert torch.equal(rebalance, images.labels[index[16:]].repeat(2))


def test_an_epoch_is_every_image_once_and_the_tail_more_often_when_rebalanced() -> None:
    images, config = digits(rebalance_sampler="reversed")
    source = loader(images, config, two_batches=True)
    index = source.indices(0)
    uniform = index[:, :16].flatten()
    assert len(set(uniform.tolist())) == len(uniform) == len(images) // 16 * 16
    drawn = torch.bincount(images.labels[index[:, 16:].flatten()], minlength=10)
    assert drawn[0] < drawn[-1]


def test_one_batch_can_have_classes_alike() -> None:
    """Drawn from a stream of its own: a re-balancing branch with the same sampler sees other images."""
    images, config = digits(sampler="class_balanced", rebalance_sampler="class_balanced")
    source = loader(images, config, two_batches=True)
    epochs = torch.stack([source.indices(epoch) for epoch in range(40)])  # [40, batches, 16 + 16]
    drawn = torch.bincount(images.labels[epochs[..., :16].flatten()], minlength=10)
    total = int(drawn.sum())
    assert total == 40 * 16 * len(source)
    assert ((drawn / total - 0.1).abs() < 4 * (0.1 * 0.9 / total) ** 0.5).all()
    assert not torch.equal(epochs[..., :16], epochs[..., 16:])
    assert torch.equal(loader(images, config).indices(7), epochs[7, :, :16])


def test_epochs_repeat_and_differ() -> None:
    images, config = digits()
    first, again = (list(loader(images, config).epoch(1)) for _ in range(2))
    other = list(loader(images, config).epoch(2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].images, other[0].images)
    views = first[0].images.unflatten(0, (2, -1))
    assert not torch.equal(views[0], views[1])


def test_a_batch_larger_than_the_set_is_refused() -> None:
    images, config = digits()
    with pytest.raises(ValueError, match=f"train.batch_size must be <= {len(images)}"):
        loader(images, config, batch_size=len(images) + 1)


def _on_disk(folder: Path) -> ImageSet:
    paths = []
    for i in range(6):
        paths.append(str(folder / f"{i}.png"))
        Image.effect_noise((24, 20), 20 + i).convert("RGB").save(paths[-1])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    return ImageSet(labels=labels, num_classes=3, mean=(0.5,) * 3, std=(0.5,) * 3, paths=PathList.of(paths))


def test_views_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    images = _on_disk(tmp_path)
    batches = []
    for workers in (0, 2):
        config = DataConfig(name="image_folder", root="x", augmentation="randaugment", image_size=16, workers=workers)
        torch.manual_seed(workers)
        batches.append(list(loader(images, config, batch_size=3).epoch(0)))
    assert len(batches[0]) == 2
    for ours, theirs in zip(*batches, strict=True):
        assert ours.images.shape == (6, 3, 16, 16)
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)


def test_small_images_can_be_augmented_one_by_one() -> None:
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    images = ImageSet(labels=labels, num_classes=3, mean=(0.5,) * 3, std=(0.5,) * 3, images=pixels)
    config = DataConfig(name="cifar10", augmentation="autoaugment", workers=0)
    source = loader(images, config, batch_size=6)
    batch = next(iter(source.epoch(0)))
    assert batch.images.shape == (12, 3, 32, 32)
    assert torch.equal(batch.labels, labels[source.indices(0)[0]].repeat(2))
    blank = (batch.images == 0).all(1).flatten(1).sum(1)  # cutout is in the first view only
    assert (blank[:6] >= 16 * 16).all() and (blank[6:] < 16 * 16).all()


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    config = DataConfig(name="image_folder", root="x", augmentation="resized_crop", image_size=16, workers=0)
    before = torch.get_rng_state()
    list(loader(_on_disk(tmp_path), config, batch_size=3).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_plain_batches_are_all_images_in_order(tmp_path: Path) -> None:
    images, config = digits()
    labels = torch.cat([labels for _, labels in plain_batches(images, config, 7, CPU)])
    assert torch.equal(labels, images.labels)
    config = DataConfig(name="image_folder", root="x", augmentation="none", image_size=16, workers=0)
    parts = list(plain_batches(_on_disk(tmp_path), config, 4, CPU))
    assert [len(pixels) for pixels, _ in parts] == [4, 2] and parts[0][0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(workers: int, tmp_path: Path) -> None:
    images = _on_disk(tmp_path)
    Path(images.paths[4]).write_bytes(b"not an image")
    config = DataConfig(name="image_folder", root="x", augmentation="none", image_size=16, workers=workers)
    with pytest.raises(ValueError, match=r"^\S+4\.png must be a readable image"):
        list(plain_batches(images, config, 6, CPU))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_whatever_its_name(workers: int, tmp_path: Path) -> None:
    images = _on_disk(tmp_path)
    broken = tmp_path / "two\nlines.png"
    shutil.copy(images.paths[0], broken)
    broken.write_bytes(broken.read_bytes()[:60])
    images = dataclasses.replace(images, paths=PathList.of([*images.paths[:5], str(broken)]))
    config = DataConfig(name="image_folder", root="x", augmentation="none", image_size=16, workers=workers)
    with pytest.raises(ValueError) as caught:
        list(plain_batches(images, config, 6, CPU))
    message = str(caught.value)
    assert not multiprocessing.active_children()  # the error keeps no worker alive
    assert message.startswith("'") and r"two\nlines.png' must be a readable image" in message and "\n" not in message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_a_killed_worker_is_one_line_and_no_wait(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    images, config = (
        _on_disk(tmp_path),
        DataConfig(name="image_folder", root="x", augmentation="none", image_size=16, workers=2),
    )
    images = images.select(np.arange(6).repeat(200))
    batches = plain_batches(images, config, 2, CPU)
    next(batches)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, number)
    time.sleep(0.5)  # an error here, far from the loader, is what torch's own handler of the signal would raise
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^a process that reads images was ended by {number.name}; .*data.workers"):
        for _ in batches:
            pass
    assert time.monotonic() - started < 30 and not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGCHLD) == before


def test_workers_without_shared_memory_or_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raised with a /dev/shm of 4 MB and with 60 open files."""
    images = _on_disk(tmp_path)
    config = DataConfig(name="image_folder", root="x", augmentation="none", image_size=16, workers=2)
    full = "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to write to file </torch_1_2_3>: "
    for text, message in (
        (full + "No space left on device (28)", r"^shared memory .* enlarge /dev/shm .*; got data\.workers 2$"),
        ("Too many open files. Communication with ...", r"^the workers have .* \(ulimit -n\) .*; got data\.workers 2$"),
    ):

        def fail(*_: object, text: str = text, **__: object) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr(torch.Tensor, "to", fail)
        with pytest.raises(ValueError, match=message):
            list(plain_batches(images, config, 6, CPU))
        monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(plain_batches(images, config, 6, CPU))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_cannot_be_started_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = KeyError("a thread that was being started")
    interrupted.__context__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    before = signal.getsignal(signal.SIGCHLD)
    config = DataConfig(name="image_folder", root="x", augmentation="none", image_size=16, workers=9)
    for error, message in (
        (BlockingIOError(11, "Resource temporarily unavailable"), r"^data\.workers must be .* can be started; got 9: "),
        (interrupted, r"^a process that reads images ended; .*; got data\.workers 9$"),
        (interrupted.__context__, r"^a process that reads images ended; .*; got data\.workers 9$"),
    ):

        def fail(_: object, error: Exception = error) -> None:
            signal.signal(signal.SIGCHLD, lambda *_: None)
            raise error

        monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fail)
        with pytest.raises(ValueError, match=message):
            list(plain_batches(_on_disk(tmp_path), config, 6, CPU))
        assert signal.getsignal(signal.SIGCHLD) == before


def test_a_worker_that_dies_at_any_moment_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's and multiprocessing's many errors: those seen when a worker died as its batch was fetched."""
    config = DataConfig(name="image_folder", root="x", augmentation="none", image_size=16, workers=1)
    ours, plain = os.getpid(), torch.Tensor.to
    unknown = RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")
    for error in (EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "no socket"), unknown):

        def fail(tensor: torch.Tensor, *rest: Any, error: Exception = error, **named: Any) -> torch.Tensor:
            if os.getpid() != ours:
                return plain(tensor, *rest, **named)
            if error is not unknown:
                multiprocessing.active_children()[0].kill()
                time.sleep(0.2)
            raise error

        monkeypatch.setattr(torch.Tensor, "to", fail)
        with pytest.raises(ValueError, match=r"^a process that reads images .*; got data\.workers 1$"):
            list(plain_batches(_on_disk(tmp_path), config, 6, CPU))
        monkeypatch.undo()


def on_disk_config(**changes: Any) -> DataConfig:
    values: dict[str, Any] = {"augmentation": "resized_crop", "image_size": 16, "workers": 2, **changes}
    return DataConfig(name="image_folder", root="x", **values)


def for_run(images: ImageSet, config: DataConfig, epochs: int) -> TrainLoader:
    return TrainLoader(images, config, batch_size=3, seed=3, two_batches=False, device=CPU, epochs=epochs)


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


@pytest.mark.parametrize("two_batches", [False, True])
def test_views_do_not_depend_on_the_parts(two_batches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, config = _on_disk(tmp_path), on_disk_config(workers=0, rebalance_sampler="reversed")
    whole = list(loader(images, config, two_batches=two_batches, batch_size=3).epoch(1))
    plain = list(plain_batches(images, config, 4, CPU))
    for module in ("loader", "workers"):
        monkeypatch.setattr(f"allnc.data.{module}.PART", 2)
    assert same(list(loader(images, config, two_batches=two_batches, batch_size=3).epoch(1)), whole)
    for ours, theirs in zip(plain_batches(images, config, 4, CPU), plain, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_workers_live_for_the_run_and_epochs_stay_what_they_are(tmp_path: Path) -> None:
    images, config = _on_disk(tmp_path), on_disk_config()
    alone = [list(loader(images, on_disk_config(workers=0), batch_size=3).epoch(e)) for e in range(3)]
    source, seen = for_run(images, config, 3), []
    for epoch in range(3):
        batches = []
        for batch in source.epoch(epoch):
            batches.append(batch)
            seen.append({child.pid for child in multiprocessing.active_children()})
        assert same(batches, alone[epoch])
        measured = torch.cat([labels for _, labels in plain_batches(images, config, 4, CPU)])  # with its own workers
        assert torch.equal(measured, images.labels)
    assert len(seen) == 6 and all(pids == seen[0] and len(pids) == 2 for pids in seen)
    assert not multiprocessing.active_children()


def test_an_epoch_that_breaks_off_or_comes_out_of_order_starts_anew(tmp_path: Path) -> None:
    images, config = _on_disk(tmp_path), on_disk_config(workers=1)
    alone = [list(loader(images, on_disk_config(workers=0), batch_size=3).epoch(e)) for e in range(3)]
    source = for_run(images, config, 3)
    next(source.epoch(0))
    assert same(list(source.epoch(0)), alone[0])  # the next would be 1
    assert same(list(source.epoch(2)), alone[2])
    assert same(list(source.epoch(1)), alone[1]) and len(multiprocessing.active_children()) == 1
    del source
    assert not multiprocessing.active_children()


def test_a_worker_killed_between_two_epochs_is_one_line(tmp_path: Path) -> None:
    images, config = _on_disk(tmp_path), on_disk_config(workers=1)
    images = images.select(np.arange(6).repeat(40))
    source = for_run(images, config, 3)
    list(source.epoch(0))
    multiprocessing.active_children()[0].kill()
    with pytest.raises(ValueError, match=r"^a process that reads images was ended by SIGKILL; .*data\.workers 1$"):
        list(source.epoch(1))
    assert not multiprocessing.active_children()
    assert len(list(source.epoch(1))) == 80


def test_views_come_as_bytes_and_are_normalised_when_they_are_fed(tmp_path: Path) -> None:
    images, config = _on_disk(tmp_path), on_disk_config(workers=0)
    source = loader(images, config, batch_size=6)
    batch = next(iter(source.epoch(0)))
    assert batch.images.dtype == torch.uint8
    wanted = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(images.mean, images.std)])(batch.images)
    torch.testing.assert_close(source.pixels(batch.images), wanted, rtol=0, atol=1e-6)
    part = source.pixels(batch.images[2:5].contiguous(memory_format=torch.channels_last))
    assert torch.equal(part, source.pixels(batch.images)[2:5])
    assert part.dtype == torch.float32 and part.is_contiguous(memory_format=torch.channels_last)
    already = next(iter(loader(*digits()).epoch(0))).images
    assert source.pixels(already) is already
