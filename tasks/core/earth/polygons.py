"""Makes polygons on the Earth plain ones of a map from -180 to 180 degrees: cut there, closed by a pole, or widened.

An edge is straight in longitude and latitude. An edge over more than 180 degrees is taken the short way, across 180,
except one from -180 to 180 itself. A ring around a pole holds the one that is nearer to it.
"""

from functools import lru_cache

import numpy as np
import shapely
import shapely.affinity
from numpy.typing import NDArray
from pyproj import Transformer

from tasks.core.earth.plane import WGS84, Plane

Polygons = NDArray[np.object_]  # of shapely
Float = NDArray[np.float64]

TURN = 360.0
EARTH = shapely.box(-180, -90, 180, 90)
MANY = 500  # vertices of a polygon that is worth splitting
SLIT_M = 1.0  # metres to each side of the meridian of 180 degrees that a shape is cut along
SEAM = 2e-5  # degrees of a great circle; twice as far as the slit reaches
BENT_M = 5000.0  # metres; a longer edge of a plane gets vertices between, since it is bent in longitude and latitude
BENT_DEGREES = 0.1  # the same of an edge that is straight in these
PIECE = 10.0  # degrees; side of the pieces that are widened one by one, each in a plane around it
STRAIGHT = 0.5  # degrees; longest edge of a piece before it goes to that plane


class Crossed(ValueError):
    """A polygon crosses itself; the message says where."""


def cut(shapes: Polygons) -> Polygons:
    """Returns the polygons of shapes in degrees, within -180 and 180; beyond these, and across, they are cut.

    Raises:
        Crossed: A polygon crosses itself.
    """
    parts = shapely.get_parts(shapes)
    across = _across(parts)
    whole = parts[~across]
    check_simple(whole)
    pieces = [piece for polygon in parts[across] for piece in _cut(polygon)]
    return np.concatenate([whole, np.array(pieces, object)]) if pieces else whole


def check_simple(polygons: Polygons) -> None:
    """Refuses polygons that cross themselves.

    Raises:
        Crossed: It says where the first one does.
    """
    bad = ~shapely.is_valid(polygons)
    if bad.any():
        raise Crossed(str(shapely.is_valid_reason(polygons[bad.argmax()])))


def _across(polygons: Polygons) -> NDArray[np.bool_]:
    """Tells which polygons go across or beyond 180 degrees, by their edges."""
    xy, of = shapely.get_coordinates(shapely.get_rings(polygons), return_index=True)
    _, owner = shapely.get_rings(polygons, return_index=True)
    across = np.zeros(len(polygons), bool)
    if len(xy):
        jumps = np.abs(np.diff(xy[:, 0]))
        far = (of[1:] == of[:-1]) & (jumps > TURN / 2) & (jumps < TURN)
        across[owner[of[1:][far]]] = True
        across[owner[of[np.abs(xy[:, 0]) > TURN / 2]]] = True
    return across


def _cut(polygon: shapely.Polygon) -> Polygons:
    """Returns the pieces of one polygon: its outer ring cut, less its holes cut."""
    outer = _wrapped(shapely.get_coordinates(polygon.exterior))
    holes = [_wrapped(shapely.get_coordinates(ring)) for ring in polygon.interiors]
    found = shapely.difference(outer, shapely.union_all(holes)) if holes else outer
    return polygons_of(found)


