"""Check the theory of neural collapse: `python -m allnc.theory landscape`, `minority` or `losses`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from allnc._command import Parser, answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, print and, with --out, write tables and a picture; return 0, 2 for a mistake, 130 after Ctrl-C."""
    parser = Parser("allnc.theory", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    landscape = commands.add_parser("landscape", help="minimisers, saddles and their curvature for each loss")
    landscape.add_argument("--classes", type=int, default=4, help="K; default 4")
    landscape.add_argument("--samples", type=int, default=5, help="n of each class; default 5")
    landscape.add_argument("--dim", type=int, default=6, help="d >= K - 1; default 6")
    landscape.add_argument("--starts", type=int, default=10, help="random starts of each loss; default 10")
    landscape.add_argument("--focal_classes", type=int, default=30, help="K of the focal loss's window; default 30")
    minority = commands.add_parser("minority", help="minority collapse, its limit, and what P2P does to it")
    minority.add_argument(
        "--counts", type=int, nargs="+", default=[100, 100, 10, 10], help="of classes; default 100 100 10 10"
    )
    minority.add_argument("--starts", type=int, default=5, help="random starts of each row with P2P; default 5")
    minority.add_argument("--cells", type=int, default=12, help="of the phase diagram's sides; default 12")
    losses = commands.add_parser("losses", help="whether losses end at the same accuracy, over width and length")
    losses.add_argument(
        "sweep",
        metavar="DIR",
        type=Path,
        nargs="*",
        default=[Path("benchmarks/results/losses")],
        help="folders of sweeps over model.width and train.epochs; default benchmarks/results/losses",
    )
    losses.add_argument("--baseline", default="ce", help="method that the others are compared with; default ce")
    losses.add_argument("--methods", nargs="+", metavar="NAME", help="compare these alone with it; default all")
    losses.add_argument(
        "--margin", type=float, default=1.0, help="points of accuracy that count as no difference; default 1"
    )
    for command in (landscape, minority):
        command.add_argument("--seed", type=int, default=0, help="of the random starts; default 0")
    for command in (landscape, minority, losses):
        command.add_argument("--out", metavar="DIR", type=Path, help="folder for results.json, CSV files and a picture")
    options = parser.parse_args(arguments)

    def body() -> None:
        if options.command == "losses":
            from allnc.theory.equality_report import run_losses

            run_losses(options)
            return
        from allnc.theory.commands import run_landscape, run_minority

        {"landscape": run_landscape, "minority": run_minority}[options.command](options)

    return answer("allnc.theory", body)


if __name__ == "__main__":
    sys.exit(main())
