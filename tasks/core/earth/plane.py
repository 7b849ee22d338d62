"""Defines the plane of a grid: its coordinate reference system, and the way from and to longitude and latitude."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError

WGS84 = "EPSG:4326"
GLOBE = (-180.0, -90.0, 180.0, 90.0)
METRES_PER_DEGREE = 111_319.49  # metres of a degree at the equator of WGS84
BACK_M = 1.0  # metres; largest error of a place transformed to longitude and latitude and back

Float = NDArray[np.float64]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Plane:
    """A geographic CRS in degrees, or a projected one in metres: x to the east or right, y to the north or up."""

    crs: str = WGS84
    """CRS as pyproj reads it: a code such as EPSG:3035, or WKT."""

    def __post_init__(self) -> None:
        _parsed(self.crs)

    @property
    def definition(self) -> CRS:
        """Returns the CRS object, with names and attributes."""
        return _parsed(self.crs)

    @property
    def code(self) -> str | None:
        """Returns the code of the CRS, authority and number, or None."""
        code = self.definition.to_authority(min_confidence=100)
        return ":".join(code) if code else None

    @property
    def name(self) -> str:
        """Returns the code of the CRS, or WKT where it has none."""
        return self.code or self.definition.to_wkt()

    @property
    def is_geographic(self) -> bool:
        """Tells whether x and y are degrees of longitude and latitude."""
        return bool(self.definition.is_geographic)

    @property
    def has_lonlat(self) -> bool:
        """Tells whether x and y are longitude and latitude of WGS84, up to a shift of some metres."""
        first = self.definition.prime_meridian
        return self.is_geographic and not self.definition.is_derived and first is not None and first.longitude == 0

    @property
    def dims(self) -> tuple[str, str]:
        """Returns the names of the dimensions of y and x."""
        if self.is_geographic:
            return ("lat", "lon")
        return ("y", "x")

    @property
    def unit(self) -> str:
        """Returns the unit of x and y."""
        return "degree" if self.is_geographic else "m"

    @property
    def metres(self) -> float:
        """Returns the length of a unit in metres; of a degree at the equator."""
        if self.is_geographic:
            return METRES_PER_DEGREE
        return 1.0

    def lonlat(self, xy: Float) -> Float:
        """Returns places of the plane, (..., 2), in degrees (lon, lat); NaN where the CRS has no place on Earth."""
        if self.crs == WGS84:
            return xy
        lonlat = _moved(self.crs, WGS84, xy)
        if self.is_geographic:
            return lonlat
        away = np.abs(self.xy(lonlat) - xy).max(-1, keepdims=True)  # beyond its domain a CRS may give numbers
        return np.where(away < BACK_M, lonlat, np.nan)

    def xy(self, lonlat: Float) -> Float:
        """Returns degrees (lon, lat), (..., 2), as places of the plane; not finite where the plane has none."""
        if self.crs == WGS84:
            return lonlat
        return _moved(WGS84, self.crs, lonlat)

    def bounds(self, box: Box) -> Box:
        """Returns a box of the plane as west, south, east, north in degrees; west > east where it crosses 180.

        The shift of a geographic CRS against WGS84, some metres, is neglected.
        """
        if not self.is_geographic:
            found = _transformer(self.crs, WGS84).transform_bounds(*box)
            return found if np.isfinite(found).all() else GLOBE
        west, south, east, north = box
        if east - west >= 360:
            return -180.0, south, 180.0, north
        return (west + 180) % 360 - 180, south, 180 - (180 - east) % 360, north


@cache
def _parsed(crs: str) -> CRS:
    try:
        found = CRS.from_user_input(crs)
    except CRSError:
        raise ValueError(f"the CRS {crs!r} is unknown: give a code such as EPSG:4326 or EPSG:3035, or WKT") from None
    axes = found.axis_info
    units = {axis.unit_name for axis in axes}
    fits = (found.is_geographic and units == {"degree"}) or (found.is_projected and units == {"metre"})
    if not fits or len(axes) != 2 or "west" in {axis.direction for axis in axes}:
        raise ValueError(
            f"the CRS {crs!r} ({found.name}) has {', '.join(f'{a.name} in {a.unit_name}' for a in axes) or 'no axes'}: "
            "give a geographic one in degrees, or a projected one in metres to the east and north"
        )
    return found


@cache
def _transformer(source: str, target: str) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def _moved(source: str, target: str, xy: Float) -> Float:
    return np.stack(_transformer(source, target).transform(xy[..., 0], xy[..., 1]), axis=-1)
