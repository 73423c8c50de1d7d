"""What a launcher such as torchrun says of the processes that it has started, by the environment; without torch."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes there are, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among all, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
