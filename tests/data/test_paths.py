"""Paths as arrays: a sequence like any other, which costs worker processes nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from allnc.data.paths import PathList

ODD = ["a.png", "", "two words/été.png", "犬", "x\u2028y", os.fsdecode(b"\xff\xc3.png"), "line\nline"]
SMAPS = Path("/proc/self/smaps_rollup")


def test_a_path_list_is_a_sequence_of_the_same_strings() -> None:
    paths = PathList.of(ODD)
    assert list(paths) == ODD and len(paths) == len(ODD) and paths[-1] == ODD[-1] and "犬" in paths
    assert list(paths[1:6:2]) == ODD[1:6:2] and list(reversed(paths)) == ODD[::-1]
    assert list(paths.take(np.array([3, 0, 3]))) == ["犬", "a.png", "犬"]
    with pytest.raises(IndexError):
        paths[len(ODD)]
    assert list(PathList.of([])) == [] and list(PathList.of([]).take(np.array([], np.int64))) == []


def test_relative_paths_start_from_the_root() -> None:
    text = np.frombuffer(b"one two.png 7\n/b.png 1\n", np.uint8)
    paths = PathList(text, np.array([0, 14]), np.array([11, 20]), "data/in")
    assert list(paths) == ["data/in/one two.png", "/b.png"]
    assert list(paths[1:]) == ["/b.png"] and list(paths.take(np.array([0]))) == ["data/in/one two.png"]


def own_memory() -> float:
    """MiB that this process shares with no other."""
    lines = SMAPS.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def read_all(paths: Sequence[str], pipe: Connection) -> None:
    gc.freeze()
    before = own_memory()
    longest = 0
    for at in range(len(paths)):
        longest = max(longest, len(paths[at]))
    pipe.send((longest, own_memory() - before))


def growth(make: Callable[[list[str]], Sequence[str]], number: int) -> float:
    """MiB by which a forked process grows when it reads every path."""
    paths = make([f"/data/imagenet/train/n{n % 1000:08d}/n{n % 1000:08d}_{n}.JPEG" for n in range(number)])
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=read_all, args=(paths, theirs))
    child.start()
    longest, grown = ours.recv()
    child.join()
    assert longest == max(map(len, (paths[0], paths[-1])))
    return grown


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what a process shares")
def test_reading_paths_does_not_copy_them_into_a_worker() -> None:
    strings, few, many = growth(list, 300_000), growth(PathList.of, 1_000), growth(PathList.of, 300_000)
    assert strings > 15, "the measure must see what counting references copies"
    assert many < few + 2
