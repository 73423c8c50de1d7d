"""What setup.py decides to build, what the built extension tells, and allnc without it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from allnc import _extension

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")


def load_setup() -> ModuleType:
    """setup.py as a module: it builds only when it is run."""
    spec = importlib.util.spec_from_file_location("allnc_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_setup()
TOOLS = build.Tools(torch="2.12.1+cu132", torch_cuda="13.2", compiler_error=None, nvcc="13.0")


def tools(**changes: str | None):
    return dataclasses.replace(TOOLS, **changes)


@pytest.mark.parametrize(
    ("requested", "changes", "kind", "message"),
    [
        ("auto", {}, "cuda", "building for CPU and CUDA (nvcc 13.0, architectures 8.0;9.0;10.0+PTX)"),
        ("cuda", {}, "cuda", "building for CPU and CUDA"),
        ("cpu", {}, "cpu", "building for CPU only"),
        ("0", {}, "none", "no extension is built"),
        ("auto", {"nvcc": None}, "cpu", "building for CPU only: no nvcc"),
        ("cpu", {"nvcc": None}, "cpu", "building for CPU only"),
        ("auto", {"torch_cuda": "12.8"}, "cpu", "nvcc is 13.0 but torch 2.12.1+cu132 is built for CUDA 12.8"),
        ("auto", {"torch_cuda": None}, "cuda", "building for CPU and CUDA"),
        ("auto", {"compiler_error": "no C++ compiler ('c++' cannot be run)"}, "none", "no C++ compiler"),
        ("auto", {"torch": None}, "none", "no torch to build with"),
        ("auto", {"torch": "2.9.1"}, "none", "torch 2.9.1 to build with"),
        ("0", {"torch": None, "nvcc": None}, "none", "no extension is built"),
    ],
)
def test_decision(
    requested: str, changes: dict[str, str | None], kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    plan = build.decide(requested, tools(**changes))
    assert plan.kind == kind
    assert message in plan.message and "\n" not in plan.message


@pytest.mark.parametrize(
    ("requested", "changes", "message"),
    [
        ("yes", {}, "ALLNC_BUILD_EXT must be one of auto, cpu, cuda, 0; got 'yes'"),
        ("", {}, "got ''"),
        ("cuda", {"nvcc": None}, "ALLNC_BUILD_EXT=cuda cannot be built: no nvcc"),
        ("cuda", {"torch_cuda": "12.8"}, "is built for CUDA 12.8"),
        ("cpu", {"compiler_error": "no C++ compiler"}, "ALLNC_BUILD_EXT=cpu cannot be built: no C++"),
        ("cuda", {"compiler_error": "no C++ compiler"}, "no C++ compiler"),
        ("cpu", {"torch": "2.10.0"}, "torch 2.10.0"),
    ],
)
def test_what_cannot_be_built_is_an_error(requested: str, changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(build.BuildError, match=re.escape(message)):
        build.decide(requested, tools(**changes))


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.default_arch_list("12.8") == "8.0;9.0;10.0+PTX"
    assert build.default_arch_list("12.6") == "8.0;9.0+PTX", "nvcc 12.6 does not know Blackwell"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    assert "architectures 8.9)" in build.decide("cuda", TOOLS).message


def test_compiler_probe(tmp_path: Path) -> None:
    assert "no C++ compiler" in build.probe_compiler(str(tmp_path / "c++"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "Python.h: No such file" in build.probe_compiler(str(broken))


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_setup_refuses_an_unknown_value_in_one_line() -> None:
    result = run_setup("--version", ALLNC_BUILD_EXT="gpu")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("allnc:")]
    assert lines == ["allnc: ALLNC_BUILD_EXT must be one of auto, cpu, cuda, 0; got 'gpu'"]


def test_metadata_alone_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLNC_BUILD_EXT", "not looked at")
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    assert build.extension_arguments() == {}


def test_packages_are_complete() -> None:
    inits = {path.relative_to(ROOT) for path in (ROOT / "allnc").glob("**/__init__.py")}
    inits |= {Path("allnc", path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("**/__init__.py")}
    found = {".".join(path.parts[:-1]) for path in inits}
    assert set(build.PACKAGES) == found


@needs_extension
def test_build_info() -> None:
    module = _extension.extension()
    assert module is not None and _extension.extension_error() is None
    info = module.build_info()
    assert info["interface"] == _extension.INTERFACE
    assert "-std=c++17" in info["flags"] and "march" not in info["flags"]
    assert (info["cuda"] is None) == (info["cuda_arch_list"] is None)
    assert _extension.has_cuda() == (info["cuda"] is not None)
    if _extension.has_cuda():
        assert info["torch_has_cuda"] == (torch.version.cuda is not None)


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_only_the_stable_abi_is_used() -> None:
    """No C++ symbol of torch is needed, so that the extension loads in other versions of torch."""
    module = _extension.extension()
    assert module is not None and module.__file__ is not None
    listing = subprocess.run(["nm", "-D", "--undefined-only", module.__file__], capture_output=True, text=True)
    symbols = [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]
    assert "torch_library_impl" in symbols, "the list is read rightly"
    of_torch = [s for s in symbols if s.startswith("_Z") and re.search(r"(3c10|2at|5torch)\d", s)]
    assert not of_torch


@needs_extension
def test_ops_are_registered_for_the_right_devices() -> None:
    for op in _extension.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"allnc_C::{op}", "CPU"), op
    for op in ("class_mean_ema_forward", "class_mean_ema_backward"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"allnc_C::{op}", "CUDA")
        assert has == _extension.has_cuda(), op


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_without_the_extension() -> None:
    """allnc imports and runs; an explicit request for the backend says what is missing and what to do."""
    code = """
import sys
sys.modules["allnc._C"] = None
import torch, allnc
state = torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool)
call = lambda **kw: allnc.class_mean_ema(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), *state, **kw)
assert call().tolist() == [[1.0] * 3] * 2
try:
    call(backend="cpp")
except RuntimeError as error:
    print(error)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "backend 'cpp' is not available: allnc._C is not built" in result.stdout
    assert "pip install -e ." in result.stdout


def load_again() -> tuple[ModuleType | None, str | None]:
    return _extension._load.__wrapped__()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("undefined symbol: aoti_torch_x"), "found but cannot be loaded.*undefined symbol"),
        (ModuleNotFoundError("no numpy", name="numpy"), "found but cannot be loaded.*no numpy"),
        (RuntimeError("registered twice"), "found but cannot be loaded.*registered twice"),
        (ModuleNotFoundError("no _C", name="allnc._C"), "is not built"),
    ],
)
def test_extension_that_does_not_load(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    module, reason = load_again()
    assert module is None and re.search(message, reason or "")


def test_stale_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = ModuleType("allnc._C")
    monkeypatch.setitem(sys.modules, "allnc._C", stale)
    assert load_again() == (None, "allnc._C carries no build information")
    stale.build_info = lambda: {"interface": 0}  # type: ignore[attr-defined]
    assert "out of date (interface 0, expected" in (load_again()[1] or "")
    stale.build_info = lambda: {"interface": _extension.INTERFACE}  # type: ignore[attr-defined]
    monkeypatch.setattr(_extension, "OPS", (*_extension.OPS, "op_of_tomorrow"))
    assert "op_of_tomorrow" in (load_again()[1] or "")


def test_kernels_at_the_top_level_is_not_importable() -> None:
    result = run_python("import kernels")
    assert result.returncode != 0 and "allnc.kernels" in result.stderr
