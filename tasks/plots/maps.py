"""The pictures that a run leaves: PNG bytes from plain arrays, with no global state of matplotlib."""

import io
from textwrap import fill
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from tasks.core.earth.grid import GridSpec

INK, FAINT, OCEAN, ACCENT, SECOND = "#1d2733", "#8a95a1", "#eef2f5", "#0b6e99", "#e07a3f"
STAND_IN = "NASA Blue Marble at about 7 km stands in for 10 m Sentinel-2"
EQUAL_EARTH = (1.340264, -0.081106, 0.000893, 0.003796)  # Savric, Patterson, Jenny 2018
WRAP = 14  # letters of a line above a panel
SCALE = (0.0, 0.02, 0.01, 0.3)  # of a map's colours: in the corner that the globe leaves free
ROOM = 0.15  # of a box's width, to its left: there the scale is
SHOWN = 0.995  # share of the cells that a scale of colours tells apart: some islands are far from everything


def world_map(colours: NDArray[np.float32], spec: GridSpec, title: str, caption: str) -> bytes:
    """A grid in colours.

    Args:
        colours: (y, x, 4), as `principal_colours` makes them.
        spec: The grid.
        title: Above the map.
        caption: Below it.
    """
    return png(_cells(colours, spec, title, caption)[0])


def change_map(change: NDArray, spec: GridSpec, title: str, caption: str) -> bytes:
    """The relative change of each cell, in powers of ten.

    Args:
        change: (y, x), NaN where there is none; what is below the scale has its lowest colour.
        spec: The grid.
        title: Above the map.
        caption: Below it.
    """
    with np.errstate(divide="ignore"):
        powers = np.log10(change)
    figure, axes, mesh = _cells(powers, spec, title, caption, vmin=-6, vmax=0, cmap="magma_r")
    scale = figure.colorbar(mesh, cax=axes.inset_axes(SCALE))
    scale.set_ticks([-6, -4, -2, 0], labels=["1e-6", "1e-4", "0.01", "1"])
    return png(figure)


def layer_map(layer: NDArray[np.float32], spec: GridSpec, title: str, caption: str, unit: str) -> bytes:
    """One number per cell, (y, x), NaN where there is none; as `world_map`, with a scale in `unit`."""
    highest = float(np.nanquantile(layer, SHOWN))
    figure, axes, mesh = _cells(layer, spec, title, caption, vmin=0, vmax=highest, cmap="viridis_r")
    figure.colorbar(mesh, cax=axes.inset_axes(SCALE), extend="max").set_label(unit, color=FAINT)
    return png(figure)


def _cells(cells: NDArray, spec: GridSpec, title: str, caption: str, **style: Any) -> tuple[Figure, Axes, QuadMesh]:
    """A map of cells, (y, x) numbers or (y, x, 4) colours, all of a grid's or evenly some of them.

    The globe is in Equal Earth, a box in its own plane.
    """
    figure, axes = canvas(12, 6.6, title, caption)
    (west, south, east, north), (rows, columns) = spec.box, cells.shape[:2]
    x, y = np.meshgrid(np.linspace(west, east, columns + 1), np.linspace(north, south, rows + 1))
    if spec.is_globe:
        x, y = equal_earth(x, y)
        outline(axes)
    else:
        axes.fill([west, east, east, west], [south, south, north, north], facecolor=OCEAN, edgecolor="none", zorder=-1)
        axes.set_xlim(west - ROOM * (east - west), east)
        axes.set_aspect(1 / np.cos(np.radians((south + north) / 2)) if spec.plane.is_geographic else "equal")
    return figure, axes, axes.pcolormesh(x, y, cells, rasterized=True, **style)


def geotiff(colours: NDArray[np.float32], spec: GridSpec) -> bytes:
    """Colours of a grid, (y, x, 4), as a cloud-optimised GeoTIFF in its CRS."""
    height, width = colours.shape[:2]
    bands = np.moveaxis(np.rint(colours * 255).astype(np.uint8), -1, 0)
    options = {"count": 4, "dtype": "uint8", "crs": spec.crs, "compress": "deflate"}
    transform = from_bounds(*spec.box, width, height)
    with MemoryFile() as memory:
        with memory.open(driver="COG", height=height, width=width, transform=transform, **options) as file:
            file.write(bands)
            file.colorinterp = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
        return bytes(memory.getbuffer())


