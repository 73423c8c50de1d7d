"""Write one HTML page about runs: `python -m allnc.report RUN... [--out report.html]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from allnc._command import Parser, answer

MARK = '<meta name="generator" content="allnc.report'  # by which a page of ours is known, that may be replaced


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    parser = Parser(
        "allnc.report",
        __doc__,
        epilog="The page holds everything in itself: it can be mailed and read without a network. The first run is the "
        "one that the others are compared with.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--labels", metavar="NAME", nargs="+", help="names of the runs; default those of the folders")
    parser.add_argument(
        "--stored",
        action="store_true",
        help="show what the folders hold and let no image pass the network: no angles between classes",
    )
    parser.add_argument("--data.root", dest="root", help="folder of the images, where it is not the runs' own")
    parser.add_argument("--train.device", dest="device", choices=("auto", "cpu", "cuda"), help="default the runs' own")
    options = parser.parse_args(arguments)
    return answer("allnc.report", lambda: _report(options))


def _report(options: argparse.Namespace) -> None:
    from allnc.plot.named import check_runs, labels_of

    check_page(options.out)
    check_runs(options.runs)
    labels = labels_of(options.runs, options.labels)
    if options.stored and options.device is not None:
        raise ValueError("--train.device would be ignored with --stored, which lets no image pass a network; remove it")
    from allnc.report.page import write_report  # last: it imports torch

    write_report(
        options.runs,
        options.out,
        labels=labels,
        measure=not options.stored,
        root=options.root,
        device=options.device,
        say=lambda line: print(line, flush=True),
    )
    print(options.out)


def check_page(path: Path) -> None:
    """Raise ValueError unless a page can be written there; a file that is no report is kept."""
    if path.is_dir():
        raise ValueError(f"--out must be a file; got the folder {path}: give {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ValueError(f"--out must be in a folder that is there; got {path}")
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(2000):
                raise ValueError(f"--out must be a new file or an earlier report; {path} is neither: give another name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out must be in a folder that can be written; got {path}")


if __name__ == "__main__":
    sys.exit(main())
