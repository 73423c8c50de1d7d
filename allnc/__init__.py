"""allnc: All-around Neural Collapse for long-tailed image classification.

`import allnc` needs only torch; Triton, CUDA and the compiled extension are loaded when an op first asks for them.
"""

from allnc import losses, metrics
from allnc._version import __version__
from allnc.ops import AllAroundLosses, all_around, class_mean_ema, hycon, hycon_cosine, p2p

__all__ = [
    "AllAroundLosses",
    "__version__",
    "all_around",
    "class_mean_ema",
    "hycon",
    "hycon_cosine",
    "losses",
    "metrics",
    "p2p",
]