def principal_axes(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first three principal axes of some vectors, (n, dim) to (dim, 3); their signs are arbitrary."""
    centred = sample - sample.mean(0, dtype="f8")
    return np.linalg.eigh(centred.T @ centred)[1][:, :-4:-1].astype(np.float32)


def principal_colours(components: NDArray[np.float32]) -> NDArray[np.float32]:
    """(y, x, 4) colours: ranks of three components, (3, y, x), transparent where there are no data.

    Ranks use the whole range of each colour, whatever the few extremes are.
    """
    known = np.isfinite(components[0])
    found = components[:, known].T
    if len(found):
        found = found * np.sign(found[np.abs(found).argmax(0), range(3)])  # the sign of an axis is arbitrary
    ranks = found.argsort(0).argsort(0) / max(len(found) - 1, 1)
    colours = np.zeros((*known.shape, 4), np.float32)
    colours[known, :3] = 0.08 + 0.88 * ranks
    colours[known, 3] = 1
    return colours


def sample_map(lonlat: NDArray[np.float64], title: str, caption: str) -> bytes:
    """Where patches were taken."""
    figure, axes = canvas(12, 6.6, title, caption)
    outline(axes)
    axes.scatter(*equal_earth(*lonlat.T), s=2.2, c=ACCENT, alpha=0.55, linewidths=0)
    return png(figure)


def loss_curve(history: list[dict[str, Any]], title: str, caption: str) -> bytes:
    """Loss and held-out accuracy by step."""
    figure, axes = canvas(9, 4.8, title, caption)
    axes.set_axis_on()
    axes.set_aspect("auto")
    steps = [entry["step"] for entry in history]
    for name, colour, axis in (("loss", ACCENT, axes), ("accuracy", SECOND, axes.twinx())):
        axis.plot(steps, [entry[name] for entry in history], color=colour, lw=2)
        axis.set_ylabel(LABELS[name], color=colour)
        axis.tick_params(colors=FAINT)
        for side in ("top", "left", "right"):
            axis.spines[side].set_visible(False)
    axes.set_xlabel("step", color=INK)
    return png(figure)


LABELS = {"loss": "InfoNCE loss", "accuracy": "held-out retrieval accuracy"}


def score_chart(table: pd.DataFrame, title: str, caption: str) -> bytes:
    """Bars by task and embedder: random split pale, blocked split full, with its deviation where there is one.

    Args:
        table: Columns task, metric, embedder, random, blocked, and perhaps blocked_std; NaN: not scored.
        title: Above the chart.
        caption: Below it.
    """
    tasks, embedders = list(table["task"].unique()), list(table["embedder"].unique())
    height = 1.8 + 0.28 * max(10, len(embedders))
    figure = Figure(figsize=(12, height), facecolor="white")
    figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=15, fontweight="bold")
    figure.text(0.02, 0.02, caption, color=FAINT, fontsize=8.5)
    panels = np.atleast_1d(figure.subplots(1, len(tasks), sharey=True))
    for axes, task in zip(panels, tasks, strict=True):
        _score_bars(axes, table[table["task"] == task].set_index("embedder").loc[embedders], task)
    figure.subplots_adjust(left=0.13, right=0.985, top=1 - 0.92 / height, bottom=0.69 / height, wspace=0.14)
    return png(figure)


def _score_bars(axes: Axes, rows: pd.DataFrame, task: str) -> None:
    place = np.arange(len(rows))[::-1]
    axes.barh(place, rows["random"].clip(lower=0), color="#cfe0e8", height=0.74)
    colours = [SECOND if name.startswith("RANGE+") else ACCENT for name in rows.index]
    spread = rows.get("blocked_std")
    style = {"ecolor": INK, "elinewidth": 0.8}
    axes.barh(place, rows["blocked"].clip(lower=0), xerr=spread, color=colours, height=0.44, error_kw=style)
    for y in place[rows["blocked"].isna()]:
        axes.text(0.02, y, "weights not given", fontsize=7, color=FAINT, va="center")
    axes.set_title(f"{fill(task, WRAP)}\n({rows['metric'].iloc[0]})", fontsize=10, color=INK, loc="left")
    axes.set_yticks(place, rows.index, fontsize=9.5, color=INK)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    axes.tick_params(axis="x", colors=FAINT, length=0, labelsize=8)
    axes.tick_params(axis="y", length=0)
    plain(axes, "x")


def plain(axes: Axes, grid: Literal["x", "y"]) -> None:
    """No frame, and faint lines to read values from one axis."""
    axes.grid(axis=grid, color="#e3e8ec", lw=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def equal_earth(lon: NDArray[np.float64], lat: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Equal Earth projection of degrees."""
    a1, a2, a3, a4 = EQUAL_EARTH
    t = np.arcsin(np.sqrt(3) / 2 * np.sin(np.radians(lat)))
    t2, t6 = t**2, t**6
    slope = 9 * a4 * t**8 + 7 * a3 * t6 + 3 * a2 * t2 + a1
    x = 2 * np.sqrt(3) * np.radians(lon) * np.cos(t) / (3 * slope)
    return x, t * (a1 + a2 * t2 + t6 * (a3 + a4 * t2))


def outline(axes: Axes) -> None:
    """Draws the Earth's outline in the Equal Earth projection."""
    side = np.linspace(-90, 90, 181)
    lon = np.concatenate([np.full(181, -180.0), np.full(181, 180.0)])
    x, y = equal_earth(lon, np.concatenate([side, side[::-1]]))
    axes.fill(x, y, facecolor=OCEAN, edgecolor="none", zorder=-1)


def canvas(width: float, height: float, title: str, caption: str) -> tuple[Figure, Axes]:
    """A figure with a title and a caption, and its axes."""
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.02, 0.945, title, color=INK, fontsize=16, fontweight="bold")
    figure.text(0.02, 0.025, caption, color=FAINT, fontsize=9)
    axes = figure.add_axes((0.02, 0.06, 0.96, 0.87) if height > 5 else (0.09, 0.2, 0.82, 0.68))
    axes.set_axis_off()
    axes.set_aspect("equal")
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
