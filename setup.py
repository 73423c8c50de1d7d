"""Builds the compiled extension `allnc._C`; metadata is in pyproject.toml.

Environment:
    ALLNC_BUILD_EXT: auto (default) builds what the machine has tools for: C++ and CUDA, C++ alone, or
        nothing; cpu and cuda build exactly that or fail; 0 builds nothing (Python and Triton still work).
    TORCH_CUDA_ARCH_LIST: GPU architectures to compile for, in torch's notation; by default 8.0, 9.0 and 10.0.
    CXX, CUDA_HOME, MAX_JOBS: as in torch.utils.cpp_extension.

The ops use torch's stable ABI and the CUDA runtime is linked statically, so the torch that pip installs into
its build environment and the torch the extension later runs with may differ.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from setuptools import setup

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parent
BUILD_INFO = ROOT / "build" / "generated" / "allnc_build_info.h"
MIN_TORCH = (2, 11)
CHOICES = ("auto", "cpu", "cuda", "0")

# Listed by hand: a search for packages does not find `allnc.kernels`, which lies at the top level.
PACKAGES = [
    "allnc",
    "allnc.config",
    "allnc.data",
    "allnc.data.own",
    "allnc.inference",
    "allnc.kernels",
    "allnc.kernels.hycon",
    "allnc.losses",
    "allnc.metrics",
    "allnc.metrics.plots",
    "allnc.models",
    "allnc.ops",
    "allnc.ops.hycon",
    "allnc.ops.p2p",
    "allnc.plot",
    "allnc.report",
    "allnc.sweep",
    "allnc.theory",
    "allnc.trainer",
]


class BuildError(RuntimeError):
    """What was asked for cannot be built; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the machine has to build with."""

    torch: str | None  # version of the torch that setup.py runs with
    torch_cuda: str | None  # CUDA version that torch was built with
    compiler_error: str | None  # why C++17 code cannot be compiled; None if it can
    nvcc: str | None  # version of nvcc


@dataclass(frozen=True)
class Plan:
    """What will be built, and the line that says so."""

    kind: Literal["none", "cpu", "cuda"]
    message: str


def decide(requested: str, tools: Tools) -> Plan:
    """Choose what to build from ALLNC_BUILD_EXT and the tools at hand; BuildError if it cannot be built.

    GPUs are not asked for: a build machine often has none, and a machine's GPU says nothing about the user's.
    """
    if requested not in CHOICES:
        raise BuildError(f"ALLNC_BUILD_EXT must be one of {', '.join(CHOICES)}; got {requested!r}")
    if requested == "0":
        return Plan("none", "ALLNC_BUILD_EXT=0: no extension is built; the Python and Triton backends work")

    def fall_back(kind: Literal["none", "cpu"], reason: str, remedy: str) -> Plan:
        if requested != "auto":
            raise BuildError(f"ALLNC_BUILD_EXT={requested} cannot be built: {reason}; {remedy}")
        built = {"none": "no extension (Python and Triton only)", "cpu": "building for CPU only"}[kind]
        return Plan(kind, f"{built}: {reason}; {remedy}")

    if tools.torch is None or _numbers(tools.torch) < MIN_TORCH:
        found = "no torch" if tools.torch is None else f"torch {tools.torch}"
        return fall_back("none", f"{found} to build with", "install torch >= 2.11 (pip does so by itself)")
    if tools.compiler_error is not None:
        return fall_back("none", tools.compiler_error, "install a C++17 compiler and Python's headers")
    if requested == "cpu":
        return Plan("cpu", "ALLNC_BUILD_EXT=cpu: building for CPU only")
    if tools.nvcc is None:
        return fall_back("cpu", "no nvcc", "for CUDA kernels, install the CUDA toolkit or set CUDA_HOME")
    if tools.torch_cuda is not None and _numbers(tools.torch_cuda)[0] != _numbers(tools.nvcc)[0]:
        reason = f"nvcc is {tools.nvcc} but torch {tools.torch} is built for CUDA {tools.torch_cuda}"
        return fall_back("cpu", reason, "set CUDA_HOME to a toolkit of torch's major version")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_arch_list(tools.nvcc)
    return Plan("cuda", f"building for CPU and CUDA (nvcc {tools.nvcc}, architectures {archs})")


def default_arch_list(nvcc: str) -> str:
    """Ampere, Hopper and, where nvcc knows it, Blackwell; PTX of the last for what comes after."""
    return "8.0;9.0;10.0+PTX" if _numbers(nvcc) >= (12, 8) else "8.0;9.0+PTX"


def _numbers(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def probe_compiler(compiler: str) -> str | None:
    """Why `compiler` cannot compile a C++17 Python extension; None if it can."""
    include = sysconfig.get_paths()["include"]
    source = "#include <optional>\n#include <Python.h>\nstd::optional<int> f() { return 1; }\n"
    command = [*shlex.split(compiler), "-std=c++17", "-fsyntax-only", f"-I{include}", "-x", "c++", "-"]
    try:
        result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    except OSError:
        return f"no C++ compiler ({compiler!r} cannot be run)"
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    return f"{compiler!r} cannot compile a Python extension ({errors[0] if errors else 'unknown error'})"


def probe_tools() -> Tools:
    """Look for torch, a compiler and nvcc."""
    try:
        import torch
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError:
        return Tools(torch=None, torch_cuda=None, compiler_error=None, nvcc=None)
    nvcc = nvcc_path()
    release = None
    if nvcc is not None:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        match = re.search(r"release (\d+\.\d+)", said)
        release = match.group(1) if match else None
    return Tools(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        compiler_error=probe_compiler(get_cxx_compiler()),
        nvcc=release,
    )


def nvcc_path() -> Path | None:
    """The nvcc that torch's build would call."""
    from torch.utils.cpp_extension import CUDA_HOME

    path = None if CUDA_HOME is None else Path(CUDA_HOME) / "bin" / "nvcc"
    return path if path is not None and path.exists() else None


