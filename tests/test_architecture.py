"""The doors between the rooms: imports go one way, and `import allnc` needs nothing but torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Room -> the rooms it may import (besides itself). A file directly in allnc/ is a room of its own.
DOORS: dict[str, set[str]] = {
    "_version": set(),
    "_extension": set(),
    "_checks": set(),
    "_command": set(),
    "_sealed": set(),
    "config": {"_checks"},
    "kernels": set(),
    "ops": {"_checks", "_extension", "kernels"},
    "losses": {"_checks", "ops", "config"},
    "metrics": {"ops"},
    "theory": {"_checks", "_command", "ops", "losses", "metrics", "sweep"},
    "data": {"_sealed", "config"},
    "models": {"config"},
    "trainer": {"_command", "_sealed", "ops", "losses", "metrics", "data", "models", "config", "_version"},
    "info": {"ops", "_command", "_extension", "_version"},
    "__main__": {"_command", "_version"},
    "train": {"trainer", "_command", "report"},
    "sweep": {"trainer", "metrics", "_command", "config"},
    "report": {"plot", "trainer", "metrics", "data", "_command", "_version", "config"},
    "plot": {"trainer", "metrics", "data", "_command", "config"},
    "inference": {"trainer", "losses", "metrics", "data", "models", "config", "_version"},
    "predict": {"inference", "_command"},
    "export": {"inference", "_command"},
    "evaluate": {"inference", "trainer", "data", "_command"},
    "features": {"trainer", "_command"},
    "__init__": {"ops", "losses", "metrics", "inference", "_version"},
}


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "allnc").rglob("*.py")):
        yield path.relative_to(ROOT / "allnc").parts[0].removesuffix(".py"), path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way() -> None:
    wrong = []
    for room, path in sources():
        assert room in DOORS, f"{path.relative_to(ROOT)} is in no room of DOORS"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] in ("tests", "benchmarks", "kernels"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            other = parts[1] if parts[0] == "allnc" and len(parts) > 1 else room
            if other in DOORS and other != room and other not in DOORS[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_config_and_checks_import_the_standard_library_only() -> None:
    files = [*(ROOT / "allnc" / "config").glob("*.py"), ROOT / "allnc" / "_checks.py"]
    names = {name for path in files for name in imports(path)}
    roots = {name.split(".")[0] for name in names if not name.startswith(("allnc._checks", "allnc.config"))}
    assert roots <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("missing", ["triton", "allnc._C", "matplotlib", "timm", "sklearn", "torchvision"])
def test_import_needs_only_torch(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import allnc; allnc.hycon; allnc.losses.AllNC"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_import_loads_no_heavy_library() -> None:
    heavy = ("triton", "matplotlib", "timm", "sklearn")
    program = f"import sys, allnc; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
