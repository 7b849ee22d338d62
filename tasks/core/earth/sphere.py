"""Treats the Earth as a sphere: places as unit vectors, great circles, and the projection of the maps."""

import numpy as np
from numpy.typing import NDArray
from pyproj import Geod, Proj

Float = NDArray[np.float64]

EARTH_RADIUS_KM = 6371.0088  # mean radius of the Earth (IUGG)
KM_PER_DEGREE = EARTH_RADIUS_KM * np.pi / 180  # length of a degree of a great circle
SPHERE = Geod(a=1000 * EARTH_RADIUS_KM, b=1000 * EARTH_RADIUS_KM)
EQUAL_EARTH = Proj("+proj=eqearth +R=1 +over")  # `over`: 180 degrees east stay in the east


def unit_vectors(lonlat: Float) -> Float:
    """Returns places in degrees (lon, lat), (n, 2), as points of the unit sphere, (n, 3)."""
    lon, lat = np.radians(np.asarray(lonlat, np.float64)).T
    return np.column_stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])


def km_of(chord: Float) -> Float:
    """Returns great-circle distances in km from chords of the unit sphere."""
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chord / 2, 1))


def moved(lonlat: Float, bearings: Float, km: Float) -> Float:
    """Returns the ends of great circles.

    Args:
        lonlat: Where the circles begin, (..., 2) in degrees.
        bearings: Directions at the beginning, in degrees clockwise from north.
        km: Lengths of the circles.

    Returns:
        (..., 2) in degrees.
    """
    lon, lat, bearings, km = np.broadcast_arrays(lonlat[..., 0], lonlat[..., 1], bearings, km)
    east, north, _ = SPHERE.fwd(lon, lat, bearings, 1000 * km)
    return np.stack([east, north], axis=-1)


def equal_earth(lon: Float, lat: Float) -> tuple[Float, Float]:
    """Returns degrees in the Equal Earth projection (Savric, Patterson, Jenny 2018) of the unit sphere."""
    x, y = EQUAL_EARTH(lon, lat)
    return x, y
