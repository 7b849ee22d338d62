"""The global grid: north up, plate carrée on WGS84, in square tiles that are the units of publication."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tile:
    """A rectangle of cells, one Zarr shard of the stored grid."""

    row: int
    """First row of cells, counted from the north."""
    column: int
    """First column of cells, counted from 180 degrees west."""
    rows: int
    """Number of rows; fewer than the tile size at the southern edge."""
    columns: int
    """Number of columns; fewer than the tile size at the eastern edge."""

    @property
    def window(self) -> tuple[slice, slice]:
        """Slices of (lat, lon)."""
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)

    def __str__(self) -> str:
        return f"r{self.row:05d}-c{self.column:05d}"


@dataclass(frozen=True)
class GridSpec:
    """A regular grid of the whole Earth by cell centres."""

    step: float
    """Cell size in degrees; divides 180."""
    tile: int = 60
    """Cells along one side of a tile."""

    def __post_init__(self) -> None:
        if not 0 < self.step <= 45 or abs(180 / self.step - round(180 / self.step)) > 1e-9:
            raise ValueError(f"grid step {self.step} does not divide 180 degrees: use for example 1, 0.5 or 0.25")
        if self.tile < 1:
            raise ValueError(f"tile size {self.tile} is not positive: use for example 60")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        rows = round(180 / self.step)
        return rows, 2 * rows

    @cached_property
    def lat(self) -> NDArray[np.float64]:
        """Latitudes of the cell centres in degrees, from north to south."""
        return 90 - (np.arange(self.shape[0], dtype=np.float64) + 0.5) * (180 / self.shape[0])

    @cached_property
    def lon(self) -> NDArray[np.float64]:
        """Longitudes of the cell centres in degrees, from west to east."""
        return -180 + (np.arange(self.shape[1], dtype=np.float64) + 0.5) * (360 / self.shape[1])

    @property
    def coarser(self) -> "GridSpec":
        """The grid whose cells are two by two of this one's."""
        return GridSpec(2 * self.step, self.tile)

    def tiles(self) -> Iterator[Tile]:
        """All tiles, row by row from the north-west."""
        rows, columns = self.shape
        for row in range(0, rows, self.tile):
            for column in range(0, columns, self.tile):
                yield Tile(row, column, min(self.tile, rows - row), min(self.tile, columns - column))

    def lonlat(self, tile: Tile) -> NDArray[np.float64]:
        """Cell centres of a tile, (rows, columns, 2) in degrees (lon, lat)."""
        rows, columns = tile.window
        return np.stack(np.meshgrid(self.lon[columns], self.lat[rows]), axis=-1)
