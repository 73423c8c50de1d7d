"""Train a model: `python -m allnc.train [DIR] [--config RECIPE|FILE] [--train.epochs 5 --loss.name ce ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from allnc._command import SaidElsewhereError, answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return answer("allnc.train", lambda: _train(words))


def _train(words: list[str]) -> None:
    # Imported here: Ctrl-C is answered during imports, too, and mistakes before those of torch, which take seconds.
    from allnc.trainer import launcher
    from allnc.trainer.planning import look_only, plan, print_config

    for action in ("--dry_run", "--print_config"):
        if action in words and "--report" in words:
            raise ValueError(f"--report would be ignored with {action}, which trains nothing; remove it")
    reports, words = "--report" in words, [word for word in words if word != "--report"]
    if "--print_config" in words:
        return print_config(words)
    if "--dry_run" in words:
        return look_only(words)
    try:
        config, folder, mode, index, recipe = plan(words)
    except ValueError as error:
        if launcher.rank() == 0:
            raise
        raise SaidElsewhereError("the first process has the same words, and answers") from error
    from rich.console import Console

    from allnc.trainer.folder import REPORT
    from allnc.trainer.loop import train

    train(config, folder, Console(), mode=mode, index=index, recipe=recipe)
    if reports and launcher.rank() == 0:
        from allnc.report.page import write_report

        page = folder / REPORT
        write_report([folder], page, labels=[folder.name], say=lambda line: print(line, flush=True))
        print(page)


if __name__ == "__main__":
    sys.exit(main())
