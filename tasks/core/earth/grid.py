"""Defines the grid: a box of a plane, by default the globe, north up, in square tiles that are published one by one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.core.earth.plane import GLOBE, WGS84, Box, Plane
from tasks.core.earth.region import Region

Land = Literal["any", "centre"]
CHUNK_CELLS = 20  # cells along one side of a Zarr chunk of the grid; a smaller tile is one chunk
MOST_CELLS = 1 << 32  # cells of a grid, 0.005 degrees on the globe: the land mask in memory has a byte for each
TRIED = 10_000  # numbers of cells that are tried to propose a step that divides the box
WHOLE = 1e-9  # relative tolerance for a number of cells to count as whole


@dataclass(frozen=True)
class Tile:
    """A rectangle of cells, one Zarr shard of the stored grid."""

    row: int
    """First row of cells, counted from the north."""
    column: int
    """First column of cells, counted from the west."""
    rows: int
    """Number of rows; fewer than the tile size at the southern edge."""
    columns: int
    """Number of columns; fewer than the tile size at the eastern edge."""

    @property
    def window(self) -> tuple[slice, slice]:
        """Returns the slices of (y, x)."""
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)

    def __str__(self) -> str:
        return f"r{self.row:05d}-c{self.column:05d}"


@dataclass(frozen=True)
class GridSpec:
    """A regular grid, given by its cell centres."""

    step: float
    """Cell size in the units of the CRS, degrees or metres. The sides of the box are multiples of it."""
    tile: int = 60
    """Cells along one side of a tile."""
    box: Box = GLOBE
    """West, south, east and north edge in the units of the CRS."""
    crs: str = WGS84
    """The coordinate reference system, a code or WKT."""
    land: Land = "any"
    """Which cells are land: those with any land in them, or those whose centre lies on it."""
    region: Region | None = None
    """The region that the grid is cut to; none where all land counts."""

    def __post_init__(self) -> None:
        west, south, east, north = self.box
        unit = self.plane.unit
        if not self.plane.is_geographic and self.box == GLOBE:
            raise ValueError(f"the CRS {self.crs} is in metres and needs a box: give west, south, east and north")
        if not (west < east and south < north):
            raise ValueError(f"the box {self.box} is empty: give west < east and south < north")
        if self.plane.is_geographic and not (west >= -180 and east - west <= 360 and south >= -90 and north <= 90):
            raise ValueError(
                f"the box {self.box} is not on the globe: give west from -180, at most 360 degrees to the east of it, "
                "and latitudes within -90 and 90; a box across 180 degrees ends beyond it, as 170 to 190"
            )
        wide, high = self.sides
        cells = wide / self.step * (high / self.step) if self.step > 0 else 0.0
        if cells > MOST_CELLS:
            raise ValueError(
                f"a step of {self.step:g} makes {cells:.3g} cells of the box, more than {MOST_CELLS:,}: give a larger "
                "step, or publish boxes of their own"
            )
        if not self.step > 0 or not all(_is_whole(side / self.step) for side in self.sides):
            raise ValueError(
                f"a step of {self.step:g} does not divide the box of {wide:g} x {high:g} {unit}: use {self._fitting()}"
            )
        if self.tile < 1:
            raise ValueError(f"tile size {self.tile} is not positive: use for example 60")

    def _fitting(self) -> str:
        """Proposes a near step that divides the box, the shortest to write; else a box that this step divides."""
        wide, high = self.sides
        first = int(np.ceil(wide / self.step)) if 0 < self.step < wide else 1
        steps = [wide / n for n in range(first, first + min(first, TRIED) + 1) if _is_whole(high * n / wide)]
        if steps:
            return f"a step of {min(steps, key=lambda step: len(repr(step)))!r}"
        west, south = (np.floor(edge / self.step) * self.step for edge in self.box[:2])
        east, north = (np.ceil(edge / self.step) * self.step for edge in self.box[2:])
        return f"the box {west:.10g}, {south:.10g}, {east:.10g}, {north:.10g}"

    @cached_property
    def plane(self) -> Plane:
        """Returns the plane that the coordinates are in."""
        return Plane(self.crs)

    @property
    def sides(self) -> tuple[float, float]:
        """Returns width and height of the box in the units of the CRS."""
        west, south, east, north = self.box
        return east - west, north - south

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the numbers of rows and columns of cells."""
        wide, high = self.sides
        return round(high / self.step), round(wide / self.step)

    @property
    def closes(self) -> bool:
        """Tells whether the grid goes all around the globe, so that its last column is beside its first."""
        return self.plane.is_geographic and self.sides[0] == 360

    @property
    def is_globe(self) -> bool:
        """Tells whether the grid is the whole globe."""
        return self.closes and self.sides[1] == 180

    @property
    def gsd(self) -> float:
        """Returns the size of a cell in metres; where it is in degrees, at the equator."""
        return round(self.step * self.plane.metres, 1)

    @property
    def size(self) -> str:
        """Returns the size of a cell with its unit, for titles."""
        return f"{self.step:g} {self.plane.unit}"

    @cached_property
    def y(self) -> NDArray[np.float64]:
        """Returns y of the rows' centres, from north to south; latitudes in degrees where the CRS is geographic."""
        rows = self.shape[0]
        return self.box[3] - (np.arange(rows, dtype=np.float64) + 0.5) * (self.sides[1] / rows)

    @cached_property
    def x(self) -> NDArray[np.float64]:
        """Returns x of the columns' centres, from west to east; longitudes in degrees where the CRS is geographic."""
        columns = self.shape[1]
        return self.box[0] + (np.arange(columns, dtype=np.float64) + 0.5) * (self.sides[0] / columns)

    @property
    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns x of the columns' edges, west to east, and y of the rows' edges, north to south."""
        (rows, columns), (west, south, east, north) = self.shape, self.box
        return np.linspace(west, east, columns + 1), np.linspace(north, south, rows + 1)

    @property
    def coarser(self) -> "GridSpec":
        """Returns the grid with cells of two by two of this grid's cells."""
        return replace(self, step=2 * self.step)

    def tiles(self) -> Iterator[Tile]:
        """Yields all tiles, row by row from the north-west."""
        rows, columns = self.shape
        for row in range(0, rows, self.tile):
            for column in range(0, columns, self.tile):
                yield Tile(row, column, min(self.tile, rows - row), min(self.tile, columns - column))

    def lonlat(self, tile: Tile) -> NDArray[np.float64]:
        """Returns a tile's cell centres, (rows, columns, 2) in degrees (lon, lat); NaN where the CRS has no place."""
        rows, columns = tile.window
        return self.plane.lonlat(np.stack(np.meshgrid(self.x[columns], self.y[rows]), axis=-1))


