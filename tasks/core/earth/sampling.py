"""Draws places to sample, as seeded streams.

The order of a stream depends on its seed alone, so that asking for more places extends it.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tasks.core.earth.land import has_land, is_land, land_km2
from tasks.core.earth.plane import Box, Plane
from tasks.core.earth.recurrence import recurrence, recurrence_in
from tasks.core.earth.region import Region
from tasks.core.earth.sphere import EARTH_RADIUS_KM

BLOCK = 4096  # places drawn at a time, always so many: the stream must not depend on how many are asked for
NEAR = 65_536  # places in the box around a region that are looked at at a time
MOST = 100_000_000  # places that are looked at before a region counts as too thin for its box
ZONE_DEGREES, BAND_DEGREES = 6.0, 8.0  # degrees of longitude of a UTM zone, and of latitude of an MGRS band
THIN = 3e-3  # share of the globe between two latitudes, below which a sequence over all of it takes long to meet them
TILES = 6  # most MGRS tiles that hold one place: two by two of its zone, and two of the next


def draw_land(
    n: int, seed: int, south: float = -80.0, north: float = 84.0, region: Region | None = None
) -> NDArray[np.float64]:
    """Returns the first `n` places of the seed's stream, uniform over the land area, each independent of the others.

    Longitude and the sine of latitude are uniform, and places off land are skipped. The same seed and a larger `n`
    extends the same places.

    Args:
        n: Number of places.
        seed: Seed of the stream.
        south: Southern limit in degrees; UTM, the grid of Sentinel-2, begins at -80.
        north: Northern limit in degrees; UTM ends at 84.
        region: Where to draw; unset, everywhere.

    Returns:
        (n, 2) in degrees (lon, lat).

    Raises:
        ValueError: There is no land between the limits.
    """
    west, low, east, high = _box(south, north, region)
    rng, box = np.random.default_rng(seed), (west, low, east, high)
    return _first_on_land(n, (uniform_places(rng, BLOCK, box) for _ in itertools.count()), south, north, region)


def draw_even(
    n: int, seed: int, south: float = -80.0, north: float = 84.0, region: Region | None = None
) -> NDArray[np.float64]:
    """Returns the first `n` places of a sequence that covers the land area evenly: no holes, and no clusters.

    An additive recurrence (`STEPS`) in longitude and the sine of latitude, which the seed shifts as a whole. It covers
    the globe, and limits and regions cut it as the sea does, so that a region has the places that the world has there;
    stretched to a narrow band, it would leave holes again. Arguments, result and errors are those of `draw_land`, and
    a larger `n` extends the same places here too.
    """
    shift = np.random.default_rng(seed).integers(0, 2**64, 2, dtype=np.uint64)
    if region is not None:
        blocks = _even_in(_box(south, north, region), shift)
        return _first_on_land(n, blocks, south, north, region)
    if np.ptp(np.sin(np.radians([south, north]))) / 2 < THIN:
        box = (-180.0, south, 180.0, north)
    else:
        box = (-180.0, -90.0, 180.0, 90.0)
    blocks = (_by_area(recurrence(start, BLOCK, shift), box) for start in itertools.count(0, BLOCK))
    return _first_on_land(n, (block[_between(block, south, north)] for block in blocks), south, north)


def _box(south: float, north: float, region: Region | None) -> Box:
    """Returns the box to draw in: between two latitudes, and around a region."""
    if region is None:
        return -180.0, south, 180.0, north
    west, low, east, high = region.box(Plane())
    return west, max(low, south), east, min(high, north)


def _even_in(box: Box, shift: NDArray[np.uint64]) -> Iterator[NDArray[np.float64]]:
    """Yields the places of the even sequence of the whole globe that lie in a box, in blocks."""
    west, south, east, north = box
    low, high = ((1 + np.sin(np.radians(edge))) / 2 for edge in (south, north))
    unit = ((west + 180) / 360, low, (east + 180) / 360, high)
    count = int(NEAR / ((unit[2] - unit[0]) * max(high - low, np.finfo(float).tiny)))
    for start in itertools.count(0, count):
        places = _by_area(recurrence_in(start, count, shift, unit), (-180.0, -90.0, 180.0, 90.0))
        yield places[_between(places, south, north)]


def _first_on_land(
    n: int,
    blocks: Iterator[NDArray[np.float64]],
    south: float,
    north: float,
    region: Region | None = None,
) -> NDArray[np.float64]:
    """Returns the first `n` places on land of blocks of places, (m, 2), that lie between two latitudes in a region."""
    check_land(south, north, region)
    found, there, seen = [np.empty((0, 2))], 0, 0
    while there < n:
        places = next(blocks)
        seen += len(places)
        if region is not None:
            places = places[region.holds(places)]
        found.append(places[is_land(places)])
        there += len(found[-1])
        if seen > MOST and there < n:
            raise ValueError(
                f"of {seen:,} places in the bounds of {region.name if region else 'the land'} {there:,} are on its "
                f"land, fewer than {n:,}: ask for fewer, or divide the region"
            )
    return np.concatenate(found)[:n]


def check_land(south: float, north: float, region: Region | None) -> None:
    """Refuses limits and regions without land.

    Raises:
        ValueError: It names them.
    """
    if region is not None and not land_km2(south, north, region):
        raise ValueError(
            f"the region {region.name} has no land between {south:g} and {north:g} degrees, by the land mask of 5 "
            "minutes: give another one, or widen it with --buffer-km"
        )
    if not has_land(south, north):
        raise ValueError(f"there is no land between {south} and {north} degrees: widen --south and --north")


def spaced(km: float, south: float, north: float, region: Region | None) -> int:
    """Returns how many even places lie about `km` apart: the land area over the square of the distance."""
    check_land(south, north, region)
    return max(1, round(land_km2(south, north, region) / km**2))


def _between(lonlat: NDArray[np.float64], south: float, north: float) -> NDArray[np.bool_]:
    """Tells which (n, 2) places lie between two latitudes."""
    return (south <= lonlat[:, 1]) & (lonlat[:, 1] <= north)


def uniform_places(
    rng: np.random.Generator, count: int, bounds: tuple[float, float, float, float]
) -> NDArray[np.float64]:
    """Draws places uniform by area within west, south, east and north in degrees, (count, 2)."""
    return _by_area(rng.random((count, 2)), bounds)


def _by_area(points: NDArray[np.float64], bounds: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """Spreads (n, 2) points of the unit square over a box, equal parts over equal areas; in degrees."""
    west, south, east, north = bounds
    low, high = np.sin(np.radians([south, north]))
    lon, sine = west + (east - west) * points[:, 0], low + (high - low) * points[:, 1]
    return np.column_stack([lon, np.degrees(np.arcsin(sine))])


def grid_zone(lonlat: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the UTM grid zone of each (n, 2) place as one number: places of a zone share scenes."""
    zone = np.minimum((lonlat[:, 0] + 180) // ZONE_DEGREES, 59)
    band = np.minimum((lonlat[:, 1] + 80) // BAND_DEGREES, 19)
    return (zone * 20 + band).astype(np.int64)


def draw_classes(
    n: int,
    seed: int,
    classes: NDArray[np.integer],
    bounds: tuple[float, float, float, float],
    south: float = -80.0,
    north: float = 84.0,
    region: Region | None = None,
) -> NDArray[np.float64]:
    """Returns the first `n` places of a stream that takes the classes of a raster in turn, each uniformly by area.

    Args:
        n: Number of places.
        seed: Seed of the stream.
        classes: (lat, lon), north up; 0 and less is no class.
        bounds: West, south, east, north of the raster in degrees.
        south: Southern limit in degrees. Pixels whose centre is beyond it are left out.
        north: Northern limit in degrees.
        region: Where to draw; unset, everywhere. Pixels whose centre is beyond it are left out too.

    Returns:
        (n, 2) in degrees (lon, lat).

    Raises:
        ValueError: The raster has no class between the limits.
    """
    west, bottom, east, top = bounds
    height, width = classes.shape
    size = np.array([(east - west) / width, (top - bottom) / height])
    centres = top - (np.arange(height) + 0.5) * size[1]
    classes = np.where(((south <= centres) & (centres <= north))[:, None], classes, 0)
    if region is not None:
        centre = west + (np.arange(width) + 0.5) * size[0]
        inside = region.holds(np.stack(np.meshgrid(centre, centres), axis=-1).reshape(-1, 2))
        classes = np.where(inside.reshape(classes.shape), classes, 0)
    names = np.unique(classes[classes > 0])
    if not len(names):
        where = f" in {region.name}" if region else ""
        raise ValueError(
            f"the class raster is 0 everywhere between {south} and {north} degrees{where}, which is no class: give one "
            "with classes above 0"
        )
    weights = np.cos(np.radians(centres))
    turns = -(-n // len(names))
    streams = []
    for name in names:
        rows, columns = np.nonzero(classes == name)
        cumulative = np.cumsum(weights[rows])
        rng = np.random.default_rng([seed, int(name)])
        u = rng.random((turns, 3))  # row by row: a longer stream begins with the shorter one
        pixel = np.searchsorted(cumulative, u[:, 0] * cumulative[-1])
        lon = west + (columns[pixel] + u[:, 1]) * size[0]
        low, high = (np.clip(top - (rows[pixel] + edge) * size[1], south, north) for edge in (1, 0))
        lat = high - u[:, 2] * (high - low)
        streams.append(np.column_stack([(lon + 180) % 360 - 180, lat]))
    return np.stack(streams, axis=1).reshape(-1, 2)[:n]


def thin(count: int, seed: int) -> NDArray[np.float64]:
    """Draws a number in 0 to 1 for each of the first `count` candidates, from a stream of its own.

    A candidate that `t` of at most `TILES` tiles cover is kept where its number is below `t / TILES`. Then every tile
    is equally likely, as in S2-100K: a place in six tiles is six times as likely as a place in one.
    """
    return np.random.default_rng([seed, 1]).random(count)


def square(lonlat: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the 100-km square, about one Sentinel-2 tile, of each (n, 2) place as one number."""
    zone = np.minimum((lonlat[:, 0] + 180) // ZONE_DEGREES, 59)
    meridian = zone * ZONE_DEGREES - 177
    east = np.radians(lonlat[:, 0] - meridian) * np.cos(np.radians(lonlat[:, 1])) * EARTH_RADIUS_KM
    north = np.radians(lonlat[:, 1]) * EARTH_RADIUS_KM
    return (zone * 10_000 + (east // 100 + 10) * 400 + north // 100 + 200).astype(np.int64)
