"""allnc: All-around Neural Collapse for long-tailed image classification.

`import allnc` is instant: torch is imported when a name below is first asked for; Triton, CUDA and the compiled
extension when an op first needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from allnc._version import __version__

if TYPE_CHECKING:
    from allnc import losses, metrics
    from allnc.inference.predictor import load
    from allnc.ops import AllAroundLosses, all_around, class_mean_ema, hycon, hycon_cosine, p2p

__all__ = [
    "AllAroundLosses",
    "__version__",
    "all_around",
    "class_mean_ema",
    "hycon",
    "hycon_cosine",
    "load",
    "losses",
    "metrics",
    "p2p",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("losses", "metrics"):
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{'inference.predictor' if name == 'load' else 'ops'}"), name)
    globals()[name] = value  # later accesses are those of a plain attribute
    return value


def __dir__() -> list[str]:
    return __all__