def around(region: Region, plane: Plane, step: float, overviews: int = 0) -> Box:
    """Returns the box of whole cells around a region, whose edges are multiples of the step.

    Args:
        region: The region.
        plane: The plane of the grid.
        step: Cell size in the units of the plane.
        overviews: How often the numbers of rows and columns can be halved.

    Raises:
        ValueError: No such box is on the globe.
    """
    west, south, east, north = region.box(plane)
    wide, high = ((-180.0, 540.0), (-90.0, 90.0)) if plane.is_geographic else ((-np.inf, np.inf),) * 2
    west, east = _snapped(west, east, step, 2**overviews, wide)
    south, north = _snapped(south, north, step, 2**overviews, high)
    return west, south, east, north


def _snapped(low: float, high: float, step: float, times: int, limits: tuple[float, float]) -> tuple[float, float]:
    """Returns the least whole number of steps, a multiple of `times`, around an interval and within limits."""
    first, last = np.floor(low / step + WHOLE), np.ceil(high / step - WHOLE)
    count = max(last - first, 1.0)
    count += -count % times
    first = min(first, np.floor(limits[1] / step + WHOLE) - count)
    if first * step < limits[0] - WHOLE:
        raise ValueError(
            f"{count:g} steps of {step:g} around the region do not fit the globe: give a step that divides 90, fewer "
            "overviews, or a box"
        )
    return round(float(first * step), 9), round(float((first + count) * step), 9)


def check_tile(cells: int) -> None:
    """Refuses a tile size that is not a multiple of the chunk size.

    Raises:
        ValueError: The tile size does not fit; the message has the two nearest that do.
    """
    chunk = min(CHUNK_CELLS, cells)
    if cells % chunk:
        raise ValueError(
            f"tile size {cells} is not a multiple of the chunk of {chunk} cells: two chunks would share "
            f"a shard's edge. Use {chunk * max(1, cells // chunk)} or {chunk * (cells // chunk + 1)}"
        )


def _is_whole(number: float) -> bool:
    return round(number) >= 1 and abs(number - round(number)) <= WHOLE * max(1, number)
