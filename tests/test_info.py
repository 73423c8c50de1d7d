"""`python -m allnc.info` tells the truth about this machine."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from allnc import _extension, info
from allnc._version import __version__

ROOT = Path(__file__).parent.parent


def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "allnc.info")  # as in a fresh `python -m`
    monkeypatch.setattr(sys, "argv", ["allnc.info"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("allnc.info", run_name="__main__")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for expected in (__version__, torch.__version__, "allnc._C", *info.BACKENDS):
        assert expected in said, expected
    if not torch.cuda.is_available():
        assert "none that torch can use" in said


def test_says_why_the_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_load", lambda: (None, "the reason"))
    lines = dict(info.extension_lines())
    assert "the reason" in lines["allnc._C"] and "pip install" in lines["allnc._C"]
    assert "the reason" in (info.missing_reason("class_mean_ema", "cpp") or "")


def test_a_backend_that_runs_has_no_missing_reason() -> None:
    if _extension.has_cpp():
        assert info.missing_reason("class_mean_ema", "cpp") is None
    if not torch.cuda.is_available():
        assert "cuda" in (info.missing_reason("class_mean_ema", "cuda") or "").lower()


def test_backends_are_those_of_the_ops() -> None:
    """The table repeats what each op hands to resolve_backend."""
    pattern = re.compile(r'resolve_backend\(\s*backend,\s*op="(\w+)".*?supported=(\([^)]*\))', re.DOTALL)
    found: dict[str, tuple[str, ...]] = {}
    for path in (ROOT / "allnc" / "ops").rglob("*.py"):
        for op, supported in pattern.findall(path.read_text()):
            found[op] = tuple(re.findall(r'"(\w+)"', supported))
    assert found == info.BACKENDS


def test_newer_source(tmp_path: Path) -> None:
    built = tmp_path / "_C.so"
    built.touch()
    assert not info.newer_source(str(built))
    os.utime(built, (0, 0))
    assert info.newer_source(str(built))
    assert not info.newer_source(None)
