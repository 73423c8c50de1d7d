"""`python -m allnc.info`: versions, what is built, which backend can run for which op, and why one cannot."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allnc._command import Parser, answer
from allnc._version import __version__

if TYPE_CHECKING:
    from rich.table import Table

# What each op has besides "eager".
BACKENDS: dict[str, tuple[str, ...]] = {
    "hycon": ("cpp", "triton"),
    "all_around": ("cpp", "triton"),
    "class_mean_ema": ("cpp", "cuda"),
    "p2p": ("cpp", "triton"),
}


# The device each backend runs on; "eager" runs on both.
DEVICES = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}


def missing_reason(op: str, backend: str) -> str | None:
    """Why a backend of an op cannot run here on its device in float32; None if it can.

    Asks the function the ops themselves ask, so that the answer is what a user would meet.
    """
    import torch

    from allnc.ops._common import resolve_backend

    device = torch.device(DEVICES[backend])
    try:
        resolve_backend(backend, op=op, device=device, dtype=torch.float32, supported=BACKENDS[op])  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        return str(error)
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"backend {backend!r} needs a CUDA device; there is none that torch can use"
    return None


def extension_lines() -> Iterator[tuple[str, str]]:
    """What the compiled extension is, or why there is none."""
    from allnc import _extension

    module = _extension.extension()
    if module is None:
        yield "allnc._C", f"{_extension.extension_error()}. Build it with `pip install -v -e .`"
        yield "C++ compiler", shutil.which("c++") or "none on PATH (c++)"
    else:
        info = module.build_info()
        yield "allnc._C", str(module.__file__)
        yield "built with", f"torch {info['torch']} (stable ABI of {info['torch_target']})"
        yield "compiler", info["compiler"]
        yield "flags", info["flags"]
        if info["cuda"] is None:
            yield "CUDA kernels", "not built: nvcc was not found, or ALLNC_BUILD_EXT=cpu; see README"
        else:
            yield "CUDA kernels", f"CUDA {info['cuda']}, architectures {info['cuda_arch_list']}"
        if newer_source(module.__file__):
            yield "note", "csrc/ has changed since the extension was built; rebuild with `pip install -e .`"
    yield "nvcc", shutil.which("nvcc") or "none on PATH"


def newer_source(built: str | None) -> bool:
    """Whether, in a source tree, a file of csrc/ is newer than the built extension."""
    csrc = Path(__file__).parent.parent / "csrc"
    if built is None or not csrc.is_dir():
        return False
    sources = (path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    return max((path.stat().st_mtime for path in sources), default=0.0) > Path(built).stat().st_mtime


def version_lines() -> Iterator[tuple[str, str]]:
    """Versions of allnc, Python, torch, Triton and CUDA, and the devices."""
    import torch

    from allnc.ops._common import has_triton, triton_interprets

    yield "allnc", f"{__version__} ({Path(__file__).parent})"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    installed = has_triton()
    triton = importlib.metadata.version("triton") if installed else "not installed; pip install triton (Linux)"
    yield "Triton", triton + (" (interpreted: TRITON_INTERPRET=1)" if triton_interprets() else "")
    yield "CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def backend_table() -> tuple[Table, list[str]]:
    """Ops by backend, what "auto" chooses, and one line for each reason why a backend cannot run."""
    import torch
    from rich.table import Table

    from allnc.ops._common import resolve_backend

    table = Table(title="Backends (float32)", title_justify="left")
    for heading in ("op", "eager", *DEVICES, "auto on CPU", "on GPU"):
        table.add_column(heading, no_wrap=True)
    reasons: dict[str, None] = {}  # in order, each once
    for op, supported in BACKENDS.items():
        cells = []
        for backend in DEVICES:
            reason = missing_reason(op, backend) if backend in supported else None
            cells.append("-" if backend not in supported else "no" if reason else "[green]yes[/]")
            if reason:
                reasons[reason.removeprefix(f"{op}: ")] = None
        for device in ("cpu", "cuda"):
            usable = device == "cpu" or torch.cuda.is_available()
            cells.append(
                resolve_backend("auto", op=op, device=torch.device(device), dtype=torch.float32, supported=supported)
                if usable
                else "-"
            )
        table.add_row(op, "[green]yes[/]", *cells)
    return table, list(reasons)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return 0, or 2 for a mistake of the user."""
    Parser("allnc.info", __doc__).parse_args(arguments)
    return answer("allnc.info", _report)


def _report() -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for title, lines in (("Versions", version_lines()), ("Extension", extension_lines())):
        grid = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in lines:
            grid.add_row(name, escape(value))
        console.print(grid, "")
    table, reasons = backend_table()
    console.print(table)
    for reason in reasons:
        console.print(f"no: {reason}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
