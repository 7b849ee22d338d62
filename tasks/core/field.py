"""Measures how fine a field of embeddings is: how much it changes over a distance, as a share of its variance.

The structure function D(s) = mean |v(x + s) - v(x)|^2 / (2 variance) is 0 at s = 0, and 1 where places have nothing in
common. Where neighbouring cells of a grid differ by less than a hundredth of the variance, a finer grid adds no detail.
The distance at which it passes a half is the field's effective resolution.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.core.earth.land import is_land
from tasks.core.earth.region import Region
from tasks.core.earth.sampling import draw_land
from tasks.core.earth.sphere import EARTH_RADIUS_KM, moved

PROBES = 250  # places on land, each with one neighbour at every distance
DISTANCES_KM = (25.0, 35.0, 50.0, 70.0, 100.0, 140.0, 200.0, 280.0, 400.0, 560.0, 800.0, 1100.0, 1600.0, 2200.0, 3200.0)
NEARER_KM = (1.0, 2.5, 5.0, 10.0, 16.0)  # looked at too in a region, whose images may be dense
DIRECTIONS = 32  # tried for each neighbour, until one leads to land: a grid's cells are there
FINER = 0.01  # share of the variance; neighbouring cells that differ by less gain nothing from a finer grid
HALF = 0.5  # share of the variance at which `half_km` is read
RESAMPLES, LEVEL = 1000, 0.95  # bootstrap samples of the places, and the share of them that the interval holds

Float = NDArray[np.float64]
Km = float | str  # a distance, or the text ">3200" where it is beyond the largest that was looked at


def probe_places(
    distances_km: tuple[float, ...], count: int = PROBES, seed: int = 0, region: Region | None = None
) -> Float:
    """Returns places on land, each followed by its neighbours, (count, 1 + distances, 2) in degrees.

    A neighbour is on land too, where any of its directions leads there.

    Args:
        distances_km: Great-circle distances of the neighbours, each in a random direction.
        count: Number of places.
        seed: Seed of places and directions.
        region: Where the places are, but not all of their neighbours; unset, everywhere.
    """
    centres = draw_land(count, seed, region=region)
    bearings = np.random.default_rng(seed).uniform(0, 360, (count, len(distances_km), DIRECTIONS))
    ends = moved(centres[:, None, None], bearings, np.array(distances_km)[:, None])
    first = is_land(ends).argmax(-1)[..., None, None]
    return np.concatenate([centres[:, None], np.take_along_axis(ends, first, axis=2)[:, :, 0]], axis=1)


@dataclass(frozen=True)
class Change:
    """The structure function of an embedding, or of one block of it."""

    distances_km: tuple[float, ...]
    """Distances in km, rising."""
    shares: tuple[float, ...]
    """Share of the variance, one per distance."""
    interval_km: tuple[Km, Km]
    """The 95 % interval of `half_km`, by resampling the places."""

    @classmethod
    def of(cls, vectors: NDArray[np.float32], distances_km: tuple[float, ...]) -> "Change":
        """Measures the change from vectors at `probe_places`, (count, 1 + distances, d)."""
        vectors = vectors.astype(np.float64)
        at, near = vectors[:, 0], vectors[:, 1:]
        squares = ((near - at[:, None]) ** 2).sum(-1)
        at = at - at.mean(0)
        shares = _shares(squares, at, np.ones((1, len(at))))[0]
        halves = half_distances(_shares(squares, at, _resampled(len(at))), distances_km)
        tail = (1 - LEVEL) / 2
        low, high = (_told(q, distances_km) for q in np.quantile(halves, [tail, 1 - tail], method="nearest"))
        return cls(distances_km, tuple(round(float(share), 5) for share in shares), (low, high))

    @property
    def half_km(self) -> Km:
        """Returns the distance in km at which half of the variance is passed: the effective resolution."""
        return _told(half_distances(np.array([self.shares]), self.distances_km)[0], self.distances_km)


def whole(blocks: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Returns the blocks of an embedding side by side, each with variance 1, so that none outweighs the others.

    Args:
        blocks: Vectors at `probe_places`, (count, 1 + distances, d) each.
    """
    return np.concatenate([_unit(block) for block in blocks], axis=-1)


def _unit(block: NDArray[np.float32]) -> NDArray[np.float32]:
    at = block[:, 0].astype(np.float64)
    deviation = np.sqrt(at.var(0).sum())
    return (block / (deviation or 1.0)).astype(np.float32)


def _resampled(count: int) -> Float:
    """Returns how often each place is in each sample with replacement, (samples, count)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def _shares(squares: Float, at: Float, times: Float) -> Float:
    """Returns the structure function of samples, (samples, distances); 0 where nothing varies.

    Args:
        squares: Squared change of each place over each distance.
        at: Vectors at the places, centred.
        times: How often each place is in each sample, (samples, places).
    """
    count = len(at)
    about = times @ (at**2).sum(1) / count - ((times @ at / count) ** 2).sum(1)
    variance = about / (1 - (times**2).sum(1) / count**2)  # of pairs of two places: a repeated one has no variance
    mean = times @ squares / count
    return np.divide(mean, 2 * variance[:, None], out=np.zeros_like(mean), where=variance[:, None] > 0)


def half_distances(shares: Float, distances_km: tuple[float, ...]) -> Float:
    """Returns the distances at which structure functions, (n, distances), first pass a half; inf beyond the largest.

    Between two distances a share is linear in their logarithm, below the first one in the distance.
    """
    after = (shares >= HALF).argmax(1)
    rows, before = np.arange(len(shares)), np.maximum(after - 1, 0)
    low, high = shares[rows, before], shares[rows, after]
    logs = np.log(distances_km)
    part = np.divide(HALF - low, high - low, out=np.zeros_like(low), where=high > low)
    within = np.exp(logs[before] + part * (logs[after] - logs[before]))
    first = distances_km[0] * HALF / np.maximum(high, HALF)
    return np.where((shares >= HALF).any(1), np.where(after > 0, within, first), np.inf)


def _told(km: float, distances_km: tuple[float, ...]) -> Km:
    """Returns a distance as it is told."""
    if np.isfinite(km):
        return round(float(km), 1)
    return f">{distances_km[-1]:g}"


def kernel_width_km(temperature: float) -> float:
    """Returns the full width at half maximum of the kernel exp(t (cos d - 1)), in km."""
    if temperature > 0:
        half = np.arccos(max(-1.0, 1 - np.log(2) / temperature))
    else:
        half = np.pi
    return round(float(2 * half * EARTH_RADIUS_KM), 1)