def cuda_library_dirs() -> list[str]:
    """Where the CUDA runtime lies, as nvcc itself says (it may be a wrapper, or come from conda or pip)."""
    command = [str(nvcc_path()), "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    line = next((line for line in said.splitlines() if "LIBRARIES=" in line), "")
    return [part[2:] for part in shlex.split(line.split("LIBRARIES=")[-1]) if part.startswith("-L")]


def compile_flags() -> list[str]:
    """Flags for C++; the kernels choose their vector instructions at run time (csrc/cpu/multiversion.h)."""
    major, minor = MIN_TORCH
    flags = [
        "-std=c++17",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        *("-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"),
        # Floating-point exceptions and errno are not looked at; without these flags selects and libm calls
        # in a loop are not vectorised. They change no result.
        *("-fno-math-errno", "-fno-trapping-math"),
    ]
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    return flags


def make_extension(kind: Literal["cpu", "cuda"]) -> Extension:
    """The extension with all sources of csrc/ that belong to `kind`."""
    from setuptools import Extension
    from torch.utils import cpp_extension

    csrc = ROOT / "csrc"
    sources = [*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")]
    cxx = compile_flags()
    nvcc = ["-O3", *cxx[:2]]
    library_dirs = cpp_extension.library_paths()
    # libtorch has nothing that is referred to directly, but brings libtorch_cuda where there is one: keep it.
    link_args = ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
    link_args += ["-ltorch", "-ltorch_cpu"]
    if kind == "cuda":
        sources += csrc.glob("cuda/*.cu")
        cxx.append("-DALLNC_WITH_CUDA")
        library_dirs += cuda_library_dirs()
        link_args += ["-lcudart_static", "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,libcudart_static.a"]
    return Extension(
        "allnc._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in sources),
        depends=sorted(str(path.relative_to(ROOT)) for path in (*csrc.rglob("*.h"), BUILD_INFO)),
        include_dirs=[str(csrc), str(BUILD_INFO.parent), _pybind11_include(), *cpp_extension.include_paths()],
        library_dirs=library_dirs,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},  # type: ignore[arg-type]  # torch takes a dict
        extra_link_args=link_args,
        language="c++",
    )


def _pybind11_include() -> str:
    import pybind11

    return pybind11.get_include()


def write_build_info(plan: Plan, tools: Tools) -> None:
    """Write the header from which the extension tells how it was built, if it changes."""
    from torch.utils.cpp_extension import get_cxx_compiler

    version = subprocess.run(
        [*shlex.split(get_cxx_compiler()), "--version"], capture_output=True, text=True, check=False
    )
    values = {
        "TORCH": tools.torch,
        "TORCH_TARGET": ".".join(map(str, MIN_TORCH)),
        "COMPILER": (version.stdout.splitlines() or ["unknown"])[0],
        "FLAGS": " ".join(compile_flags()),
    }
    if plan.kind == "cuda":
        values |= {"CUDA": tools.nvcc, "CUDA_ARCH_LIST": os.environ["TORCH_CUDA_ARCH_LIST"]}
    lines = [f'#define ALLNC_BUILD_{key} "{value}"' for key, value in values.items()]
    text = "\n".join(["// Written by setup.py.", "#pragma once", *lines, ""])
    BUILD_INFO.parent.mkdir(parents=True, exist_ok=True)
    if not BUILD_INFO.exists() or BUILD_INFO.read_text() != text:
        BUILD_INFO.write_text(text)


def extension_arguments() -> dict[str, object]:
    """The arguments of setup() that build the extension; empty where none is to be built."""
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return {}  # metadata alone: importing torch would cost seconds and its decision would not be used
    requested = os.environ.get("ALLNC_BUILD_EXT", "auto")
    looks = requested in ("auto", "cpu", "cuda")
    tools = probe_tools() if looks else Tools(torch=None, torch_cuda=None, compiler_error=None, nvcc=None)
    plan = decide(requested, tools)
    print(f"allnc: {plan.message}", file=sys.stderr)
    if plan.kind == "none":
        return {}
    from torch.utils.cpp_extension import BuildExtension

    if plan.kind == "cuda" and tools.nvcc is not None and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_arch_list(tools.nvcc)
    write_build_info(plan, tools)
    return {"ext_modules": [make_extension(plan.kind)], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    try:
        arguments = extension_arguments()
    except BuildError as error:
        sys.exit(f"allnc: {error}")
    setup(
        packages=PACKAGES,
        package_dir={"allnc.kernels": "kernels"},
        **arguments,  # type: ignore[arg-type]
    )
