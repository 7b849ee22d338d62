"""Encodes places by formulas without weights, as baselines: those that the RANGE paper compares with.

Each takes (n, 2) longitude and latitude in degrees and returns (n, d). `wrap` is from Mac Aodha et al. 2019, `theory`
from Mai et al. 2020 (Space2Vec), with the sizes of the RANGE paper's code.
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

FREQUENCIES, SHORTEST, LONGEST = 32, 1.0, 10_000.0  # of `theory`: number of wavelengths, and degrees
DIRECTIONS = np.radians([0.0, 120.0, 240.0])  # of `theory`: directions of the waves


def wrap(lonlat: Float) -> Float:
    """Returns cosine and sine of longitude and of latitude, (n, 4)."""
    lon, lat = np.radians(lonlat).T
    return np.column_stack([np.cos(lon), np.sin(lon), np.cos(lat), np.sin(lat)])


def waves(values: Float, count: int, shortest: float, longest: float) -> Float:
    """Returns sine and cosine of values over wavelengths in geometric steps, (..., count, 2)."""
    angles = values[..., None] / np.geomspace(shortest, longest, count)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1)


def theory(lonlat: Float) -> Float:
    """Returns waves along three directions at 120 degrees, (n, 192)."""
    along = lonlat @ np.stack([np.cos(DIRECTIONS), np.sin(DIRECTIONS)])
    return waves(along, FREQUENCIES, SHORTEST, LONGEST).swapaxes(1, 2).reshape(len(lonlat), -1)
