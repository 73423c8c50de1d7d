"""Reading without the rights of root, whom nothing is forbidden."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights for one read")


@contextlib.contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Be nobody, who may still enter a temporary folder of the tests."""
    for path in (folder, *folder.parents):
        if path == folder or path.name.startswith(("pytest", "popen")):
            path.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
