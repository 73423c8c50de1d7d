"""P2P: `p2p`, its reference, and the parts it is made of (see p2p.py)."""

from allnc.ops.p2p.centred_unit import centred_unit, centred_units
from allnc.ops.p2p.p2p import Blocks, Target, kernel_target, p2p, p2p_blocks, p2p_reference, pair_form

__all__ = [
    "Blocks",
    "Target",
    "centred_unit",
    "centred_units",
    "kernel_target",
    "p2p",
    "p2p_blocks",
    "p2p_reference",
    "pair_form",
]
