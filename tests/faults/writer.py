"""Save a checkpoint again and again for some seconds: `python -m tests.faults.writer DIR`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from allnc.trainer import checkpoint
from tests.faults.runs import TINY

if __name__ == "__main__":
    folder, start, epoch = Path(sys.argv[1]), time.monotonic(), 0
    while time.monotonic() < start + 4:
        epoch += 1
        weights = {"w": torch.full((1000,), float(epoch))}
        checkpoint.save(folder, TINY, epoch=epoch, model=weights, training={"epoch": epoch})
        if epoch == 1:
            print("saved", flush=True)
