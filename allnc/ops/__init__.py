"""The ops: each file holds one op from its formula to its public function."""

from allnc.ops.all_around import AllAroundLosses, all_around
from allnc.ops.class_mean import class_mean_ema
from allnc.ops.hycon import hycon
from allnc.ops.hycon_cosine import hycon_cosine
from allnc.ops.p2p import p2p

__all__ = ["AllAroundLosses", "all_around", "class_mean_ema", "hycon", "hycon_cosine", "p2p"]
