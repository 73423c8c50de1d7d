"""A training that dies at any moment resumes to what it would have become; the others' view is never mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import ROOT


@pytest.mark.slow
def test_every_seventh_moment(tmp_path: Path) -> None:
    """All of them take some minutes: `python -m tests.faults.kills DIR 1`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kills", str(tmp_path), "7"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tried = json.loads(done.stdout)
    assert tried["epochs"] == [0, 1, 2] and tried["last"] > 60
