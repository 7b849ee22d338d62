"""Gives all pictures one style: colours, canvas, and PNG bytes without a global state of matplotlib."""

import io
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, FAINT, OCEAN, ACCENT, SECOND = "#1d2733", "#8a95a1", "#eef2f5", "#0b6e99", "#e07a3f"


def plain(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Removes the frame, and adds faint lines to read values from one axis."""
    axes.grid(axis=grid, color="#e3e8ec", lw=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def canvas(width: float, height: float, title: str, caption: str) -> tuple[Figure, Axes]:
    """Makes a figure with a title and a caption, and its axes."""
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.02, 0.945, title, color=INK, fontsize=16, fontweight="bold")
    figure.text(0.02, 0.025, caption, color=FAINT, fontsize=9)
    axes = figure.add_axes((0.02, 0.06, 0.96, 0.87) if height > 5 else (0.09, 0.2, 0.82, 0.68))
    axes.set_axis_off()
    axes.set_aspect("equal")
    return figure, axes


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
