"""The time spent waiting for images, by a clock that the test sets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from allnc.data import waiting
from allnc.data.waiting import Waiting


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def epoch(monkeypatch: pytest.MonkeyPatch, waits: list[float], works: list[float]) -> Waiting:
    clock, watched = Clock(), Waiting()
    monkeypatch.setattr(waiting, "time", clock)

    def batches() -> Iterator[int]:
        for number, seconds in enumerate(waits):
            clock.now += seconds
            yield number

    numbers = []
    for number in watched.watch(batches(), 10):
        numbers.append(number)
        clock.now += works[number]
    assert numbers == list(range(len(waits)))
    return watched


def test_the_share_leaves_the_first_batch_out(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = epoch(monkeypatch, [100.0, 1.0, 0.0, 2.0], [50.0, 3.0, 3.0, 3.0])
    assert (watched.waited, watched.worked, watched.images) == (3.0, 9.0, 30)
    assert watched.share == 0.25
    line = watched.advice(7)
    assert line is not None and "\n" not in line
    # 30 images in 12 seconds, of which the model needed 9.
    assert "waits 25% of the time; it gets 2 images/s and could use 3: raise data.workers (now 7;" in line


@pytest.mark.parametrize(
    ("waits", "works"), [([9.0, 0.1, 0.1], [1.0, 2.0, 2.0]), ([9.0], [1.0]), ([], []), ([1.0, 0.0], [1.0, 0.0])]
)
def test_nothing_is_said_without_a_reason(waits: Any, works: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = epoch(monkeypatch, waits, works)
    assert watched.advice(2) is None
    assert math.isnan(watched.share) or watched.share < 0.05
