"""Store features of every image: `python -m allnc.features --config RECIPE --model.name timm:NAME --out DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from allnc._command import answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return answer("allnc.features", lambda: _extract(words))


def _extract(words: list[str]) -> None:
    # Imported here: mistakes are answered before the imports of torch, which take seconds.
    from allnc.trainer.extract_command import plan

    planned = plan(words)
    from rich.console import Console

    from allnc.trainer.extract import extract

    extract(planned, Console())


if __name__ == "__main__":
    sys.exit(main())
