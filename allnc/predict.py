"""Predict the classes of images by a trained run: `python -m allnc.predict RUN_DIR IMAGES...`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from allnc._command import Parser, answer
from allnc.inference.formats import FORMATS, Writer
from allnc.inference.options import add_device, add_prior, add_weights, check_run

if TYPE_CHECKING:
    from allnc.inference.predict import Done

EVERY = 10  # seconds between lines on how far it is
UNREAD = 1  # exit status: an image or more could not be read


def main(arguments: Sequence[str] | None = None) -> int:
    """Write class names and probabilities of images; return 0, 1 if one could not be read, or 2 for a mistake."""
    parser = Parser("allnc.predict", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run, or one with its last.safetensors")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="files, folders with all in them, patterns in quotes, or - for a list of paths on standard input",
    )
    parser.add_argument("--top", type=int, help="how many classes of each image; default 3, or all of fewer")
    parser.add_argument("--format", choices=FORMATS, default="table", help="default table; jsonl is an object a line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to; default the terminal")
    parser.add_argument("--overwrite", action="store_true", help="let FILE be replaced")
    parser.add_argument("--workers", type=int, help="processes that decode; default one a core, 8 at most")
    add_weights(parser)
    add_prior(parser, "probabilities under this class prior")
    parser.add_argument("--data.root", dest="root", help="images of a run of an older version on a file of arrays")
    add_device(parser)
    options = parser.parse_args(arguments)
    unread = 0

    def body() -> None:
        nonlocal unread
        unread = _predict(options)

    return answer("allnc.predict", body) or (UNREAD if unread else 0)


def _predict(options: argparse.Namespace) -> int:
    """Write predictions; return the number of images that could not be read."""
    from allnc.inference.paths import check_sources, image_paths

    if options.top is not None and options.top < 1:
        raise ValueError(f"--top must be >= 1; got {options.top}")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers must be >= 0; got {options.workers}")
    if options.overwrite and options.out is None:
        raise ValueError("--overwrite would be ignored without --out; remove it")
    if options.out is not None:
        _check_out(options.out, options.overwrite)
    check_sources(options.images)
    check_run(options.run)
    from allnc.inference.predict import predict_files  # torch from here on
    from allnc.inference.predictor import load

    predictor = load(
        options.run,
        which=options.which,
        prior=options.prior,
        device=options.device,
        root=options.root,
        pretrained=options.pretrained,
    )
    num_classes = len(predictor.classes)
    top = min(3, num_classes) if options.top is None else options.top
    if top > num_classes:
        raise ValueError(f"--top must be <= {num_classes}, the number of classes; got {top}")
    paths = image_paths(options.images)
    with _opened(options.out) as stream:
        writer = Writer(stream, options.format, top)
        done = predict_files(predictor, paths, writer, workers=options.workers, said=_teller(options))
    print(done, file=sys.stderr)
    return done.unread


def _teller(options: argparse.Namespace) -> Callable[[Done], None] | None:
    """Return what tells a person at a terminal, every few seconds, how far a file has come."""
    if options.out is None or not sys.stderr.isatty():
        return None
    last = time.monotonic()

    def tell(done: Done) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(done, file=sys.stderr)

    return tell


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise ValueError(f"--out must be a file; got the folder {out}")
    if not out.parent.is_dir():
        raise ValueError(f"--out must be in a folder that is there; got {out}")
    if out.exists() and not overwrite:
        raise ValueError(f"--out must be a new file; {out} is there: give --overwrite to replace it")
    if (part := _part_of(out)).exists() and not overwrite:
        raise ValueError(
            f"--out must be a new file; {part} is there, of a prediction that was stopped: move it, or give --overwrite"
        )


def _part_of(out: Path) -> Path:
    return out.with_name(out.name + ".part")


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """Open what is written to: a file beside its place, which it takes once it is whole."""
    if out is None:
        yield sys.stdout
        return
    part = _part_of(out)
    kept = f"what was predicted is in {part}"
    try:
        with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            yield stream
        os.replace(part, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {kept}") from None
    except BaseException:
        if part.is_file():
            print(kept, file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
