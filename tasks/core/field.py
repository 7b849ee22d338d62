"""Measures how fine a field of embeddings is: how much it changes over a distance, as a share of its variance.

The structure function D(s) = mean |v(x + s) - v(x)|^2 / (2 variance) is 0 at s = 0, and 1 where places have nothing in
common. Where neighbouring cells of a grid differ by less than a hundredth of the variance, a finer grid adds no detail.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.core.earth.sampling import draw_land
from tasks.core.earth.sphere import EARTH_RADIUS_KM, moved

PROBES = 250  # places on land, each with one neighbour at every distance
DISTANCES_KM = (25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 1600.0)
FINER = 0.01  # share of the variance; neighbouring cells that differ by less gain nothing from a finer grid
HALF = 0.5  # share of the variance at which `half_km` is read

Float = NDArray[np.float64]


def probe_places(distances_km: tuple[float, ...], count: int = PROBES, seed: int = 0) -> Float:
    """Returns places on land, each followed by its neighbours, (count, 1 + distances, 2) in degrees.

    Args:
        distances_km: Great-circle distances of the neighbours, each in a random direction.
        count: Number of places.
        seed: Seed of places and directions.
    """
    centres = draw_land(count, seed)
    bearings = np.random.default_rng(seed).uniform(0, 360, (count, len(distances_km)))
    return np.concatenate([centres[:, None], moved(centres[:, None], bearings, np.array(distances_km))], axis=1)


@dataclass(frozen=True)
class Change:
    """The structure function of one block of an embedding."""

    distances_km: tuple[float, ...]
    """Distances in km, rising."""
    shares: tuple[float, ...]
    """Share of the variance, one per distance."""

    @classmethod
    def of(cls, vectors: NDArray[np.float32], distances_km: tuple[float, ...]) -> "Change":
        """Measures the change from vectors at `probe_places`, (count, 1 + distances, d)."""
        vectors = vectors.astype(np.float64)
        at, near = vectors[:, :1], vectors[:, 1:]
        variance = ((at - at.mean(0)) ** 2).sum(-1).mean()
        moved = ((near - at) ** 2).sum(-1).mean(0)
        shares = moved / (2 * variance) if variance else np.zeros_like(moved)
        return cls(distances_km, tuple(round(float(share), 5) for share in shares))

    @property
    def half_km(self) -> float | None:
        """Returns the distance in km at which half of the variance is passed, or None beyond the distances."""
        beyond = next((i for i, share in enumerate(self.shares) if share >= HALF), None)
        if beyond is None:
            return None
        if beyond == 0:
            near, far = (0.0, self.distances_km[0])
        else:
            near, far = self.distances_km[beyond - 1 : beyond + 1]
        low = 0.0 if beyond == 0 else self.shares[beyond - 1]
        return round(near + (far - near) * (HALF - low) / (self.shares[beyond] - low), 1)


def kernel_width_km(temperature: float) -> float:
    """Returns the full width at half maximum of the kernel exp(t (cos d - 1)), in km."""
    if temperature > 0:
        half = np.arccos(max(-1.0, 1 - np.log(2) / temperature))
    else:
        half = np.pi
    return round(float(2 * half * EARTH_RADIUS_KM), 1)
