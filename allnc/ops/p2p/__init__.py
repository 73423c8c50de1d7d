"""P2P: the op (p2p.py), its forms (forms.py) and the rows it compares (centred_unit.py)."""

from allnc.ops.p2p.centred_unit import centred_unit, centred_units
from allnc.ops.p2p.forms import Blocks, Target, kernel_target, pair_form
from allnc.ops.p2p.p2p import check_p2p, p2p, p2p_blocks, p2p_reference, p2p_values

__all__ = [
    "Blocks",
    "Target",
    "centred_unit",
    "centred_units",
    "check_p2p",
    "kernel_target",
    "p2p",
    "p2p_blocks",
    "p2p_reference",
    "p2p_values",
    "pair_form",
]
