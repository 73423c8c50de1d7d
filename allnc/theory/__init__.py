"""The theory of neural collapse, computed: unconstrained features, their minimisers, saddles, and class imbalance."""

from allnc.theory.model import Problem
from allnc.theory.solve import certificate, geometry, minimise

__all__ = ["Problem", "certificate", "geometry", "minimise"]
