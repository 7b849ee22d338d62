"""The patch store: image patches and their manifest. `create` below is the contract.

- `patches.zarr/pixels`: (patch, band, y, x) uint16, raw numbers in native UTM, 0 is nodata; one patch is one
  chunk, `shard` patches are one shard and one unit of work. Attributes: `bands`, `resolution_m`.
- `manifest.parquet`: GeoParquet, one row per patch in the same order (`MANIFEST` below).
- `card.json`: written last; what made the store and what was rejected.
"""

import io
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from infra import storage
from infra.errors import UserError
from tasks.cards import read_card
from tasks.core.radiometry import NODATA, to_reflectance

MANIFEST = {
    "row_id": "int64",  # index in the seed's stream of candidates: the same however many are asked for
    "lon": "float64",
    "lat": "float64",
    "item_id": "str",
    "catalog": "str",  # that the item came from: the first, or the one that stood in for it
    "collection": "str",
    "href": "str",  # of the item's first band, without its signed query
    "datetime": "str",
    "platform": "str",
    "baseline": "str",
    "offset": "int64",  # DN to add after masking nodata
    "offset_reason": "str",
    "clear_fraction": "float64",
    "saturated_fraction": "float64",
    "nodata_fraction": "float64",
    "dark_dn": "float64",  # first percentile of each pixel's darkest band
    "offset_check": "str",  # whether the numbers agree with the offset: agree, deny, silent
    "sha256": "str",  # of the patch's raw numbers, little-endian
}


@dataclass(frozen=True)
class Patches:
    """A finished patch store."""

    url: str
    """Where it lives."""
    card: dict[str, Any]
    """What made it."""
    manifest: gpd.GeoDataFrame
    """One row per patch."""
    bands: tuple[str, ...]
    """Names of the bands, in order."""

    def pixels(self, rows: slice) -> NDArray[np.uint16]:
        """Raw numbers (n, band, y, x)."""
        return _array(self.url, "r")[rows]

    def reflectance(self, rows: slice) -> NDArray[np.float32]:
        """Reflectance (n, band, y, x) in 0 to 1; NaN where there are no data."""
        return to_reflectance(self.pixels(rows), self.manifest["offset"].to_numpy()[rows])


def open_patches(url: str) -> Patches:
    """Opens a finished patch store.

    Raises:
        UserError: There is none at `url`.
    """
    card = read_card(url, "patches")
    manifest = gpd.read_parquet(io.BytesIO(storage.read(storage.join(url, "manifest.parquet"))))
    return Patches(url, card, manifest, tuple(_array(url, "r").attrs["bands"]))


def create(url: str, patches: int, bands: tuple[str, ...], pixels: int, resolution_m: float, shard: int) -> None:
    """Writes the empty store's metadata unless it is there."""
    if storage.exists(storage.join(url, "patches.zarr/pixels/zarr.json")):
        return
    group = zarr.open_group(storage.zarr_store(storage.join(url, "patches.zarr")), mode="a")
    group.create_array(
        "pixels",
        shape=(patches, len(bands), pixels, pixels),
        dtype="uint16",
        chunks=(1, len(bands), pixels, pixels),
        shards=(shard, len(bands), pixels, pixels),
        fill_value=NODATA,
        compressors=ZstdCodec(level=3),
        dimension_names=("patch", "band", "y", "x"),
        attributes={"bands": list(bands), "resolution_m": resolution_m},
    )


def write_shard(url: str, start: int, pixels: NDArray[np.uint16]) -> None:
    """Writes one whole shard of patches.

    Raises:
        UserError: The rows are not one whole shard.
    """
    array = _array(url, "r+")
    shard = array.shards[0]
    if start % shard or len(pixels) != min(shard, array.shape[0] - start):
        raise UserError(
            f"rows {start} to {start + len(pixels)} are not one whole shard of {shard} patches: two workers "
            "could write the same shard"
        )
    array[start : start + len(pixels)] = pixels


def write_manifest(url: str, rows: pd.DataFrame) -> None:
    """Writes the manifest as GeoParquet."""
    table = rows[list(MANIFEST)].astype(MANIFEST)
    places = gpd.points_from_xy(table.lon, table.lat, crs="EPSG:4326")
    buffer = io.BytesIO()
    gpd.GeoDataFrame(table, geometry=places).to_parquet(buffer)
    storage.write(storage.join(url, "manifest.parquet"), buffer.getvalue())


def _array(url: str, mode: Any) -> zarr.Array:
    return zarr.open_array(storage.zarr_store(storage.join(url, "patches.zarr/pixels")), mode=mode)
