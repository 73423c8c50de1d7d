"""Draw runs, each alone or several side by side: `python -m allnc.plot RUN... [--kind KIND ...] [--out DIR]`."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allnc._command import Parser, answer

if TYPE_CHECKING:
    from allnc.plot.runs import MeasuredRun

FROM_RECORDS = {
    "curves": "accuracy and NC1 to NC4 over the epochs",
    "cosines": "standard deviation of the cosines over the epochs",
    "duality": "distance between classifier and class means over the epochs",
    "drift": "how far class means move from one measurement to the next",
    "layer_curves": "NC1 to NC4 of the blocks over the epochs, of runs with train.collapse_layers",
}
FROM_WEIGHTS = {
    "angles": "angles between classes as heat maps on one colour scale",
    "sizes": "lengths and angles of means and class vectors against the size of the class",
    "layers": "NC1, NC2 and NC4 at the layers",
    "simplex": "features, means and class vectors of runs with 2 or 3 features",
}
KINDS = {**FROM_RECORDS, **FROM_WEIGHTS}
DEFAULT = [kind for kind in KINDS if kind not in ("drift", "layer_curves", "simplex")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures; return 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    kinds = "; ".join(f"{kind}: {text}" for kind, text in KINDS.items())
    again = f"{', '.join(FROM_WEIGHTS)} are of the run's weights (with train.patience the best), measured once more."
    parser = Parser("allnc.plot", __doc__, epilog=f"Kinds: {kinds}. {again}")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--kind", metavar="KIND", nargs="+", choices=KINDS, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--labels", metavar="NAME", nargs="+", help="names of the runs; default those of the folders")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("plots"), help="default plots")
    parser.add_argument("--format", nargs="+", choices=("png", "svg"), default=["png"], help="default png")
    parser.add_argument(
        "--layers", help="of the kind layers: names in the model, with commas between them, or all; default its blocks"
    )
    parser.add_argument("--data.root", dest="root", help="folder of the images, where it is not the runs' own")
    parser.add_argument("--train.device", dest="device", choices=("auto", "cpu", "cuda"), help="default the runs' own")
    options = parser.parse_args(arguments)
    return answer("allnc.plot", lambda: _plot(options))


def _plot(options: argparse.Namespace) -> None:
    from allnc.plot.named import check_runs, labels_of
    from allnc.trainer.folder import check_place

    kinds = list(dict.fromkeys(options.kind or DEFAULT))
    for option, value in (("--data.root", options.root), ("--train.device", options.device)):
        if value is not None and not set(kinds) & set(FROM_WEIGHTS):
            raise ValueError(
                f"{option} would be ignored: {', '.join(kinds)} are drawn from the records of the runs; remove it"
            )
    if options.layers is not None and "layers" not in kinds:
        raise ValueError(f"--layers would be ignored: it is read by --kind layers; got {', '.join(kinds)}")
    check_place(options.out)
    check_runs(options.runs)
    labels = labels_of(options.runs, options.labels)
    from allnc.plot.runs import measured, records_of  # after the mistakes: it imports torch

    records = {
        label: records_of(folder)
        for label, folder in zip(labels, options.runs, strict=True)
        if set(kinds) & set(FROM_RECORDS)
    }

    @functools.cache
    def runs() -> list[MeasuredRun]:
        return [
            measured(folder, label, root=options.root, device=options.device)
            for label, folder in zip(labels, options.runs, strict=True)
        ]

    for kind in kinds:
        draw = _drawing(kind, records, runs, options.layers)
        options.out.mkdir(parents=True, exist_ok=True)
        for ending in dict.fromkeys(options.format):
            path = options.out / f"{kind}.{ending}"
            draw(path)
            print(path, flush=True)


def _drawing(
    kind: str, records: dict[str, list[dict]], runs: Callable[[], list[MeasuredRun]], layers: str | None
) -> Callable[[Path], None]:
    """Return what writes a picture to a path, with everything that it shows measured already."""
    from allnc.metrics import plots

    if kind == "layer_curves":
        return lambda path: plots.plot_layer_curves(records, path)
    measures = {
        "curves": plots.GEOMETRY,
        "cosines": plots.COSINES,
        "duality": plots.DUALITY,
        "drift": plots.DRIFT,
    }
    if kind in FROM_RECORDS:
        return lambda path: plots.compare_curves(records, path, measures[kind])
    if kind == "simplex":
        scenes = [run.scene() for run in runs()]
        return lambda path: plots.plot_scenes(scenes, path)
    if kind == "layers":
        from allnc.trainer.collapse_report import layers_of

        names = None if layers is None else layers_of(layers)
        found = {run.vectors.label: run.layers(names) for run in runs()}
        return lambda path: plots.plot_layers(found, path)
    vectors = [run.vectors for run in runs()]
    draw = plots.plot_angles if kind == "angles" else plots.plot_class_sizes
    return lambda path: draw(vectors, path)


if __name__ == "__main__":
    sys.exit(main())
