"""Where to sample: a seeded stream of places, uniform by area on land."""

import numpy as np
from numpy.typing import NDArray

from tasks.core.land import is_land

BLOCK = 4096  # draws at a time; the stream must not depend on how many places are asked for
ZONE_DEGREES, BAND_DEGREES = 6.0, 8.0


def draw_land(n: int, seed: int, south: float = -80.0, north: float = 84.0) -> NDArray[np.float64]:
    """The first `n` places of the seed's stream.

    Uniform by area: longitude and the sine of latitude are uniform, places off land are passed over. The same
    seed and a larger `n` extends the same places.

    Args:
        n: Number of places.
        seed: Seed of the stream.
        south: Southern limit in degrees; UTM, and with it Sentinel-2's grid, begins at -80.
        north: Northern limit in degrees; UTM ends at 84.

    Returns:
        (n, 2) in degrees (lon, lat).
    """
    rng = np.random.default_rng(seed)
    found: list[NDArray[np.float64]] = []
    low, high = np.sin(np.radians([south, north]))
    while sum(map(len, found)) < n:
        u = rng.random((BLOCK, 2))
        places = np.column_stack([360 * u[:, 0] - 180, np.degrees(np.arcsin(low + (high - low) * u[:, 1]))])
        found.append(places[is_land(places)])
    return np.concatenate(found)[:n] if found else np.empty((0, 2))


def grid_zone(lonlat: NDArray[np.float64]) -> NDArray[np.int64]:
    """The UTM grid-zone cell of each (n, 2) place as one number: neighbours share their scenes."""
    zone = np.minimum((lonlat[:, 0] + 180) // ZONE_DEGREES, 59)
    band = np.minimum((lonlat[:, 1] + 80) // BAND_DEGREES, 19)
    return (zone * 20 + band).astype(np.int64)
