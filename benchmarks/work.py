"""How much work each algorithm does, by formula.

A multiply-add counts as two FLOPs. Only the terms that grow as N², NC or C² are counted, not the O(N D) around them.

Legend: N activations, D columns of the projection, C classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a step does: floating-point operations, exponentials, bytes of memory that it must move."""

    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.exps + other.exps, self.bytes + other.bytes)


@dataclass(frozen=True)
class Contrast:
    """An algorithm for HyCon, by its coefficients in the forward and in the backward.

    pairs: of N²D FLOPs. exps: of N² exponentials. mean_pairs, mean_exps: the same of NCD and NC, for the class means.
    """

    pairs: tuple[float, float]
    exps: tuple[float, float]
    mean_pairs: tuple[float, float]
    mean_exps: tuple[float, float]

    def work(self, n: int, c: int, d: int, *, backward: bool) -> Work:
        """Work of the forward, or of forward and backward together."""
        pairs, exps, mean_pairs, mean_exps = (
            sum(both) if backward else both[0] for both in (self.pairs, self.exps, self.mean_pairs, self.mean_exps)
        )
        return Work(flops=float(n) * d * (pairs * n + mean_pairs * c), exps=float(n) * (exps * n + mean_exps * c))


# Autograd of z @ z.T and logsumexp: one product forward, two backward; logsumexp's backward takes exp again.
AUTOGRAD = Contrast((2, 4), (1, 1), (2, 4), (1, 1))
# Ours with backend="eager": keeps no matrix for the backward, so forms S again.
DENSE = Contrast((2, 6), (1, 1), (2, 6), (1, 1))
# Ours in C++: every pair of rows once, forward and backward.
TRIANGLE = Contrast((1, 3), (0.5, 0.5), (2, 6), (1, 1))
# Ours in Triton, shifted: a triangle forward, a square backward; z against μ and μ against z are separate panels.
TRIANGLE_AND_SQUARE = Contrast((1, 4), (0.5, 1), (2, 8), (1, 2))
# inf-cl: a square forward, and S formed again for either gradient.
INF_CL = Contrast((2, 8), (1, 2), (0, 0), (0, 0))
# siglip-kernel: forms both gradients in its forward, whether or not they will be asked for.
SIGLIP = Contrast((6, 0), (1, 0), (0, 0), (0, 0))
# The least known: what a limit is computed from.
BEST = {"cpu": TRIANGLE, "cuda": Contrast((1, 4), (0.5, 1), (2, 6), (1, 1))}


def pair_work(c: int, f: int, *, backward: bool) -> Work:
    """P2P with C x C matrices and autograd: one product forward, two backward; exponentials in its softmax form.

    No less is known: the squared form's F x F matrices take more wherever it is used, at F >= C - 1.
    """
    exps = float(c) * c * (2 if backward else 1) if f < c - 1 else 0.0
    return Work(flops=(6.0 if backward else 2.0) * c * c * f, exps=exps)


def class_mean_work(n: int, c: int, f: int, itemsize: int, *, backward: bool) -> Work:
    """class_mean_ema reads features, labels and state, and writes value and state; its backward is a gather.

    `itemsize` is that of the features; the state is float32, labels are int64.
    """
    features, state, labels = float(n) * f * itemsize, 4.0 * c * f, 8.0 * n
    moved = features + labels + 3 * state
    return Work(flops=float(n) * f, bytes=moved + (features + labels + state if backward else 0.0))
