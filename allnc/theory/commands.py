"""What `python -m allnc.theory` computes and prints."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import get_args

import numpy as np
from rich.console import Console

from allnc._checks import check_integer
from allnc.theory.closed_form import collapse_threshold, focal_convex_from, focal_window
from allnc.theory.imbalance import (
    at_threshold,
    best_simplex,
    groups_of,
    phase_diagram,
    regularised,
    seli_limit,
    with_root,
)
from allnc.theory.landscape import focal_bistability, landscape_problems, survey
from allnc.theory.model import P2PTarget, Problem
from allnc.theory.report import make_folder, number, print_table, small, write_results

_GAMMA = 3.0  # of the focal loss, as in the source
_MOST_VARIABLES = 5000  # of a Hessian as a matrix: 200 MB in float64, and a minute for its eigenvalues
_SCALE = 5.0  # of the normalised classifier: with 16, four classes have no loss left that float64 could follow


def run_landscape(options: argparse.Namespace) -> None:
    """Minimisers, saddles and Hessians of every loss, and the focal loss's second minimum."""
    check_integer("--classes", options.classes, minimum=2)
    check_integer("--samples", options.samples, minimum=2)  # SupCon needs a positive
    check_integer("--dim", options.dim, minimum=options.classes - 1)
    check_integer("--starts", options.starts, minimum=1)
    variables = options.classes * ((1 + options.samples) * options.dim + 1)
    if variables > _MOST_VARIABLES or options.focal_classes > 100:
        raise ValueError(
            f"--classes x ((1 + --samples) x --dim + 1) must be at most {_MOST_VARIABLES}, because the Hessian is a "
            f"matrix, and --focal_classes at most 100; got {variables} and {options.focal_classes}"
        )
    make_folder(options.out)
    console = Console(width=190)
    window = focal_window(options.focal_classes, _GAMMA)
    if window is None:
        needed = int(1 / focal_convex_from(_GAMMA)) + 1
        raise ValueError(f"--focal_classes must be >= {needed} for a window to exist; got {options.focal_classes}")
    problems = landscape_problems(options.classes, options.samples, options.dim)
    console.print(
        f"K = {options.classes} classes of n = {options.samples}, d = {options.dim}; λ_W = {problems[0].lambda_w:g}, "
        f"λ_H = {problems[0].lambda_h:g}, sqrt(λ_W λ_H) = {problems[0].root_of_penalties:.4g}"
    )
    surveys = [survey(problem, starts=options.starts, seed=options.seed) for problem in problems]
    minima, points = [m for m, _ in surveys], [p for _, found in surveys for p in found]
    print_table(
        console,
        "Global minimum from random starts: differences to the closed form",
        [
            ("loss", lambda r: r.loss),
            ("starts there", lambda r: f"{r.reached}/{r.starts}"),
            ("value", lambda r: small(r.value_error)),
            ("‖w‖", lambda r: small(r.weight_norm_error)),
            ("‖h‖", lambda r: small(r.feature_norm_error)),
            ("cosines", lambda r: small(r.cosine_error)),
            ("1 - cos(w, h)", lambda r: small(None if r.duality is None else 1 - r.duality)),
            ("spread in class", lambda r: small(r.spread)),
        ],
        minima,
    )
    print_table(
        console,
        "Critical points: smallest eigenvalue of the Hessian, predicted and found",
        [
            ("loss", lambda r: r.loss),
            ("point", lambda r: r.kind),
            ("value", lambda r: number(r.value, 6)),
            ("gradient", lambda r: small(r.gradient_norm)),
            ("λ_min predicted", lambda r: number(r.curvature_predicted, 9)),
            ("found", lambda r: number(0.0 if abs(r.curvature) < 1e-10 else r.curvature, 9)),
            ("zeros pred.", lambda r: "-" if r.zeros_predicted is None else str(r.zeros_predicted)),
            ("found", lambda r: str(r.zeros)),
            ("‖∂L/∂Z‖/√(λλ)", lambda r: number(r.certificate, 6)),
            ("descent to min +", lambda r: small(r.below)),
        ],
        points,
    )
    low, high = window
    middle = (low + high) / 2
    width = high - low
    kc = [low - width / 2, low + width / 10, middle, high - width / 10, high + width / 2]
    focal = focal_bistability(options.focal_classes, _GAMMA, kc, seed=options.seed)
    console.print(
        f"Focal loss, γ = {_GAMMA:g}: convex in the logits where p >= p* = {focal_convex_from(_GAMMA):.6f}. At "
        f"K = {options.focal_classes} both origin and simplex are minima for K c in ({low:.6f}, {high:.6f})."
    )
    print_table(
        console,
        "Where starts end: 3 near the origin, 3 near the simplex, 3 farther from it",
        [
            ("K c", lambda r: number(r.kc, 5)),
            ("classes with p >= p*, by start", lambda r: " ".join(map(str, r.separated))),
            ("p at simplex: predicted", lambda r: number(r.probability_predicted, 6)),
            ("found", lambda r: number(r.probability, 6)),
            ("value - origin's", lambda r: number(r.value_difference, 6)),
            ("λ_min: origin", lambda r: small(r.origin_curvature)),
            ("simplex", lambda r: small(r.simplex_curvature)),
            ("partial", lambda r: small(r.partial_curvature)),
            ("barrier", lambda r: small(r.barrier_curvature)),
        ],
        focal,
    )
    if options.out is not None:
        write_results(options.out, {"minima": minima, "critical_points": points, "focal_window": focal})
        from allnc.theory.plot import plot_landscape

        plot_landscape(points, focal, options.focal_classes, _GAMMA, options.out / "landscape.png")


