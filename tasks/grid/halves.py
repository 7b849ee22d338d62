"""Finds what another beta changes in the components of a RANGE+ grid that kept its sums: they are linear in beta.

Of z = (vector - mean) @ axes that is (beta - the grid's) * slope, with slope = (semantic - geodesic half) @ axes of the
visual part.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from infra import storage
from tasks import arrays
from tasks.cards import SUMS, home_of
from tasks.core.earth.grid import GridSpec
from tasks.grid import store
from tasks.grid.leading import BLOCKS, CELLS, Leading, scales
from tasks.grid.previews import land_sample

SCALE = "beta_scale"


@dataclass(frozen=True)
class Halves:
    """The two halves of a RANGE+ grid, as its components tell of them."""

    sums: str
    """URL of the kept sums."""
    beta: float
    """Share of the semantic half in the grid."""
    slope: Leading
    """By which semantic less geodesic half, (values, ...), becomes the slope of each component."""

    @classmethod
    def of(cls, grid: str, url: str, attrs: dict[str, Any], leading: Leading, most: int) -> "Halves | None":
        """Returns the halves of a grid, None where it has no sums of two halves.

        Args:
            grid: URL of the grid's Zarr.
            url: URL of its compact product, which an earlier run may have begun.
            attrs: The grid's attributes.
            leading: The components of the product.
            most: Components that have a slope.
        """
        made_of, sums = attrs.get("rangegrid:made_of", {}), storage.join(home_of(grid), SUMS)
        two = made_of.get("method") == "range+" and made_of.get("beta", 1) < 1  # of 1 only the semantic half is kept
        if not (two and made_of.get("keep_sums") and storage.exists(storage.join(sums, store.ROOT))):
            return None
        begun, known = (storage.exists(storage.join(url, name, store.ROOT)) for name in ("scale", SCALE))
        if begun and not known:  # by an earlier version, so that chunks without slopes are there
            return None
        axes = leading.axes[slice(*attrs["geoemb:blocks"]["visual"]), :most]
        scale = _stored(url) if known else _found(sums, store.open_spec(grid), axes)
        return cls(sums, made_of["beta"], Leading(np.zeros(len(axes), np.float32), axes, scale, leading.kept[:most]))

    def encode(self, sums: NDArray[np.float32]) -> NDArray[np.int8]:
        """Returns the codes of the slopes, (components, ...), of kept sums (sum, ...)."""
        return self.slope.encode(apart(sums))


def apart(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns semantic less geodesic half, (values, ...), of kept sums (sum, ...)."""
    semantic, geodesic = (half[:-2] / half[-2] for half in np.split(sums, 2))
    return semantic - geodesic


def _stored(url: str) -> NDArray[np.float32]:
    array = zarr.open_array(storage.zarr_store(storage.join(url, SCALE)), mode="r", zarr_format=3)
    return arrays.read(array, ...)


def _found(sums: str, spec: GridSpec, axes: NDArray[np.float32]) -> NDArray[np.float32]:
    sample = land_sample(store.open_vectors(sums, store.SUMS), spec, BLOCKS, CELLS)
    return scales(apart(sample.T).T @ axes)
