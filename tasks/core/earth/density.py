"""Estimates how much land each of some places stands for, where nothing tells by which design they were chosen."""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from tasks.core.earth.land import is_land
from tasks.core.earth.plane import GLOBE
from tasks.core.earth.sampling import uniform_places
from tasks.core.earth.sphere import unit_vectors

NEAREST = 16  # places by which density is told: of places at random, to 1 / sqrt(16) of it
SPREAD = 1 << 18  # points over the globe, one on 1,950 km², by which the share of land about a place is told
LEAST = 64  # points about a place that tell it
SHORE = 0.05  # least share of land about a place, which is on land itself
CLOSEST = 1e-5  # of the Earth's radius, 64 m: places are not taken to be denser

Float = NDArray[np.float64]


def land_shares(lonlat: Float) -> Float:
    """Returns how much land each place stands for, (n,), of mean 1: the land among its NEAREST places, by their number.

    Args:
        lonlat: (n, 2) degrees.
    """
    points, count = unit_vectors(lonlat), min(NEAREST, len(lonlat) - 1)
    if count < 1:
        return np.ones(len(lonlat))
    chords = cKDTree(points).query(points, k=[count + 1])[0][:, 0].clip(min=CLOSEST)
    found = chords**2 * _land_about(points, np.maximum(chords, 2 * np.sqrt(LEAST / SPREAD)))
    return found / found.mean()


def _land_about(points: Float, chords: Float) -> Float:
    """Returns the share of land within chords of points of the unit sphere, (n,)."""
    spread = uniform_places(np.random.default_rng(0), SPREAD, GLOBE)
    land, every = (unit_vectors(some) for some in (spread[is_land(spread)], spread))
    on_land, all_ = (cKDTree(some).query_ball_point(points, chords, return_length=True) for some in (land, every))
    return np.maximum(on_land / np.maximum(all_, 1), SHORE)
