"""Draws maps in the Equal Earth projection or a grid's plane: embeddings, change, evidence, samples, errors."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from tasks.core.earth.grid import GridSpec
from tasks.core.earth.land import mask
from tasks.core.earth.sphere import equal_earth
from tasks.plots.oklab import srgb
from tasks.plots.style import ACCENT, FAINT, OCEAN, SECOND, canvas, png

STAND_IN = "NASA Blue Marble at about 7 km stands in for 10 m Sentinel-2"
SCALE = (0.0, 0.02, 0.01, 0.3)  # place of the colour scale, in a corner that the globe leaves free
DARKEST, LIGHTEST = 0.44, 0.93  # OKLab's lightness of land: CIE L* from 35 to 92
CHROMA = 0.09  # of a component's end: what sRGB has in most hues at these lightnesses
WARM = np.radians(60)  # hue of the second component, from blue to the yellow of sand; the third is from green to pink
HUES = np.array([[np.cos(WARM), np.sin(WARM)], [np.sin(WARM), -np.cos(WARM)]])
ROOM = 0.15  # share of a box's width left of it, for the scale
LEAST = -6  # power of ten of the least change that has a colour of its own
SHOWN = 0.995  # share of the cells within the colour scale: some islands are far from everything
THINNED = 3  # of so many rows and columns of the land mask one is drawn: a quarter of a degree
COAST, LAND = "#7b8794", "white"
LAYER = LinearSegmentedColormap.from_list("layer", ["#f2ecd8", "#e3b36a", "#b5524b", "#5a1e4f", "#1d1030"])
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
    powers = np.log10(np.maximum(change, 10.0**LEAST))  # pcolormesh leaves out what is infinite
    figure, axes, mesh = _cells(powers, spec, title, caption, vmin=LEAST, vmax=0, cmap="magma_r")
    scale = figure.colorbar(mesh, cax=axes.inset_axes(SCALE))
    scale.set_ticks([-6, -4, -2, 0], labels=["1e-6", "1e-4", "0.01", "1"])
    return png(figure)


def layer_map(layer: NDArray[np.float32], spec: GridSpec, title: str, caption: str, unit: str) -> bytes:
    """Draws one number per cell, (y, x), NaN for none, like `world_map`, with a scale in `unit`; returns a PNG."""
    highest = float(np.nanquantile(layer, SHOWN))
    figure, axes, mesh = _cells(layer, spec, title, caption, norm=PowerNorm(0.5, 0, highest), cmap=LAYER)
    scale = figure.colorbar(mesh, cax=axes.inset_axes(SCALE), extend="max")
    scale.set_ticks(sorted({float(f"{highest * part**2:.1g}") for part in np.linspace(0, 1, 5)}))
    scale.set_label(unit, color=FAINT)
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
    _coast(axes, x, y, np.isnan(cells) if cells.ndim == 2 else cells[..., 3] == 0)
    return figure, axes, axes.pcolormesh(x, y, cells, rasterized=True, **style)


def _coast(axes: Axes, x: NDArray, y: NDArray, empty: NDArray[np.bool_]) -> None:
    """Draws a thin line around the cells that are there, so that pale ones stand out from the sea."""
    if min(empty.shape) > 1:
        middle = [(edge[:-1, :-1] + edge[1:, 1:]) / 2 for edge in (x, y)]
        axes.contour(*middle, empty, levels=[0.5], colors=COAST, linewidths=0.5)


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


def principal_colours(
    components: NDArray[np.float32], areas: NDArray[np.float64], latitudes: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Returns (y, x, 4) colours of three components, transparent for nodata.

    In OKLab, where equal steps look equal: the first component is lightness, the other two are a plane of hues. Each is
    taken by its rank, so that every part of its range has the same area of land, whatever a few extremes are.

    Args:
        components: (3, y, x), NaN for nodata.
        areas: Relative area of each cell, (y, x).
        latitudes: Latitude of each cell in degrees, (y, x).
    """
    known = np.isfinite(components[0])
    found, weights = components[:, known].astype(np.float64), areas[known]
    colours = np.zeros((*known.shape, 4), np.float32)
    if len(weights):
        found *= _signs(found, weights, np.abs(latitudes[known]))[:, None]
        light, warm, third = (_ranks(part, weights) for part in found)
        chroma = CHROMA * np.column_stack([warm, third]) @ HUES
        colours[known, :3] = srgb(np.column_stack([DARKEST + (LIGHTEST - DARKEST) * (light + 1) / 2, chroma]))
    colours[known, 3] = 1
    return colours


