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
from allnc.trainer.options import dotted


def finish_board(folder: Path, config: Config, summary: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
    """Add pictures, options and final measures to the event files of a run.

    Args:
        folder: of the run.
        config: its options; `out`, the place of the run, is left out.
        summary: what summary.json holds, with "epochs"; its numbers are the measures.
        pictures: PNG files by the names under which TensorBoard shows them.
    """
    options = {name: _simple(value) for name, value in dotted(config).items() if name != "out"}
    measures = {name: value for name, value in summary.items() if _is_measure(name, value)}
    with SummaryWriter(str(folder)) as board:
        for name, path in pictures.items():
            with Image.open(path) as image:
                board.add_image(name, np.asarray(image.convert("RGB")), summary["epochs"], dataformats="HWC")
        writer = board.file_writer
        assert writer is not None  # until it is closed
        # Not `add_hparams`, which writes a folder of its own inside the run's; its scalars are those of the last epoch.
        for part in hparams(options, measures):
            writer.add_summary(part)
        for name, value in measures.items():
            board.add_scalar(name, value, summary["epochs"])


def _simple(value: Any) -> bool | int | float | str:
    """A value that TensorBoard takes as an option."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _is_measure(name: str, value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and name not in ("epochs", "seed", "processes", "many_above", "few_below")