def polygons_of(shape: shapely.Geometry) -> Polygons:
    """Returns the polygons of a shape that have an area."""
    parts = shapely.get_parts(shapely.get_parts(np.array([shape])))
    return parts[(shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & (shapely.area(parts) > 0)]


def _wrapped(ring: Float) -> shapely.Geometry:
    """Returns what a ring, (n, 2), encloses, within -180 and 180."""
    steps = np.diff(ring[:, 0])
    steps = np.where(np.abs(steps) == TURN, steps, (steps + TURN / 2) % TURN - TURN / 2)
    lon = ring[0, 0] + np.concatenate([[0.0], np.cumsum(steps)])
    line = np.column_stack([lon, ring[:, 1]])
    if abs(lon[-1] - lon[0]) > TURN / 2:
        return _around_pole(line)
    shape = shapely.polygons(line)
    check_simple(np.array([shape]))
    first, last = np.floor((np.array([lon.min(), lon.max()]) + TURN / 2) / TURN).astype(int)
    turned = [shapely.affinity.translate(shape, -TURN * turn) for turn in range(first, last + 1)]
    return shapely.union_all(shapely.intersection(turned, EARTH))


def _around_pole(line: Float) -> shapely.Geometry:
    """Returns what a line once around the Earth, (n, 2), encloses with the nearer pole, within -180 and 180."""
    turn = line[-1] - line[0]
    several = np.concatenate([line[:-1] + turn * times for times in range(-2, 3)])  # so that no end is within 180
    if not shapely.is_simple(shapely.linestrings(several)):
        raise Crossed("Self-intersection of a ring around a pole")
    pole = np.copysign(90.0, line[:, 1].mean())
    whole = np.concatenate([several, [[several[-1, 0], pole], [several[0, 0], pole]]])
    return shapely.intersection(shapely.make_valid(shapely.polygons(whole)), EARTH)


def from_plane(shapes: Polygons, crs: str) -> Polygons:
    """Returns the polygons of shapes of a projected CRS in degrees, cut at 180.

    Raises:
        Crossed: A polygon crosses itself.
        ValueError: They lie where the CRS has no places on Earth.
    """
    parts = shapely.get_parts(shapes)
    check_simple(parts)
    parts = shapely.segmentize(parts, BENT_M)
    moved = _moved(parts, crs, WGS84)
    if not np.isfinite(shapely.get_coordinates(moved)).all():
        raise ValueError("they lie beyond what their CRS shows")
    across = _across(moved)
    if across.any():
        slit = _slit(crs, shapely.total_bounds(parts[across]))
        pieces = [piece for part in shapely.difference(parts[across], slit) for piece in polygons_of(part)]
        apart = shapely.transform(_moved(np.array(pieces, object), crs, WGS84), _closed)
        moved = np.concatenate([moved[~across], apart])
    return shapely.make_valid(moved)


def _closed(lonlat: Float) -> Float:
    """Returns vertices with those beside the slit at 180 degrees, and those around the pole there."""
    lon, lat = lonlat.T
    polar = 90 - np.abs(lat) < SEAM
    beside = ~polar & ((TURN / 2 - np.abs(lon)) * np.cos(np.radians(lat)) < SEAM)
    lon = np.where(beside, np.copysign(TURN / 2, lon), lon)
    return np.column_stack([lon, np.where(polar, np.copysign(90.0, lat), lat)])


def _slit(crs: str, bounds: Float) -> shapely.Geometry:
    """Returns a thin strip of a plane along the meridian of 180 degrees with the poles, as far as it is near bounds.

    Without it, nothing of the plane goes across 180 degrees or around a pole.
    """
    lat = np.linspace(-90, 90, 18_001)
    line = _project(WGS84, crs, np.column_stack([np.full(len(lat), 180.0), lat]))
    line = line[np.isfinite(line).all(1)]
    west, south, east, north = bounds
    room = max(east - west, north - south)
    edges = np.stack([line[:-1], line[1:]], axis=1)
    low, high = edges.min(1), edges.max(1)
    near = (high > [west - room, south - room]).all(1) & (low < [east + room, north + room]).all(1)
    return shapely.buffer(shapely.union_all(shapely.linestrings(edges[near])), SLIT_M, cap_style="square")


def _moved(shapes: Polygons, source: str, target: str) -> Polygons:
    return shapely.transform(shapes, lambda xy: _project(source, target, xy))


def _project(source: str, target: str, xy: Float) -> Float:
    return np.column_stack(_transformer(source, target).transform(xy[:, 0], xy[:, 1]))


@lru_cache(maxsize=64)
def _transformer(source: str, target: str) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def to_plane(polygons: Polygons, plane: Plane) -> Polygons:
    """Returns polygons in degrees as shapes of a plane; those that have no place there are left out."""
    moved = shapely.transform(shapely.segmentize(polygons, BENT_DEGREES), plane.xy)
    edge, of = shapely.get_coordinates(moved, return_index=True)
    lost = np.unique(of[~np.isfinite(edge).all(1)])
    return shapely.make_valid(np.delete(moved, lost))


def united(polygons: Polygons) -> Polygons:
    """Returns the union of polygons as disjoint ones."""
    return polygons_of(shapely.union_all(polygons))


def widened(polygons: Polygons, km: float) -> Polygons:
    """Returns polygons with all that is within a great-circle distance of them."""
    return united(np.concatenate([_widened(piece, km) for piece in split(polygons, side=PIECE)]))


def split(polygons: Polygons, side: float = np.inf) -> Polygons:
    """Returns polygons in pieces, cut along whole degrees, of which each is quickly compared with others.

    Args:
        polygons: In degrees.
        side: Longest side of a piece in degrees; one of many vertices is shorter.
    """
    done, left = [], list(polygons)
    while left:
        polygon = left.pop()
        west, south, east, north = polygon.bounds
        long = max(east - west, north - south)
        if long <= 1 or (long <= side and shapely.get_num_coordinates(polygon) <= MANY):
            done.append(polygon)
        elif east - west == long:
            middle = round((west + east) / 2)
            left += _clipped(polygon, (west, south, middle, north), (middle, south, east, north))
        else:
            middle = round((south + north) / 2)
            left += _clipped(polygon, (west, south, east, middle), (west, middle, east, north))
    return np.array(done, object)


def _clipped(polygon: shapely.Polygon, *boxes: tuple[float, float, float, float]) -> list[shapely.Polygon]:
    return [piece for box in boxes for piece in polygons_of(shapely.intersection(polygon, shapely.box(*box)))]


def _widened(piece: shapely.Polygon, km: float) -> Polygons:
    """Returns a small polygon widened in a plane that is true to distances from its middle, in degrees."""
    west, south, east, north = piece.bounds
    plane = f"+proj=aeqd +lon_0={(west + east) / 2} +lat_0={(south + north) / 2} +datum=WGS84 +type=crs"
    near = _moved(np.array([shapely.segmentize(piece, STRAIGHT)]), WGS84, plane)
    return from_plane(shapely.buffer(shapely.make_valid(near), 1000 * km, quad_segs=32), plane)
