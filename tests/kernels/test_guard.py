"""The kernels are one package, allnc.kernels, and cost nothing until an op asks for them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_second_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"the package allnc\.kernels; got an import as 'kernels'"):
        importlib.import_module("kernels")
    assert "kernels" not in sys.modules


def test_importing_allnc_does_not_import_triton_or_the_kernels() -> None:
    code = "import sys, allnc; print(sorted({'triton', 'allnc.kernels'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
