"""The compiled extension `allnc._C`, loaded when an op first asks for it.

Nothing here runs at `import allnc`: a missing, broken or outdated extension costs only the backends "cpp" and
"cuda", and `extension_error()` says why in words a message can carry.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# Equal to kInterface in csrc/module.cpp; both change when the schema of an op does, so that an extension
# built from older sources is refused with a clear message instead of failing inside an op.
INTERFACE = 4

# Registered by csrc/ under the namespace `allnc_C`.
OPS = (
    "class_mean_ema_forward",
    "class_mean_ema_backward",
    "hycon_lse_forward",
    "hycon_lse_backward",
    "hycon_loss_forward",
    "hycon_loss_backward",
    "centred_unit_forward",
    "centred_unit_backward",
    "p2p_blocks_forward",
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("allnc._C")
    except ModuleNotFoundError as error:
        if error.name != "allnc._C":
            return None, f"allnc._C was found but cannot be loaded ({error})"
        return None, "allnc._C is not built (the install found no C++17 compiler, or ALLNC_BUILD_EXT was 0)"
    except Exception as error:  # whatever a broken shared library raises, allnc must stay importable
        return None, f"allnc._C was found but cannot be loaded with torch {torch.__version__} ({error})"
    try:
        interface = module.build_info()["interface"]
    except (AttributeError, KeyError):
        return None, f"{module.__name__} carries no build information"
    if interface != INTERFACE:
        return None, f"allnc._C is out of date (interface {interface}, expected {INTERFACE})"
    missing = [name for name in OPS if not hasattr(torch.ops.allnc_C, name)]
    if missing:
        return None, f"allnc._C is incomplete (no {', '.join(missing)})"
    return module, None


def extension() -> ModuleType | None:
    """The loaded module `allnc._C`, or None where it cannot be used (see `extension_error`)."""
    return _load()[0]


def extension_error() -> str | None:
    """Why `extension()` is None; None when the extension is there."""
    return _load()[1]


def has_cpp() -> bool:
    """Whether the C++ kernels for CPU tensors can be used."""
    return extension() is not None


def has_cuda() -> bool:
    """Whether the extension holds CUDA kernels (a GPU is not asked for)."""
    module = extension()
    return module is not None and module.build_info()["cuda"] is not None


# torch.compile must take the answers as constants instead of tracing an import. This is what
# torch.compiler.assume_constant_result does; calling it here would import torch._dynamo, two seconds.
for _function in (extension_error, has_cpp, has_cuda):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
