"""Draws maps in the Equal Earth projection or a grid's plane: embeddings, change, evidence, samples, errors."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from tasks.core.earth.grid import GridSpec
from tasks.core.earth.sphere import equal_earth
from tasks.plots.style import ACCENT, FAINT, OCEAN, SECOND, canvas, png

STAND_IN = "NASA Blue Marble at about 7 km stands in for 10 m Sentinel-2"
SCALE = (0.0, 0.02, 0.01, 0.3)  # place of the colour scale, in a corner that the globe leaves free
ROOM = 0.15  # share of a box's width left of it, for the scale
SHOWN = 0.995  # share of the cells within the colour scale: some islands are far from everything
ERRORS = LinearSegmentedColormap.from_list("errors", ["#b4c1cb", SECOND, "#7a1022"])


def world_map(colours: NDArray[np.float32], spec: GridSpec, title: str, caption: str) -> bytes:
    """Draws a grid in colours; returns a PNG.

    Args:
        colours: (y, x, 4), as `principal_colours` makes them.
        spec: The grid.
        title: Above the map.
        caption: Below it.
    """
    return png(_cells(colours, spec, title, caption)[0])


def change_map(change: NDArray, spec: GridSpec, title: str, caption: str) -> bytes:
    """Draws the relative change of each cell, in powers of ten; returns a PNG.

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
    """Draws one number per cell, (y, x), NaN for none, like `world_map`, with a scale in `unit`; returns a PNG."""
    highest = float(np.nanquantile(layer, SHOWN))
    figure, axes, mesh = _cells(layer, spec, title, caption, vmin=0, vmax=highest, cmap="viridis_r")
    figure.colorbar(mesh, cax=axes.inset_axes(SCALE), extend="max").set_label(unit, color=FAINT)
    return png(figure)


def _cells(cells: NDArray, spec: GridSpec, title: str, caption: str, **style: Any) -> tuple[Figure, Axes, QuadMesh]:
    """Draws a map of cells, (y, x) numbers or (y, x, 4) colours, of all or of evenly spread cells of a grid.

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
    """Returns colours of a grid, (y, x, 4), as a cloud-optimised GeoTIFF in its CRS."""
    height, width = colours.shape[:2]
    bands = np.moveaxis(np.rint(colours * 255).astype(np.uint8), -1, 0)
    options = {"count": 4, "dtype": "uint8", "crs": spec.crs, "compress": "deflate"}
    transform = from_bounds(*spec.box, width, height)
    with MemoryFile() as memory:
        with memory.open(driver="COG", height=height, width=width, transform=transform, **options) as file:
            file.write(bands)
            file.colorinterp = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
        return bytes(memory.getbuffer())


def principal_colours(components: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns (y, x, 4) colours: ranks of three components, (3, y, x), transparent for nodata.

    Ranks use the whole range of each colour, whatever a few extremes are.
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
    """Draws the places of patches; returns a PNG."""
    figure, axes = canvas(12, 6.6, title, caption)
    outline(axes)
    axes.scatter(*equal_earth(*lonlat.T), s=2.2, c=ACCENT, alpha=0.55, linewidths=0)
    return png(figure)


def outline(axes: Axes) -> None:
    """Draws the Earth's outline in the Equal Earth projection."""
    side = np.linspace(-90, 90, 181)
    lon = np.concatenate([np.full(181, -180.0), np.full(181, 180.0)])
    x, y = equal_earth(lon, np.concatenate([side, side[::-1]]))
    axes.fill(x, y, facecolor=OCEAN, edgecolor="none", zorder=-1)


def error_map(lonlat: NDArray[np.float64], lost: NDArray[np.float64], title: str, caption: str) -> bytes:
    """Draws the errors of a probe: each place by its loss, the worst on top; returns a PNG.

    Args:
        lonlat: Places, (n, 2) in degrees.
        lost: (n,) from 0, right, upwards; beyond 1 all is one colour.
        title: Above the map.
        caption: Below it.
    """
    figure, axes = canvas(12, 6.6, title, caption)
    outline(axes)
    order = np.argsort(lost, kind="stable")
    x, y = equal_earth(*lonlat[order].T)
    axes.scatter(x, y, c=lost[order], cmap=ERRORS, vmin=0, vmax=1, s=5, linewidths=0)
    return png(figure)
