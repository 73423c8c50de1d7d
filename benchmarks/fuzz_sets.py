"""Targets of benchmarks/fuzz.py that try sets held in memory: Fashion-MNIST's files and files of arrays."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from pathlib import Path
from random import Random

import numpy as np
from mutate import mutated, refused
from safetensors.numpy import save

from allnc.config import DataConfig
from allnc.data import load


def idx(random: Random, folder: Path) -> None:
    """Damaged idx files: a ValueError that names the folder's file, or images with as many labels from 0 to 9."""
    number = random.randint(1, 5)
    for part in ("train", "t10k"):
        pixels, labels = random.randbytes(784 * number), random.choices(range(10), k=number)
        for kind, head, data in (("images", (3, number, 28, 28), pixels), ("labels", (1, number), bytes(labels))):
            raw = struct.pack(f">{len(head)}I", 2048 + head[0], *head[1:]) + data
            raw = mutated(random, raw) if random.random() < 0.3 else raw
            packed = gzip.compress(raw, mtime=0)
            packed = mutated(random, packed) if random.random() < 0.3 else packed
            path = folder / f"{part}-{kind}-idx{head[0]}-ubyte"
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".gz").write_bytes(packed)
            if random.random() < 0.3:
                path.write_bytes(raw)
    config = DataConfig(name="fashion_mnist", root=str(folder), augmentation="none", imbalance="none")
    try:
        sets = load(config)
    except Exception as error:
        return refused(error, str(folder / "train-"), str(folder / "t10k-"))
    for found in sets:
        assert found.images is not None and found.images.shape == (len(found), 1, 28, 28) and len(found) > 0


def arrays(random: Random, folder: Path) -> None:
    """Damaged files of arrays: a ValueError that names the file, or sets that fit together."""
    number, classes = random.randint(1, 6), random.randint(1, 4)
    members: dict[str, np.ndarray] = {}
    for part in ("", "test_"):
        size = random.choice(((8, 8),) * 6 + ((8, 8, 3), (5, 7), (0, 8)))
        pixels = np.frombuffer(random.randbytes(number * int(np.prod(size))), np.uint8)
        kind = random.choice((np.uint8,) * 9 + (np.float32, np.int64))
        members[f"{part}images"] = pixels.reshape(number, *size).astype(kind)
        kind = random.choice((np.int64, np.uint8, np.int16, np.uint64, np.float32))
        members[f"{part}labels"] = np.array([random.randrange(classes) for _ in range(number)], kind)
    members["groups"] = np.arange(number + (random.random() < 0.1))
    names = np.array([random.choice(("a", "Ж", "\0\n", "")) + str(n) for n in range(classes)])
    members["classes"] = names.astype(object) if random.random() < 0.1 else names
    for name in random.sample(list(members), random.choice((0, 0, 0, 1))):
        del members[name]
    if random.random() < 0.3:
        path = folder / "set.safetensors"
        tensors = {name: np.ascontiguousarray(member) for name, member in members.items() if name != "classes"}
        raw = save(tensors, {"classes": random.choice((json.dumps(names.tolist()), "[" * 9999, '[1, "a"]', ""))})
    else:
        path = folder / "set.npz"
        raw = _zipped(random, members)
    path.write_bytes(mutated(random, raw) if random.random() < 0.3 else raw)
    try:
        train, test = load(DataConfig(name="arrays", root=str(path)))
    except Exception as error:
        return refused(error, str(path))
    assert train.images is not None and test.images is not None and train.images.shape[1:] == test.images.shape[1:]
    assert train.class_counts.min() > 0 and len(train.class_counts) == train.num_classes == test.num_classes


def _zipped(random: Random, members: dict[str, np.ndarray]) -> bytes:
    """Return the arrays as numpy zips them, some damaged before their checksum is made."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, member in members.items():
            file = io.BytesIO()
            np.save(file, member)
            raw = file.getvalue()
            archive.writestr(f"{name}.npy", mutated(random, raw) if random.random() < 0.1 else raw)
    return memory.getvalue()