def run_minority(options: argparse.Namespace) -> None:
    """Thresholds, the limit of no penalty, groups of classes, P2P, and the phase diagram."""
    check_integer("--cells", options.cells, minimum=2)
    check_integer("--starts", options.starts, minimum=1)
    counts = tuple(options.counts)
    for count in counts:
        check_integer("--counts", count, minimum=1)
    if not 3 <= len(counts) <= 30 or counts.count(min(counts)) < 2:
        raise ValueError(
            f"--counts must be of 3 to 30 classes, two of them the smallest, which may then merge; got {counts}"
        )
    make_folder(options.out)
    console = Console(width=190)
    K = len(counts)
    base = Problem(loss="ce", counts=counts, dim=K, rows="classes", lambda_w=0.02, lambda_h=0.005)
    relu = replace(base, relu=True, lambda_b=None)
    losses = [base, replace(base, loss="logit_adjusted"), replace(base, loss="ls"), replace(base, loss="mse"), relu]
    thresholds = [step for p in losses for step in at_threshold(p, (0.99, 1.01), seed=options.seed)]
    names = ["ce", "logit_adjusted", "ls", "mse", "ce, h >= 0"]
    print_table(
        console,
        f"Minority classes of {counts}, at 0.99 and 1.01 of the predicted threshold",
        [
            ("loss", lambda r: names[thresholds.index(r) // 2]),
            ("factor", lambda r: number(r.factor, 2)),
            ("√(λ_W λ_H)", lambda r: number(r.root, 6)),
            ("1 - cos of two w", lambda r: small(r.separation)),
            ("‖h‖ of the smallest", lambda r: small(r.feature_norm)),
            ("‖∂L/∂Z‖/√(λλ)", lambda r: number(r.certificate, 9)),
        ],
        thresholds,
    )
    limit = seli_limit(counts, [10.0**-k for k in range(2, 8)], seed=options.seed)
    print_table(
        console,
        "As the penalties vanish: distance to SELI",
        [
            ("√(λ_W λ_H)", lambda r: small(r.root)),
            ("Gram matrix of W", lambda r: number(r.weights)),
            ("of class means", lambda r: number(r.means)),
            ("dZ / d log(1/λ)", lambda r: number(r.growth)),
        ],
        limit,
    )
    many = Problem(loss="ce", counts=(100, 100, 20, 20, 4, 4), dim=6, rows="classes", lambda_b=None)
    threshold = (collapse_threshold(many, 20) * collapse_threshold(many, 4)) ** 0.5
    groups, proof = groups_of(with_root(many, threshold), seed=options.seed)
    print_table(
        console,
        f"Groups of classes at √(λ_W λ_H) = {threshold:.4f}, certificate {proof:.9f}",
        [
            ("n", lambda r: str(r.count)),
            ("classes", lambda r: str(r.classes)),
            ("collapse predicted", lambda r: "yes" if r.collapsed_predicted else "no"),
            ("cos within", lambda r: number(r.within, 6)),
            ("cos with largest", lambda r: number(r.with_largest)),
            ("‖w‖", lambda r: number(r.weight_norm)),
            ("‖h‖", lambda r: number(r.feature_norm)),
            ("cos(w, h)", lambda r: number(r.duality)),
        ],
        groups,
    )
    rows, simplices = _with_p2p(base, options, console)
    if options.out is not None:
        panels, ratios, roots = _panels(base, relu, options.cells, options.seed)
        tables = {"thresholds": thresholds, "seli": limit, "groups": groups, "p2p": rows, "best_simplex": simplices}
        write_results(options.out, tables)
        from allnc.theory.plot import plot_minority

        plot_minority(panels, ratios, roots, rows, options.out / "minority.png")


def _with_p2p(base: Problem, options: argparse.Namespace, console: Console) -> tuple[list, list]:
    linear = with_root(base, 0.3 * collapse_threshold(base, min(base.counts)))
    unit = replace(linear, lambda_w=0.0, lambda_h=0.0, lambda_b=None, classifier="normalised", scale=_SCALE)
    rows, simplices = [], []
    weights = [(0.0,) * 3, (0.1,) * 3, (1.0,) * 3, (10.0,) * 3, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    for problem in (linear, unit):
        for loss in ("ce", "logit_adjusted"):
            adjusted = replace(problem, loss=loss)
            simplices.append(best_simplex(adjusted, seed=options.seed))
            for target in get_args(P2PTarget):
                for p2p in weights if target == "etf" else weights[1:]:  # of weight 0 the target does not matter
                    with_p2p = replace(adjusted, p2p=p2p, p2p_target=target)
                    rows.append(regularised(with_p2p, starts=options.starts, seed=options.seed))
        equal = replace(problem, counts=(sum(base.counts) // len(base.counts),) * len(base.counts))
        simplices.append(best_simplex(equal, seed=options.seed))
    labels = [f"{c}, {loss}" for c in ("linear", "normalised") for loss in ("ce", "logit_adjusted", "ce, equal counts")]
    print_table(
        console,
        "The best simplex for the objective without P2P: is it a critical point?",
        [
            ("classifier, loss", lambda r: labels[simplices.index(r)]),
            ("value", lambda r: number(r.value, 6)),
            ("gradient among simplices", lambda r: small(r.along)),
            ("gradient", lambda r: small(r.gradient_norm)),
        ],
        simplices,
    )
    print_table(
        console,
        "With P2P: how far the minimiser is from the simplex",
        [
            ("classifier", lambda r: r.classifier),
            ("loss", lambda r: r.loss),
            ("P2P's target", lambda r: r.p2p_target if any(r.p2p) else "-"),
            ("means, weights, duality", lambda r: " ".join(f"{w:g}" for w in r.p2p)),
            ("value", lambda r: number(r.value, 6)),
            ("means off", lambda r: small(r.means_off)),
            ("weights off", lambda r: small(r.weights_off)),
            ("minority cos", lambda r: number(r.minority)),
            ("λ_min", lambda r: small(r.curvature)),
            ("zeros pred.", lambda r: str(r.zeros_predicted)),
            ("found", lambda r: str(r.zeros)),
            ("starts there", lambda r: f"{r.reached}/{r.starts}"),
        ],
        rows,
    )
    return rows, simplices


def _panels(base: Problem, relu: Problem, cells: int, seed: int) -> tuple[dict, list[int], list[float]]:
    """Phase diagrams with the predicted thresholds, whose K/2 minority classes have one sample each."""
    ratios = sorted({int(r) for r in np.geomspace(1, 300, cells).round()})
    roots = np.geomspace(3e-4, 0.3, cells).tolist()
    forms = {
        "cross-entropy": replace(base, lambda_b=None),
        "logit adjustment": replace(base, loss="logit_adjusted", lambda_b=None),
        "cross-entropy, features h >= 0": relu,
        "cross-entropy + 0.01 P2P": replace(base, lambda_b=None, p2p=(0.01,) * 3),
    }
    panels = {}
    for title, form in forms.items():
        cosines = phase_diagram(form, ratios, roots, seed=seed)
        line = None
        if not any(form.p2p):
            K = form.num_classes
            sized = [replace(form, counts=(r,) * (K // 2) + (1,) * (K - K // 2)) for r in ratios]
            line = [collapse_threshold(problem, 1) for problem in sized]
        panels[title] = (cosines, line)
    return panels, ratios, roots
