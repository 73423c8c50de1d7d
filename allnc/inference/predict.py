"""Predicts files as they come and writes what is predicted, whatever their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from allnc.inference.formats import Row, Writer
from allnc.inference.predictor import Predictor
from allnc.inference.reading import Part, read_parts


@dataclass(slots=True)
class Done:
    """What was predicted: images, those of them that could not be read, and how long it took."""

    images: int = 0
    unread: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        unread = f"; {self.unread:,} could not be read" if self.unread else ""
        return f"{self.images:,} images in {self.seconds:.1f} s{unread}"


def predict_files(
    predictor: Predictor,
    paths: Iterable[str],
    writer: Writer,
    *,
    workers: int | None = None,
    said: Callable[[Done], None] | None = None,
) -> Done:
    """Write the most probable classes of each file, in order.

    Args:
        predictor: what predicts.
        paths: the files, read as they are needed.
        writer: where to; `writer.top` classes of each.
        workers: processes that decode; None chooses.
        said: called with what is done so far, after every part.

    Returns:
        How many there were. A file that cannot be read is a row with the reason.

    Raises:
        ValueError: the run predicts no images, or there is no file.
    """
    done, started = Done(), time.perf_counter()
    for part in read_parts(paths, predictor.transform, predictor.device, workers=workers):
        writer.write(_rows(predictor, part, writer.top))
        done.images += len(part.names)
        done.unread += len(part.errors)
        done.seconds = time.perf_counter() - started
        if said is not None:
            said(done)
    if not done.images:
        raise ValueError("IMAGES must name at least one image; got none")
    writer.finish()
    return done


def _rows(predictor: Predictor, part: Part, top: int) -> list[Row]:
    probabilities = torch.empty(0, top)
    if len(part.pixels):
        probabilities = predictor.probabilities(predictor.logits_of(part.pixels))
    shares, classes = (values.tolist() for values in probabilities.topk(top, dim=1))
    places, rows = iter(range(len(shares))), []
    for position, name in enumerate(part.names):
        if position in part.errors:
            rows.append(Row(name, error=part.errors[position]))
            continue
        at = next(places)
        rows.append(Row(name, [predictor.classes[label] for label in classes[at]], shares[at]))
    return rows
