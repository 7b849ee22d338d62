"""Lays out the levels of a compact product: the cells of a grid, and levels of half the rows and columns each.

A grid of longitude and latitude has one pyramid of levels. A projected one has two: its own cells, and in the group
`lonlat` what a map of the world shows, cells of degrees of about the same size, north up.
"""

from dataclasses import dataclass, replace

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.earth.plane import METRES_PER_DEGREE, Plane

CHUNK = 120  # cells along a side of a chunk
COARSEST = 240  # cells; a level whose sides have as many or fewer is the last: the first picture
SHOWN = "lonlat"  # group of the levels in degrees of a projected grid


@dataclass(frozen=True)
class Level:
    """The cells of one level, in the units of its CRS."""

    rows: int
    """Number of rows."""
    columns: int
    """Number of columns."""
    west: float
    """Western edge."""
    north: float
    """Northern edge."""
    wide: float
    """Width of a cell."""
    high: float
    """Height of a cell."""
    plane: Plane
    """The CRS."""
    pyramid: str = ""
    """Group of its pyramid; the first is the root."""
    times: int = 1
    """Cells of the finest level along a side of one of its cells."""

    @classmethod
    def own(cls, spec: GridSpec) -> "Level":
        """Returns the cells of a grid."""
        (rows, columns), (wide, high), (west, _, _, north) = spec.shape, spec.sides, spec.box
        return cls(rows, columns, west, north, wide / columns, high / rows, spec.plane)

    @classmethod
    def shown(cls, spec: GridSpec) -> "Level":
        """Returns cells of degrees, of about the size of a projected grid's."""
        west, south, east, north = spec.plane.bounds(spec.box)
        wide, high, side = (east - west) % 360 or 360.0, north - south, spec.step * spec.plane.metres
        rows, columns = (max(1, round(length * METRES_PER_DEGREE / side)) for length in (high, wide))
        return cls(rows, columns, west, north, wide / columns, high / rows, Plane(), SHOWN)

    @property
    def asset(self) -> str:
        """Returns its name within its pyramid, whose finest level is the pyramid's group itself."""
        return f"x{self.times}" if self.times > 1 else "."

    @property
    def path(self) -> str:
        """Returns the path of its group, "" of the root."""
        return "/".join(part for part in (self.pyramid, self.asset) if part not in ("", "."))

    def within(self, *names: str) -> str:
        """Returns the path of what its group holds."""
        return "/".join(part for part in (self.path, *names) if part)

    @property
    def coarser(self) -> "Level":
        """Returns the level with half the rows and columns, the odd ones beyond the edge."""
        halved = replace(self, rows=-(-self.rows // 2), columns=-(-self.columns // 2))
        return replace(halved, wide=2 * self.wide, high=2 * self.high, times=2 * self.times)

    @property
    def transform(self) -> list[float]:
        """Returns the affine transform, as the convention `spatial:` has it."""
        return [self.wide, 0.0, self.west, 0.0, -self.high, self.north]

    @property
    def affine(self) -> Affine:
        """Returns the transform as rasterio has it."""
        return Affine(*self.transform)

    @property
    def y(self) -> NDArray[np.float64]:
        """Returns the centres of its rows."""
        return self.north - np.arange(0.5, self.rows) * self.high

    @property
    def x(self) -> NDArray[np.float64]:
        """Returns the centres of its columns."""
        return self.west + np.arange(0.5, self.columns) * self.wide

    def tiles(self, side: int | None = None) -> list[Tile]:
        """Returns its parts of `side` by `side` cells; unset, its chunks."""
        side = side or CHUNK
        return [
            Tile(row, column, min(side, self.rows - row), min(side, self.columns - column))
            for row in range(0, self.rows, side)
            for column in range(0, self.columns, side)
        ]

    def centres(self, tile: Tile) -> NDArray[np.float64]:
        """Returns the centres of a chunk's cells, (rows, columns, 2) in the CRS."""
        rows, columns = tile.window
        return np.stack(np.meshgrid(self.x[columns], self.y[rows]), axis=-1)


def pyramid(finest: Level) -> list[Level]:
    """Returns a level and its coarser ones."""
    found = [finest]
    while max(found[-1].rows, found[-1].columns) > COARSEST:
        found.append(found[-1].coarser)
    return found


def pyramids(spec: GridSpec) -> list[list[Level]]:
    """Returns the levels of a grid's compact product, the finest of each pyramid first."""
    finest = [Level.own(spec)]
    if not spec.plane.has_lonlat:
        finest.append(Level.shown(spec))
    return [pyramid(level) for level in finest]
