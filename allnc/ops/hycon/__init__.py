"""HyCon, softmax form: `hycon`, its reference, and the parts it is made of (see hycon.py)."""

from allnc.ops.hycon.hycon import contrast, hycon, hycon_reference
from allnc.ops.hycon.options import Balance, Batch, Options, Reduction, check_hycon

__all__ = [
    "Balance",
    "Batch",
    "Options",
    "Reduction",
    "check_hycon",
    "contrast",
    "hycon",
    "hycon_reference",
]
