"""Lays windows over assets: which pixels of an asset lie under each, whatever the asset's format."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.windows import Window

from infra.errors import UserError
from infra.imagery.tiffs import CorruptHeader

LARGEST_BLOCK = 1 << 28  # most bytes of a decoded tile, strip or chunk: a whole 10,980-pixel band takes 0.9 of it
NUMBERS = ("uint8", "uint16")  # types of the scene classification and the bands
NODATA = 0  # nodata in what is returned, whatever the file has
TOGETHER = 1 << 22  # most pixels that are read at once for several windows
TIE = 1e-4  # pixels; a place this near to an edge goes to the second pixel, despite rounding

Grid = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Columns and rows of the asset under each column and row of a window."""
Grids = Sequence[Grid | None]
Windows = list[NDArray | None]


class Frame(NamedTuple):
    """Where the pixels of an asset lie, and how they are stored."""

    crs: rasterio.CRS | None
    """CRS."""
    transform: Affine
    """From column and row to x and y."""
    shape: tuple[int, int]
    """Rows and columns."""
    block: tuple[int, int]
    """Rows and columns of a tile, strip or chunk."""
    dtypes: tuple[str, ...]
    """Type of each band."""

    @property
    def corner(self) -> tuple[float, float]:
        """Returns x and y of the upper left corner."""
        return self.transform.c, self.transform.f


def frame_of(source: rasterio.DatasetReader) -> Frame:
    """Returns the frame of an open file."""
    return Frame(source.crs or None, source.transform, source.shape, source.block_shapes[0], source.dtypes)


def check(frame: Frame) -> None:
    """Refuses what is no band of square pixels with north up, in tiles that can be decoded.

    Raises:
        CorruptHeader: It tells what is wrong.
    """
    if len(frame.dtypes) != 1 or frame.dtypes[0] not in NUMBERS or not frame.crs:
        raise CorruptHeader(f"bands: {', '.join(frame.dtypes)}, in {frame.crs or 'no CRS'}")
    grid = frame.transform
    if grid.b or grid.d or grid.a <= 0 or abs(grid.a + grid.e) > 1e-6 * grid.a:
        raise CorruptHeader(f"its pixels are not square with north up: {tuple(grid)[:6]}")
    check_block(frame)


def check_block(frame: Frame) -> None:
    """Refuses tiles that are too large to decode.

    Raises:
        CorruptHeader: It tells their size.
    """
    height, width = frame.block
    if height * width * np.dtype(frame.dtypes[0]).itemsize > LARGEST_BLOCK:
        raise CorruptHeader(f"its tiles have {width} x {height} pixels")


@dataclass(frozen=True)
class Places:
    """The windows to read."""

    lonlat: NDArray[np.float64]
    pixels: int
    resolution_m: float

    def grids(self, frame: Frame) -> list[Grid | None]:
        """Returns the pixels of an asset under each window, or None where a window crosses its edge.

        The windows' grid begins at the asset's own corner, which the bands of a scene share (`read_scene` holds them to
        it), and is reckoned from the corner and `resolution_m` alone: so a place gets the same window in every band.
        Every pixel takes the asset's that holds its centre.
        """
        factor = self._factor(frame.transform.a)
        x, y = _to_native(frame.crs).transform(self.lonlat[:, 0], self.lonlat[:, 1])
        left, top = frame.corner
        middles = np.column_stack([np.asarray(x) - left, top - np.asarray(y)]) / self.resolution_m
        corners = np.floor(middles - self.pixels / 2 + 0.5 + TIE)
        size = np.array(frame.shape[::-1]) * factor
        return [self._grid(corner, size, factor) for corner in corners]

    def _grid(self, corner: NDArray[np.float64], size: NDArray[np.intp], factor: int) -> Grid | None:
        if not ((corner >= 0) & (corner + self.pixels <= size)).all():  # also where a place has no coordinates
            return None
        columns, rows = ((int(start) + np.arange(self.pixels)) // factor for start in corner)
        return columns, rows

    def _factor(self, size_m: float) -> int:
        """Returns the pixels of a window along one side of a pixel of the asset."""
        ratio = size_m / self.resolution_m
        if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise UserError(
                f"an asset of {size_m:g} m pixels does not fit windows of {self.resolution_m:g} m pixels: its pixel "
                "size must be a whole multiple of that"
            )
        return round(ratio)


@lru_cache(maxsize=256)
def _to_native(crs: rasterio.CRS) -> Transformer:
    """Returns what projects degrees (lon, lat) to a CRS: to make one takes longer than to project many places."""
    return Transformer.from_crs(4326, crs, always_xy=True)


@dataclass(frozen=True)
class Layer:
    """The windows of one asset."""

    windows: Windows
    """The windows, one per place."""
    crs: rasterio.CRS
    """CRS of the asset."""
    corner: tuple[float, float]
    """The asset's upper left corner, x and y."""


def tiles_under(block: tuple[int, int], grids: Grids) -> set[tuple[int, int]]:
    """Returns column and row of the tiles of some rows and columns that lie under windows."""
    height, width = block
    return {
        tile
        for columns, rows in filter(None, grids)
        for tile in product(
            range(columns[0] // width, columns[-1] // width + 1), range(rows[0] // height, rows[-1] // height + 1)
        )
    }


def read_grids(source: rasterio.DatasetReader, grids: Grids) -> Windows:
    """Returns the pixels under each window: read at once where no other tile lies among theirs, else one by one.

    A read costs a fraction of a millisecond however small the window is, and a tile among theirs may not be there.
    """
    inside = [grid for grid in grids if grid is not None]
    if not inside:
        return [None] * len(grids)
    columns, rows = (np.sort(np.concatenate(axis)) for axis in zip(*inside, strict=True))
    is_small = (columns[-1] - columns[0] + 1) * (rows[-1] - rows[0] + 1) <= TOGETHER
    if is_small and tiles_under(source.block_shapes[0], [(columns, rows)]) == tiles_under(
        source.block_shapes[0], grids
    ):
        return _within(source, (columns, rows), grids)
    return [grid and _within(source, grid, [grid])[0] for grid in grids]


def _within(source: rasterio.DatasetReader, extent: Grid, grids: Grids) -> Windows:
    """Returns windows by one read of all from the first to the last pixel of an extent, which holds them."""
    columns, rows = extent
    data = source.read(1, window=Window.from_slices((rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)))
    return [grid and data[np.ix_(grid[1] - rows[0], grid[0] - columns[0])] for grid in grids]
