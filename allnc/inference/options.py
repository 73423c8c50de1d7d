"""Options that every program has which takes a trained run; torch is not imported."""

from __future__ import annotations

import argparse
from pathlib import Path

DEVICES = ("auto", "cpu", "cuda")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add --weights, as `which`, and --model.weights, as `pretrained`."""
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        dest="which",
        help="of the last epoch, or of the best one on validation images; default last, and best with train.patience",
    )
    parser.add_argument("--model.weights", dest="pretrained", help="pretrained weights, where they are not the run's")


def add_prior(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --prior, whose help begins with its purpose."""
    parser.add_argument(
        "--prior",
        metavar="uniform|train|FILE",
        help=f"{purpose}; FILE: a CSV of class name and weight; default as trained",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --train.device, as `device`."""
    parser.add_argument("--train.device", dest="device", choices=DEVICES, default="auto", help="default auto")


def check_run(folder: Path) -> None:
    """Raise ValueError unless RUN_DIR holds a trained model."""
    from allnc.trainer.folder import check_trained  # reads YAML, which --help need not wait for

    check_trained(folder)
