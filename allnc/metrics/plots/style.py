"""What all pictures share: colours, markers, figures without a display, and how a file is written."""

from __future__ import annotations

import io
import os
import warnings
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DPI = 110
BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"
PALETTE = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)  # Okabe and Ito's, those first that differ most
MARKERS = "os^vDPX*<>"
SEQUENTIAL = matplotlib.colormaps["viridis"]  # order by lightness, so that it reads in grey, too
DIVERGING = "PuOr_r"  # purple, white, orange: told apart with every kind of colour blindness


def appearance(number: int) -> dict[str, Any]:
    """Return colour and marker of the line or points of a number >= 0; the first seventy differ."""
    return {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}


def new_figure(width: float, height: float, *, dpi: int = DPI, square: bool = False) -> Figure:
    """Return an empty figure of so many inches that belongs to no window; `square` where its axes are squares."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="compressed" if square else "constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as the kind of file that its name ends in, .png or .svg; the same figure gives the same bytes.

    PNG files have a palette of 256 colours, which makes them a third as large.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box is drawn for it, which says enough
        if os.fspath(path).endswith(".svg"):
            with matplotlib.rc_context({"svg.hashsalt": "allnc"}):
                figure.savefig(path, metadata={"Date": None})
            return
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB")
    # Refined by k-means, large surfaces such as the cells of a heat map keep their colours; only edges lose some.
    few = image.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    few.save(path, "PNG", optimize=True)
