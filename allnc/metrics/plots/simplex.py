"""Features, class means, classifier vectors and the ideal simplex in the two or three dimensions that they live in.

Legend: N features, F = 2 or 3 dimensions, C classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from allnc.metrics.plots.style import BLACK, DPI, appearance, new_figure, save
from allnc.ops._common import check_floating, check_labels, check_shape

_REACH = 1.75  # half the width of a panel, in mean lengths of the class means
_DENSE = 500  # of more features, points are small, and pixels instead of outlines in an SVG file
_GIF_COLOURS = 64


class Scene(NamedTuple):
    """What a panel shows of one run at one moment.

    Args:
        features: [N, F] floating, F = 2 or 3.
        labels: [N] int64 in [0, C).
        weight: [C, F] floating, the vectors of the classifier.
        title: name of the run.
        note: a line beneath it, such as its accuracy.
        classes: [C] names of the classes; empty for their numbers.
    """

    features: Tensor
    labels: Tensor
    weight: Tensor
    title: str
    note: str = ""
    classes: tuple[str, ...] = ()


class _Placed(NamedTuple):
    """A scene in the coordinates of its panel: the mean of the class means is the origin."""

    features: Tensor  # [N, F]
    means: Tensor  # [C, F], of mean square length 1
    weight: Tensor  # [C, F], of mean square length 1
    ideal: Tensor | None  # [C, F] the unit simplex ETF nearest to the means; None where F < C - 1


def plot_scenes(scenes: Sequence[Scene], path: str | os.PathLike[str]) -> None:
    """Draw the geometry of runs whose features have two or three dimensions, a panel for each.

    Features are points, class means filled marks on solid lines from the mean of all class means, classifier vectors
    stars on dashed lines; dotted lines are the simplex ETF, turned as near to the means as it can be; the circle has
    radius 1. Features and means are scaled together so that the means' mean square length is 1, classifier vectors on
    their own. Three dimensions are turned so that the means of three classes lie on the horizontal plane.

    Args:
        scenes: one for each panel, of any numbers of classes.
        path: .png or .svg file to write.

    Raises:
        TypeError, ValueError: no scene, shapes that do not fit, F other than 2 or 3, or a class without a feature.

    Source: the simplex: Papyan, Han & Donoho (PNAS 2020); the picture ours.
    """
    figure, axes = _figure(scenes)
    for axis, scene in zip(axes, scenes, strict=True):
        _draw(axis, scene, _basis(scene))
    _legend(figure, scenes[0])
    save(figure, path)


def animate_scenes(
    frames: Sequence[tuple[str, Sequence[Scene]]], path: str | os.PathLike[str], *, milliseconds: int = 120
) -> None:
    """Write the pictures of `plot_scenes` over a training as an animated GIF, whose last frame rests.

    Args:
        frames: a headline and the scenes of each moment; all of as many scenes.
        path: .gif file to write.
        milliseconds: that a frame is shown, > 0.

    Raises:
        TypeError, ValueError: no frame, or as `plot_scenes`.
    """
    if not frames:
        raise ValueError("frames must hold at least one moment; got none")
    images: list[Image.Image] = []
    figure, axes = _figure(frames[0][1], dpi=64, headline=0.3)
    _legend(figure, frames[0][1][0])
    bases = [_basis(scene) for scene in frames[-1][1]]  # one for all moments, so that nothing turns but the vectors
    for headline, scenes in frames:
        figure.suptitle(headline, fontsize=13)
        for axis, scene, basis in zip(axes, scenes, bases, strict=True):
            axis.cla()
            _draw(axis, scene, basis)
        if not images:  # panels must not move between frames; their places settle at the second drawing
            figure.canvas.draw()
            figure.canvas.draw()
            figure.set_layout_engine("none")
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
        images.append(Image.fromarray(pixels[..., :3]))
    # One palette for all frames: with one each, what does not move would flicker.
    palette = images[-1].quantize(_GIF_COLOURS)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [milliseconds] * (len(images) - 1) + [20 * milliseconds]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)


def nearest_simplex(means: Tensor) -> Tensor | None:
    """Return the unit simplex ETF that is turned as near to the centred means as it can be.

    Args:
        means: [C, F] floating, C >= 2.

    Returns:
        [C, F] float64 of unit rows with cosines -1/(C - 1), or None where F < C - 1, which no simplex fits in. It
        maximises Σ_c s_c·m_c over all rotations and reflections.

    Source: orthogonal Procrustes: Schönemann (Psychometrika 1966).
    """
    num_classes, dim = means.shape
    if dim < num_classes - 1:
        return None
    centred = means.detach().double().cpu()
    centred = centred - centred.mean(0)
    simplex = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes  # [C, C], rank C - 1
    left, _, right = torch.linalg.svd(simplex @ centred, full_matrices=False)  # [C, F] = left diag right
    rank = num_classes - 1
    turned = simplex @ left[:, :rank] @ right[:rank]
    return turned / torch.linalg.vector_norm(turned, dim=1, keepdim=True)


def _figure(scenes: Sequence[Scene], *, dpi: int = DPI, headline: float = 0.0) -> tuple[Figure, list[Axes]]:
    if not scenes:
        raise ValueError("scenes must hold at least one run; got none")
    for scene in scenes:
        _check(scene)
    dims = [scene.features.shape[1] for scene in scenes]
    if len(set(dims)) > 1:
        got = ", ".join(f"{dim} in {scene.title}" for dim, scene in zip(dims, scenes, strict=True))
        raise ValueError(f"scenes of one picture must have the same number of features; got {got}: draw them apart")
    columns = min(4, len(scenes))
    rows = math.ceil(len(scenes) / columns)
    figure = new_figure(3.5 * columns, 3.95 * rows + 0.8 + headline, dpi=dpi, square=True)
    axes = list(
        figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": "3d"} if dims[0] == 3 else None).flat
    )
    for axis in axes[len(scenes) :]:
        axis.set_axis_off()
    return figure, axes[: len(scenes)]


def _check(scene: Scene) -> None:
    check_floating("features", scene.features)
    check_shape("features", scene.features, ("N", "F"))
    dim = scene.features.shape[1]
    if dim not in (2, 3):
        raise ValueError(f"features of {scene.title} must have 2 or 3 dimensions to be drawn; got {dim}")
    check_labels(scene.labels, len(scene.features))
    check_floating("weight", scene.weight)
    check_shape("weight", scene.weight, ("C", dim))
    counts = torch.bincount(scene.labels.cpu(), minlength=len(scene.weight))
    if len(counts) > len(scene.weight) or int(counts.min()) == 0:
        raise ValueError(
            f"labels of {scene.title} must hold every class in [0, {len(scene.weight)}) and no other; got "
            f"{counts.tolist()} features of the classes"
        )


def _basis(scene: Scene) -> Tensor:
    """[F, F] the directions of the axes: in three dimensions, the class means spread most in the first two."""
    if scene.features.shape[1] == 2:
        return torch.eye(2, dtype=torch.float64)
    means = _class_means(scene)
    return torch.linalg.svd(means - means.mean(0)).Vh.T


def _class_means(scene: Scene) -> Tensor:
    """[C, F] float64."""
    features, labels = scene.features.detach().double().cpu(), scene.labels.cpu()
    counts = torch.bincount(labels, minlength=len(scene.weight))
    sums = torch.zeros(len(counts), features.shape[1], dtype=torch.float64).index_add_(0, labels, features)
    return sums / counts[:, None]


def _placed(scene: Scene, basis: Tensor) -> _Placed:
    means = _class_means(scene)
    centre = means.mean(0)
    size = float((means - centre).square().sum(1).mean().sqrt()) or 1.0
    weight = scene.weight.detach().double().cpu()
    length = float(weight.square().sum(1).mean().sqrt()) or 1.0
    features = (scene.features.detach().double().cpu() - centre) @ basis / size
    means = (means - centre) @ basis / size
    return _Placed(features, means, weight @ basis / length, nearest_simplex(means))


def _draw(axis: Any, scene: Scene, basis: Tensor) -> None:
    placed = _placed(scene, basis)
    turn = np.linspace(0, 2 * np.pi, 200)
    circle = [np.cos(turn), np.sin(turn), np.zeros_like(turn)][: len(basis)]
    axis.plot(*circle, color="0.8", linewidth=1, zorder=1)  # of radius 1, on the plane of three class means
    dense = len(placed.features) > _DENSE
    inside = (placed.features.abs() <= 1.04 * _REACH).all(1)  # three dimensions have no clipping
    for c in range(len(placed.means)):
        look = appearance(c)
        colour = look["color"]
        own = placed.features[(scene.labels.cpu() == c) & inside]
        axis.plot(
            *own.T.numpy(),
            **look,
            linestyle="",
            markersize=2.5 if dense else 4,
            alpha=0.35,
            markeredgewidth=0,
            rasterized=dense,
            zorder=2,
        )
        if placed.ideal is not None:
            axis.plot(*_ray(placed.ideal[c]), color="0.45", linestyle=":", linewidth=1.6, zorder=3)
        axis.plot(*_ray(placed.means[c]), color=colour, linewidth=2, zorder=4)
        axis.plot(
            *placed.means[c, :, None].numpy(), **look, markersize=9, markeredgecolor="black", linestyle="", zorder=6
        )
        axis.plot(*_ray(placed.weight[c]), color=colour, linestyle="--", linewidth=1.8, zorder=5)
        axis.plot(
            *placed.weight[c, :, None].numpy(),
            color=colour,
            marker="*",
            markersize=14,
            markeredgecolor="black",
            markeredgewidth=0.8,
            linestyle="",
            zorder=7,
        )
    axis.set_title(f"{scene.title}\n{scene.note}" if scene.note else scene.title, fontsize=10.5)
    limits = (-_REACH, _REACH)
    axis.set_xlim(*limits)
    axis.set_ylim(*limits)
    if placed.means.shape[1] == 3:
        axis.set_zlim(*limits)
        axis.view_init(elev=50, azim=-60)
        axis.set_box_aspect((1, 1, 1), zoom=1.9)
        axis.set_axis_off()
    else:
        axis.set_aspect("equal")
        axis.set(xticks=[], yticks=[])


def _ray(vector: Tensor) -> np.ndarray:
    """[F, 2] from the origin to a vector [F]."""
    return torch.stack((torch.zeros_like(vector), vector), dim=1).numpy()


def _legend(figure: Figure, scene: Scene) -> None:
    """What marks and lines mean, and the colours of the classes, beneath all panels."""
    plain = {"color": BLACK, "markeredgewidth": 0}
    handles = [
        Line2D([], [], **plain, marker="o", markersize=4, linestyle="", alpha=0.5, label="features"),
        Line2D([], [], **plain, marker="o", markersize=8, linewidth=2, label="class means"),
        Line2D([], [], **plain, marker="*", markersize=12, linestyle="--", label="classifier vectors"),
        Line2D([], [], color="0.45", linestyle=":", linewidth=1.8, label="simplex ETF"),
    ]
    names = scene.classes or tuple(str(c) for c in range(len(scene.weight)))
    counts = torch.bincount(scene.labels.cpu(), minlength=len(names)).tolist()
    handles += [
        Line2D([], [], **appearance(c), linestyle="", markersize=8, label=f"{name}: {counts[c]} images")
        for c, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9.5)
