"""Exit with an error if a wheel of allnc misses a module, a recipe or py.typed."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def wanted() -> set[str]:
    """Paths inside a complete wheel; `kernels` lies at the top level of the tree and in `allnc` once installed."""
    paths = {path.relative_to(ROOT) for folder in ("allnc", "kernels") for path in (ROOT / folder).rglob("*")}
    kept = {path.as_posix() for path in paths if path.suffix in (".py", ".yaml") or path.name == "py.typed"}
    return {path if path.startswith("allnc/") else f"allnc/{path}" for path in kept}


if __name__ == "__main__":
    missing = sorted(wanted() - set(zipfile.ZipFile(sys.argv[1]).namelist()))
    sys.exit(f"missing from the wheel: {', '.join(missing)}" if missing else 0)
