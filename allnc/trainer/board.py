"""What TensorBoard shows of a finished run beside the scalars of its epochs: pictures, options and final measures.

The HPARAMS page of TensorBoard compares the runs of a folder by these. Programs that follow TensorBoard's files, such
as Weights & Biases or MLflow, take them along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from allnc.config import Config
from allnc.trainer.folder import ANGLES, CONFUSION, CURVES
from allnc.trainer.options import dotted

# What the summary says of a run beside its measures.
_NO_MEASURES = ("epochs", "trained_epochs", "seed", "processes", "many_above", "few_below")


def finish_board(board: SummaryWriter, folder: Path, config: Config, summary: Mapping[str, Any]) -> None:
    """Add pictures, options and final measures to what TensorBoard has of a run.

    Args:
        board: the run's writer: each that is made begins another file of events.
        folder: of the run, with its pictures.
        config: its options; `out`, the place of the run, is left out.
        summary: what summary.json holds, with "epochs"; its numbers are the measures.
    """
    options = {name: _simple(value) for name, value in dotted(config).items() if name != "out"}
    measures = {
        f"final/{name}": float(value)
        for name, value in summary.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in _NO_MEASURES
    }
    epoch = summary["epochs"]
    for path in (folder / name for name in (ANGLES, CURVES, CONFUSION)):
        if path.is_file():  # of many classes there is no confusion matrix
            with Image.open(path) as image:
                board.add_image(path.stem, np.asarray(image.convert("RGB")), epoch, dataformats="HWC")
    writer = board.file_writer
    assert writer is not None  # until it is closed
    for part in hparams(options, measures):  # `add_hparams` would write a folder of its own inside the run's
        writer.add_summary(part)
    for name, value in measures.items():
        board.add_scalar(name, value, epoch)


def _simple(value: Any) -> bool | int | float | str:
    """A value that TensorBoard takes as an option."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
