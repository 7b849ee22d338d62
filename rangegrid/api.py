"""Defines the public names of `rangegrid`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from numpy.typing import ArrayLike, NDArray

from infra import storage
from infra.addresses import as_url
from tasks.core.retrieval import BATCH
from tasks.params import EmbedParams
from tasks.points.embed import PointEmbedder, open_embedder
from tasks.points.sample_grid import open_grid as open_stored
from tasks.points.sample_grid import sample_grid

Interpolation = Literal["nearest", "bilinear"]


@dataclass(frozen=True)
class Field:
    """A field of embeddings: a checkpoint with the database that it encoded, loaded."""

    embedder: PointEmbedder
    """What embeds; not part of the public interface."""

    def embed(self, lonlat: ArrayLike) -> NDArray[np.float32]:
        """Returns the vectors of places.

        Args:
            lonlat: (n, 2) longitude and latitude in degrees, or one place.

        Returns:
            (n, d) float32.
        """
        return self.embedder.embed(lonlat)

    def encode(self, lon: ArrayLike, lat: ArrayLike, year: Any = None) -> NDArray[np.float32]:
        """Returns the vectors of places by two arrays of degrees, (n, d); the year has no influence."""
        return self.embed(np.column_stack([lon, lat]))


@dataclass(frozen=True)
class Grid:
    """A published grid of embeddings."""

    url: str
    """Path or URL of its Zarr."""

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        """Returns what the grid tells of itself: what it is made of, its CRS, its attribution."""
        return dict(zarr.open_group(storage.zarr_store(self.url), mode="r").attrs)

    def sample(self, lonlat: ArrayLike, interpolation: Interpolation = "nearest") -> NDArray[np.float32]:
        """Returns the stored vectors at places.

        Args:
            lonlat: (n, 2) longitude and latitude in degrees, or one place.
            interpolation: The cell that holds a place, or the weighted mean of four.

        Returns:
            (n, d) float32, NaN where the grid has none.
        """
        return sample_grid(self.url, lonlat, interpolation)

    def encode(self, lon: ArrayLike, lat: ArrayLike, year: Any = None) -> NDArray[np.float32]:
        """Returns the stored vectors by two arrays of degrees, (n, d), NaN where there are none."""
        return self.sample(np.column_stack([lon, lat]))

    def xarray(self) -> xr.Dataset:
        """Returns the grid as an xarray dataset, of which nothing is read before it is used."""
        return xr.open_zarr(storage.zarr_store(self.url), consolidated=False)


def load(checkpoint: str, database: str, method: str | None = None) -> Field:
    """Loads a field: `load("checkpoint", "database").embed([[2.35, 48.86]])`.

    Args:
        checkpoint: Directory or URL of the checkpoint, or a SatCLIP `.ckpt`.
        database: Directory or URL of the database, or a `range_db_*.npz`.
        method: Retrieval method, such as `range+`. None: multi-head.

    Raises:
        infra.errors.UserError: They are not there, or do not belong together.
    """
    params = EmbedParams() if method is None else EmbedParams.model_validate({"method": method})
    return Field(open_embedder(checkpoint, database, params, BATCH))


def open_grid(url: str) -> Grid:
    """Opens a published grid by path or URL, of the web too.

    Raises:
        infra.errors.UserError: There is none.
    """
    grid = Grid(as_url(url))
    open_stored(grid.url)
    return grid


def sample(grid: str, lonlat: ArrayLike, interpolation: Interpolation = "nearest") -> NDArray[np.float32]:
    """Returns a grid's vectors at places: `open_grid(grid).sample(lonlat, interpolation)`."""
    return open_grid(grid).sample(lonlat, interpolation)
