"""Defines a region: polygons on the Earth, and what lies in them, places and cells of grids."""

import hashlib
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from tasks.core.earth.plane import WGS84, Box, Plane
from tasks.core.earth.polygons import TURN, Float, Polygons, polygons_of, split, to_plane, united
from tasks.core.earth.sphere import EARTH_RADIUS_KM, KM_PER_DEGREE

CELLS_PER_DEGREE = 12  # of the lattice by which most places are told quickly, that of the land mask
FIRST = 64  # cells along a side of the blocks that are looked at first
TOUCH = 1e-6  # share of a cell; a smaller overlap is rounding
SHOWN = 10_000  # most vertices of the shape that cards and catalogs show; the product has them all beside it
FINEST, COARSEST = 0.005, 0.2  # degrees within which the shape is simplified
BLOCKS, BLOCK_DEGREES = 50, 10.0  # blocks of a region by default, and their largest side
SEMI_UTM = 4.5  # degrees to each side of a zone's meridian within which lengths are true to 0.3 %

Cells = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Region:
    """An area of the Earth's surface."""

    name: str
    """Its name, for titles: of countries, or of the file."""
    polygons: Polygons
    """Disjoint polygons in degrees within -180 and 180, with edges that are straight in longitude and latitude."""

    @classmethod
    def of(cls, name: str, geometry: dict[str, Any]) -> "Region":
        """Returns the region of a shape that `geometry` told."""
        return cls(name, polygons_of(shapely.geometry.shape(geometry)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """Returns 12 hexadecimal digits of the SHA-256 of the polygons."""
        content = shapely.to_wkb(shapely.normalize(shapely.multipolygons(self.polygons)))
        return hashlib.sha256(content).hexdigest()[:12]

    @cached_property
    def bounds(self) -> Box:
        """Returns west, south, east and north in degrees; west > east where that is the narrower way, across 180."""
        west, south, east, north = shapely.bounds(self.polygons).T
        order = np.argsort(west)
        last = np.maximum.accumulate(east[order])
        gaps = np.append(west[order][1:], west.min() + TURN) - last
        widest = int(gaps.argmax())
        if widest == len(gaps) - 1:
            return float(west.min()), float(south.min()), float(east.max()), float(north.max())
        return float(west[order][widest + 1]), float(south.min()), float(last[widest]), float(north.max())

    def box(self, plane: Plane) -> Box:
        """Returns its bounds in a plane; east goes on beyond 180 degrees where they cross it."""
        west, south, east, north = self.bounds
        if plane.crs == WGS84:
            return west, south, east + TURN * (east < west), north
        found = shapely.bounds(to_plane(self.polygons, plane))
        low, high = np.nanmin(found[:, :2], axis=0), np.nanmax(found[:, 2:], axis=0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    @cached_property
    def middle(self) -> tuple[float, float]:
        """Returns the middle of the bounds, in degrees (lon, lat)."""
        west, south, east, north = self.box(Plane())
        return ((west + east) / 2 + TURN / 2) % TURN - TURN / 2, (south + north) / 2

    @property
    def plane(self) -> Plane:
        """Returns the UTM zone that it fits in, else an equal-area plane around its middle."""
        (west, south, east, north), (lon, lat) = self.box(Plane()), self.middle
        zone = min(int((lon + 180) // 6), 59)
        if east - west <= 2 * SEMI_UTM - 2 * abs(lon - (zone * 6 - 177)) and south >= -80 and north <= 84:
            return Plane(f"EPSG:{32601 + zone if lat >= 0 else 32701 + zone}")
        return Plane(f"+proj=laea +lon_0={round(lon)} +lat_0={round(lat)} +datum=WGS84 +units=m +type=crs")

    @cached_property
    def _lattice(self) -> tuple[Cells, Cells]:
        """Returns which cells of the lattice of the globe it overlaps, and which lie whole in it; south to north."""
        x = np.linspace(-180, 180, 360 * CELLS_PER_DEGREE + 1)
        y = np.linspace(90, -90, 180 * CELLS_PER_DEGREE + 1)
        touched, whole = overlapped(self.pieces, x, y)
        return touched[::-1], whole[::-1]

    @property
    def touched(self) -> Cells:
        """Returns which cells of the lattice of the globe it overlaps, (lat, lon), from the south-west."""
        return self._lattice[0]

    @cached_property
    def shares(self) -> Float:
        """Returns the share of each cell of `touched`, in their order, that it covers, by area."""
        touched, whole = self._lattice
        row, column = np.nonzero(touched)
        shares = np.ones(len(row))
        part = np.flatnonzero(~whole[row, column])
        west, south = column[part] / CELLS_PER_DEGREE - 180, row[part] / CELLS_PER_DEGREE - 90
        boxes = shapely.box(west, south, west + 1 / CELLS_PER_DEGREE, south + 1 / CELLS_PER_DEGREE)
        cell, polygon = shapely.STRtree(self.pieces).query(boxes)
        pieces = shapely.intersection(boxes[cell], self.pieces[polygon])
        shares[part] = np.bincount(cell, shapely.area(_flat(pieces)), len(part)) / shapely.area(_flat(boxes))
        return shares

    @cached_property
    def area_km2(self) -> float:
        """Returns its area in km²."""
        row, _ = np.nonzero(self.touched)
        return float(cell_km2(row) @ self.shares)

    def block_degrees(self, count: int = BLOCKS) -> float:
        """Returns the side of blocks of which it has so many, in degrees: at most 10, in one digit."""
        side = np.sqrt(self.area_km2 / count) / KM_PER_DEGREE
        digits = 10.0 ** np.floor(np.log10(side))
        return float(np.clip(round(np.floor(side / digits) * digits, 6), 0.01, BLOCK_DEGREES))

    @cached_property
    def pieces(self) -> Polygons:
        """Returns its polygons in small pieces, cut along whole degrees."""
        return split(self.polygons)

    def holds(self, lonlat: Float) -> Cells:
        """Tells whether each (n, 2) place in degrees lies in it."""
        touched, whole = self._lattice
        row = np.clip(((lonlat[:, 1] + 90) * CELLS_PER_DEGREE).astype(int), 0, len(touched) - 1)
        column = np.floor((lonlat[:, 0] + 180) * CELLS_PER_DEGREE).astype(int) % touched.shape[1]
        found = whole[row, column]
        open_ = np.flatnonzero(touched[row, column] & ~found)
        lon, lat = (lonlat[open_, 0] + 180) % TURN - 180, lonlat[open_, 1]
        point, polygon = shapely.STRtree(self.pieces).query(shapely.points(lon, lat))
        order = np.argsort(polygon, kind="stable")
        which, first = np.unique(polygon[order], return_index=True)
        for number, points in zip(which, np.split(point[order], first)[1:], strict=True):
            inside = shapely.intersects_xy(self.pieces[number], lon[points], lat[points])
            found[open_[points[inside]]] = True
        return found

    def cells(self, plane: Plane, x: Float, y: Float) -> Cells:
        """Tells which cells of a grid it overlaps, (rows, columns).

        Args:
            plane: The grid's plane.
            x: Edges of the columns, rising.
            y: Edges of the rows, falling.
        """
        return overlapped(self._near(plane, (x[0], y[-1], x[-1], y[0])), x, y)[0]

    def _near(self, plane: Plane, box: Box) -> Polygons:
        """Returns its polygons in a plane, as far as they may lie in a box."""
        if plane.crs != WGS84:
            return to_plane(self._within(plane.bounds(box)), plane)
        west, _, east, _ = box
        turns = TURN * np.arange(np.floor((west + 180) / TURN), np.floor((east + 180) / TURN) + 1)
        return np.concatenate([shapely.transform(self.pieces, partial(np.add, (turn, 0.0))) for turn in turns])

    def _within(self, bounds: Box) -> Polygons:
        """Returns the pieces near bounds in degrees, west > east where they cross 180."""
        west, south, east, north = bounds
        spans = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
        tree, room = shapely.STRtree(self.pieces), 1.0  # degree
        boxes = [shapely.box(left - room, south - room, right + room, north + room) for left, right in spans]
        return self.pieces[np.unique(tree.query(boxes)[1])]

    @cached_property
    def geometry(self) -> dict[str, Any]:
        """Returns its shape as GeoJSON, simplified where it has many more than SHOWN vertices."""
        parts, tolerance = self.polygons, FINEST
        while shapely.get_num_coordinates(parts).sum() > SHOWN and tolerance < COARSEST:
            parts = shapely.simplify(parts, tolerance)
            tolerance *= 2
        shape = shapely.multipolygons(parts if parts is self.polygons else united(parts))
        return dict(shapely.geometry.mapping(shapely.orient_polygons(shape, exterior_cw=False)))


def cell_km2(row: NDArray[np.integer]) -> Float:
    """Returns the areas of cells of the lattice by their rows from the south."""
    low, high = (np.sin(np.radians((row + edge) / CELLS_PER_DEGREE - 90)) for edge in (0, 1))
    return EARTH_RADIUS_KM**2 * (high - low) * np.radians(1 / CELLS_PER_DEGREE)


def _flat(shapes: Polygons) -> Polygons:
    """Returns small shapes in a plane where areas are true: of longitude and the sine of latitude."""
    return shapely.transform(shapes, lambda xy: np.column_stack([np.radians(xy[:, 0]), np.sin(np.radians(xy[:, 1]))]))


def overlapped(polygons: Polygons, x: Float, y: Float) -> tuple[Cells, Cells]:
    """Tells which cells polygons overlap, and which lie whole in one of them, (rows, columns).

    Args:
        polygons: In the plane of the cells.
        x: Edges of the columns, rising.
        y: Edges of the rows, falling.
    """
    touched, whole = (np.zeros((len(y) - 1, len(x) - 1), bool) for _ in range(2))
    near = shapely.STRtree(polygons).query(shapely.box(x[0], y[-1], x[-1], y[0]))
    for polygon in polygons[np.sort(near)]:
        _mark(polygon, x, y, touched, whole)
    return touched, whole


def _mark(shape: shapely.Geometry, x: Float, y: Float, touched: Cells, whole: Cells) -> None:
    """Marks the cells of one shape: blocks of cells first, and of those at its edge the quarters, down to cells."""
    shapely.prepare(shape)
    side, (west, south, east, north) = FIRST, shape.bounds
    rows, columns = _spanned(-y, -north, -south, side), _spanned(x, west, east, side)
    row, column = (part.ravel() for part in np.meshgrid(rows, columns, indexing="ij"))
    while side and len(row):
        box = _boxes(x, y, row, column, side)
        meets = shapely.intersects(shape, box)
        row, column = row[meets], column[meets]
        full = shapely.covers(shape, box[meets])
        for i, j in zip(row[full], column[full], strict=True) if side > 1 else ():
            touched[i : i + side, j : j + side] = whole[i : i + side, j : j + side] = True
        if side == 1:
            touched[row, column] = True
            whole[row[full], column[full]] = True
        row, column, side = *_quartered(row[~full], column[~full], side // 2, touched.shape), side // 2


def _spanned(edges: Float, low: float, high: float, side: int) -> NDArray[np.intp]:
    """Returns the first cells of blocks that an interval spans, of cells with rising edges."""
    first, last = int(np.searchsorted(edges, low, "right")) - 1, int(np.searchsorted(edges, high))
    return np.arange(max(first, 0), min(last, len(edges) - 1), side)


def _boxes(x: Float, y: Float, row: NDArray[np.intp], column: NDArray[np.intp], side: int) -> Polygons:
    """Returns blocks of cells as boxes, a little smaller, so that what only touches an edge does not count."""
    right, low = np.minimum(column + side, len(x) - 1), np.minimum(row + side, len(y) - 1)
    less_x, less_y = TOUCH * (x[1] - x[0]), TOUCH * (y[0] - y[1])
    return shapely.box(x[column] + less_x, y[low] + less_y, x[right] - less_x, y[row] - less_y)


def _quartered(
    row: NDArray[np.intp], column: NDArray[np.intp], side: int, shape: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns the corners of the quarters of blocks, those within the grid."""
    rows = np.concatenate([row, row, row + side, row + side])
    columns = np.concatenate([column, column + side, column, column + side])
    inside = (rows < shape[0]) & (columns < shape[1])
    return rows[inside], columns[inside]
