"""The patch store: image patches and their manifest. `create` below is the contract.

- `patches.zarr/pixels`: (patch, band, y, x) uint16, raw numbers in native UTM, 0 is nodata; one patch is one
  chunk, `shard` patches are one shard and one unit of work. Attributes: `bands`, `resolution_m`.
- `manifest.parquet`: GeoParquet, one row per patch in the same order (`MANIFEST` below).
- `card.json`: written last; what made the store and what was rejected.

Beside them stays how it was made, in *parts* of one unit each, which are created once and never change:
`screen/<round>/<cell>.parquet` is the verdict on each place tried, `plan/<round>/<shard>.parquet` the places of a
shard's patches (of later rounds: of those that replace), `parts/<round>/<shard>.parquet` what was read of them.
"""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from infra import storage
from infra.bounds import open_parquet
from infra.errors import UserError
from tasks import arrays
from tasks.cards import read_card
from tasks.core.sentinel2.radiometry import NODATA_DN, to_reflectance

READS = 16  # parts read at a time
MOST_PATCHES, MOST_BANDS, MOST_PIXELS, MOST_SHARD = 10_000_000, 100, 2048, 100_000  # of a store that is read
FORGED = "it is damaged or forged. Sample again, or restore it"
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

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, band, y, x) of all of them."""
        return _pixels(self.url).open().shape

    def pixels(self, rows: slice) -> NDArray[np.uint16]:
        """Raw numbers (n, band, y, x)."""
        return read_rows(self.url, rows)

    def reflectance(self, rows: slice) -> NDArray[np.float32]:
        """Reflectance (n, band, y, x) in 0 to 1; NaN where there are no data."""
        return to_reflectance(self.pixels(rows), self.manifest["offset"].to_numpy()[rows])


def open_patches(url: str) -> Patches:
    """Opens a finished patch store.

    Raises:
        UserError: There is none at `url`, or it is no such store: memory is given by what it claims to be.
    """
    card, place = read_card(url, "patches"), storage.join(url, "manifest.parquet")
    manifest = io.BytesIO(data := storage.read(place))
    if hashlib.sha256(data).hexdigest() != card.get("manifest_sha256", hashlib.sha256(data).hexdigest()):
        raise arrays.damaged(place, "its digest is not that of the card")
    try:
        rows = open_parquet(manifest, place, len(data)).metadata.num_rows
    except UserError as error:
        raise UserError(f"{place} claims more rows than it can hold: {FORGED}") from error
    try:
        array = _pixels(url).open()
    except (KeyError, TypeError, ValueError) as error:  # Zarr's own, of metadata that contradict themselves
        raise UserError(f"{url} has no readable pixels ({error}): {FORGED}") from error
    bands = tuple(array.attrs.get("bands", ()))
    if not _sound(array, rows, len(bands)):
        raise UserError(
            f"{url} claims patches of {array.dtype} {array.shape} in shards of {array.shards} and chunks of "
            f"{array.chunks}, {rows:,} rows and {len(bands)} bands: {FORGED}"
        )
    return Patches(url, card, gpd.read_parquet(manifest), bands)


def _sound(array: zarr.Array, rows: int, bands: int) -> bool:
    """Whether a store is as `create` makes it, within what `tasks.params.SampleParams` allow."""
    if array.ndim != 4 or array.shards is None or array.dtype != np.uint16:
        return False
    patches, side = array.shape[0], array.shape[3]
    patch, most = (bands, side, side), (MOST_PATCHES, MOST_BANDS, MOST_PIXELS, MOST_SHARD)
    within = all(0 < size <= bound for size, bound in zip((patches, bands, side, array.shards[0]), most, strict=True))
    return within and array.shape == (rows, *patch) and array.chunks == (1, *patch) and array.shards[1:] == patch


def create(url: str, patches: int, bands: tuple[str, ...], pixels: int, resolution_m: float, shard: int) -> None:
    """Writes the empty store's metadata unless it is there."""
    patch = (len(bands), pixels, pixels)
    _pixels(url).create(
        (patches, *patch),
        dtype="uint16",
        chunks=(1, *patch),
        shards=(shard, *patch),
        fill_value=NODATA_DN,
        compressors=arrays.packed(ZstdCodec(level=3)),
        dimension_names=("patch", "band", "y", "x"),
        attributes={"bands": list(bands), "resolution_m": resolution_m},
    )


def write_shard(url: str, start: int, pixels: NDArray[np.uint16]) -> None:
    """Writes one whole shard of patches.

    Raises:
        UserError: The rows are not one whole shard, or the storage is full, forbidden or unreachable.
    """
    _pixels(url).write(start, pixels)


def read_rows(url: str, rows: slice) -> NDArray[np.uint16]:
    """Returns raw numbers (n, band, y, x) of a store that may be unfinished."""
    return _pixels(url).read(rows)


def digest(patch: NDArray[np.uint16]) -> str:
    """The manifest's `sha256` of a patch (band, y, x)."""
    return hashlib.sha256(patch.astype("<u2").tobytes()).hexdigest()


def write_manifest(url: str, rows: pd.DataFrame) -> str:
    """Writes the manifest as GeoParquet; returns its SHA-256, for the card."""
    table = rows[list(MANIFEST)].astype(MANIFEST)
    places = gpd.points_from_xy(table.lon, table.lat, crs="EPSG:4326")
    storage.write(storage.join(url, "manifest.parquet"), data := _parquet(gpd.GeoDataFrame(table, geometry=places)))
    return hashlib.sha256(data).hexdigest()


def part(url: str, kind: str, number: int, unit: int) -> str:
    """Where the part of a unit lies: `kind` is `screen`, `plan` or `parts`, `number` the round."""
    return storage.join(url, kind, str(number), f"{unit:05d}.parquet")


def held(url: str, number: int) -> str:
    """Where the pixels of a round's incomplete shards wait: a patch store without manifest, deleted at the end."""
    return storage.join(url, "held", str(number))


def create_part(url: str, kind: str, number: int, unit: int, table: pd.DataFrame) -> None:
    """Stores a unit's part, unless another run has stored its own: the first one counts for both."""
    storage.create(part(url, kind, number, unit), _parquet(table))


def read_part(url: str, kind: str, number: int, unit: int, columns: list[str] | None = None) -> pd.DataFrame:
    """The part of a unit, or some columns of it."""
    return read_table(part(url, kind, number, unit), columns)


def read_table(url: str, columns: list[str] | None = None) -> pd.DataFrame:
    """The part at a URL, or some columns of it.

    Raises:
        Damaged: Its bytes are not those that were written.
    """
    data = storage.read(url)
    try:
        return open_parquet(io.BytesIO(data), url, len(data)).read(columns=columns).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise arrays.damaged(url, error) from error


def read_parts(url: str, kind: str, number: int, units: list[int], columns: list[str]) -> list[pd.DataFrame]:
    """Columns of the parts of many units, in their order."""
    with ThreadPoolExecutor(READS) as pool:
        return list(pool.map(lambda unit: read_part(url, kind, number, unit, columns), units))


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, write_page_checksum=True)
    return buffer.getvalue()


def _pixels(url: str) -> arrays.Table:
    return arrays.Table(storage.join(url, "patches.zarr/pixels"))