def _signs(found: NDArray[np.float64], weights: NDArray[np.float64], poleward: NDArray[np.float64]) -> NDArray:
    """Returns signs of three components, which are arbitrary: a long tail is up, and the second falls polewards.

    So what is rare is light, as ice and deserts are among vegetation, and the colours of the tropics are warm.
    """
    centred = found - np.average(found, axis=1, weights=weights)[:, None]
    moments = np.average(centred**3, axis=1, weights=weights)
    moments[1] = -np.average(centred[1] * poleward, weights=weights)
    return np.where(moments < 0, -1.0, 1.0)


def _ranks(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns in -1 to 1 how much of the weight is at lower values; equal values have one rank."""
    _, which = np.unique(values, return_inverse=True)
    weight = np.bincount(which, weights)
    below = np.cumsum(weight) - weight / 2
    return (2 * below / weight.sum() - 1)[which]


def sample_map(lonlat: NDArray[np.float64], title: str, caption: str) -> bytes:
    """Draws the places of patches; returns a PNG."""
    figure, axes = canvas(12, 6.6, title, caption)
    globe(axes)
    axes.scatter(*equal_earth(*lonlat.T), s=2.2, c=ACCENT, alpha=0.55, linewidths=0)
    return png(figure)


def outline(axes: Axes) -> None:
    """Draws the Earth's outline in the Equal Earth projection."""
    side = np.linspace(-90, 90, 181)
    lon = np.concatenate([np.full(181, -180.0), np.full(181, 180.0)])
    x, y = equal_earth(lon, np.concatenate([side, side[::-1]]))
    axes.fill(x, y, facecolor=OCEAN, edgecolor="none", zorder=-1)
    axes.plot(np.append(x, x[0]), np.append(y, y[0]), color=OCEAN, lw=1, zorder=-0.3)  # where white land is at the edge


def globe(axes: Axes) -> None:
    """Draws the Earth's outline and its land, in Equal Earth, so that marks are seen to lie somewhere."""
    outline(axes)
    land = mask()[::THINNED, ::THINNED]
    rows, columns = land.shape
    lon, lat = np.meshgrid(np.linspace(-180, 180, columns), np.linspace(-90, 90, rows))
    x, y = equal_earth(lon, lat)
    axes.contourf(x, y, land, levels=[0.5, 1], colors=LAND, zorder=-0.5)
    axes.contour(x, y, land, levels=[0.5], colors=COAST, linewidths=0.3, zorder=-0.4)


def error_map(lonlat: NDArray[np.float64], lost: NDArray[np.float64], title: str, caption: str) -> bytes:
    """Draws the errors of a probe: each place by its loss, the worst on top; returns a PNG.

    Args:
        lonlat: Places, (n, 2) in degrees.
        lost: (n,) from 0, right, upwards; beyond 1 all is one colour.
        title: Above the map.
        caption: Below it.
    """
    figure, axes = canvas(12, 6.6, title, caption)
    globe(axes)
    order = np.argsort(lost, kind="stable")
    x, y = equal_earth(*lonlat[order].T)
    axes.scatter(x, y, c=lost[order], cmap=ERRORS, vmin=0, vmax=1, s=5, linewidths=0)
    return png(figure)


def place_map(lonlat: NDArray[np.float64], values: NDArray[np.float64], title: str, caption: str, unit: str) -> bytes:
    """Draws one number per place, the largest on top, with a scale in `unit`; returns a PNG.

    Args:
        lonlat: Places, (n, 2) in degrees.
        values: (n,) from 0 upwards; what is not finite has the highest colour.
        title: Above the map.
        caption: Below it.
        unit: Of the values.
    """
    figure, axes = canvas(12, 6.6, title, caption)
    globe(axes)
    known = values[np.isfinite(values)]
    highest = float(np.quantile(known, SHOWN)) if len(known) else 1.0
    order = np.argsort(values, kind="stable")
    x, y = equal_earth(*lonlat[order].T)
    shown = np.minimum(values[order], highest)
    marks = axes.scatter(x, y, c=shown, cmap="viridis_r", vmin=0, vmax=highest, s=5, linewidths=0)
    figure.colorbar(marks, cax=axes.inset_axes(SCALE), extend="max").set_label(unit, color=FAINT)
    return png(figure)
