"""The page: summary, classes, confusions, calibration, curves, geometry and settings of runs, in one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from allnc._version import __version__
from allnc.report.angles import angle_maps
from allnc.report.charts import Key
from allnc.report.classes import class_groups
from allnc.report.confusions import calibrations, confusions
from allnc.report.curves import collapse_curves, curves
from allnc.report.runs import ReportedRun, read_run
from allnc.report.summary import option_differences, options_of, results, trained
from allnc.trainer.folder import write_whole

HERE = Path(__file__).parent
NUM_COLOURS = 7  # of style.css; later runs have them again, dashed


def write_report(
    folders: Sequence[Path],
    path: Path,
    *,
    labels: Sequence[str],
    measure: bool = True,
    root: str | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the page about runs, the first of which the others are compared with.

    Args:
        folders: of the runs, at least one.
        path: the file to write; one that is there is replaced in one step.
        labels: names of the runs.
        measure: let the runs' images pass their networks for what the folders do not hold.
        root: folder of the images; None for the runs' own.
        device: auto, cpu or cuda; None for the runs' own.
        say: takes lines about what takes a while, or is missing.

    Raises:
        ValueError: a file of a run is damaged, or a run has nothing to show.
        OSError: the page cannot be written.
    """
    runs = []
    for folder, label in zip(folders, labels, strict=True):
        run = read_run(folder, label, measure=measure, root=root, device=device, say=say)
        for note in run.notes:
            say(f"note: {label}: {note}")
        runs.append(run)
    write_whole(path, page(runs).encode("utf-8", errors="replace"))


def page(runs: Sequence[ReportedRun]) -> str:
    """Return the HTML of a page."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    keys = run_keys(runs)
    groups = class_groups(runs, keys)
    context: dict[str, Any] = {
        "version": __version__,
        "style": Markup((HERE / "style.css").read_text(encoding="utf-8")),
        "script": Markup((HERE / "script.js").read_text(encoding="utf-8")),
        "title": " · ".join(run.label for run in runs[:3]) + (" · …" if len(runs) > 3 else ""),
        "runs": runs,
        "keys": keys,
        "trained": trained(runs),
        "results": results(runs),
        "groups": groups,
        "confusions": [c for run in runs if (c := confusions(run)) is not None],
        "calibrations": calibrations(runs),
        "curves": curves(runs, keys),
        "collapse": collapse_curves(runs, keys),
        "angles": angle_maps(runs),
        "differences": option_differences(runs),
        "options": [(run.label, options_of(run)) for run in runs],
    }
    return environment.from_string((HERE / "page.html").read_text(encoding="utf-8")).render(context)


def run_keys(runs: Sequence[ReportedRun]) -> list[Key]:
    """Return the legend of the runs."""
    return [
        Key(run.label, f"run{number % NUM_COLOURS}", number, number >= NUM_COLOURS) for number, run in enumerate(runs)
    ]
