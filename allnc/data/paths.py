"""Paths of many images as arrays, which worker processes share with the main one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

# Any string that Python holds, names that are no UTF-8 included, comes back as it was.
_ENCODING, _ERRORS = "utf-8", "surrogatepass"


class PathList(Sequence[str]):
    """A sequence of paths that is three arrays, whatever its length.

    Worker processes that are forked share the pages of the main process until one of the two writes to them. Reading a
    list of strings writes to each: it counts references. So every worker would come to hold a list of its own, a
    hundred megabytes of iNaturalist; nobody writes to arrays.

    Args:
        text: the paths in UTF-8 with anything between them, uint8, one dimension.
        starts, ends: where each path begins and ends in `text`, [n], int64.
        root: folder from which the relative ones start.
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray, root: str = "") -> None:
        self.text, self.starts, self.ends, self.root = text, starts, ends, root

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathList:
        """Return the same paths as a list that workers share."""
        raw = [path.encode(_ENCODING, _ERRORS) for path in paths]
        ends = np.cumsum([len(path) for path in raw], dtype=np.int64)
        starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
        return cls(np.frombuffer(b"".join(raw), np.uint8), starts, ends)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> PathList: ...

    def __getitem__(self, index: int | slice) -> str | PathList:
        if isinstance(index, slice):
            return PathList(self.text, self.starts[index], self.ends[index], self.root)
        raw = self.text[self.starts[index] : self.ends[index]].tobytes()
        return os.path.join(self.root, raw.decode(_ENCODING, _ERRORS))

    def take(self, positions: np.ndarray) -> PathList:
        """Return the paths at `positions`, [m], in that order; the text is shared."""
        return PathList(self.text, self.starts[positions], self.ends[positions], self.root)
