"""Exit with 0 if the running environment has the torch and Triton that a constraints file asks for, else with 1."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement


def constraints(path: Path) -> dict[str, Requirement]:
    """The requirements of a constraints file by name."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, lines))}


if __name__ == "__main__":
    wanted = constraints(Path(sys.argv[1]))
    met = all(wanted[name].specifier.contains(version(name)) for name in ("torch", "triton"))
    sys.exit(0 if met else 1)
