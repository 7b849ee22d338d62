"""Stores image patches and their manifest. `create` below is the contract.

- `patches.zarr/pixels`: (patch, band, y, x) uint16, raw pixel values in native UTM, 0 is nodata. One patch is one
  chunk; `shard` patches are one shard and one unit of work. Attributes: `bands`, `resolution_m`.
- `manifest.parquet`: GeoParquet, one row per patch in the same order (`MANIFEST` below).
- `card.json`: written last, with what made the store and what was rejected.

Beside them stays how the store was made, in *parts* of one unit each, which are created once and never change.
`screen/<round>/<cell>.parquet` has the verdict on each place tried. `plan/<round>/<shard>.parquet` has the places of a
shard's patches; those of later rounds replace others. `parts/<round>/<shard>.parquet` has the result of reading them.
"""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
from tasks.products import PatchesCard

READS = 16  # parts read at a time
MOST_PATCHES, MOST_BANDS, MOST_PIXELS, MOST_SHARD = 10_000_000, 100, 2048, 100_000  # bounds of a store that is read
FORGED = "it is damaged or forged. Sample again, or restore it"
MANIFEST = {
    "row_id": "int64",  # index in the seed's stream of candidates, whatever the size of the sample
    "lon": "float64",
    "lat": "float64",
    "item_id": "str",
    "catalog": "str",  # the catalog that the item came from: the first, or the fallback
    "collection": "str",
    "href": "str",  # URL of the item's first band, without its signed query
    "datetime": "str",
    "platform": "str",
    "baseline": "str",
    "offset": "int64",  # DN to add after masking nodata
    "offset_reason": "str",
    "clear_fraction": "float64",
    "saturated_fraction": "float64",
    "nodata_fraction": "float64",
    "dark_dn": "float64",  # first percentile of each pixel's darkest band
    "offset_check": "str",  # whether the pixels agree with the offset: agree, deny, silent
    "sha256": "str",  # digest of the patch's raw pixels, little-endian
}


@dataclass(frozen=True)
class Patches:
    """A finished patch store."""

    url: str
    """URL of the store."""
    card: PatchesCard
    """What the store is and how it was made."""
    manifest: gpd.GeoDataFrame
    """One row per patch."""
    bands: tuple[str, ...]
    """Names of the bands, in order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns (n, band, y, x) of all patches."""
        return _pixels(self.url).open().shape

    def pixels(self, rows: slice) -> NDArray[np.uint16]:
        """Returns raw pixels, (n, band, y, x)."""
        return read_rows(self.url, rows)

    def reflectance(self, rows: slice) -> NDArray[np.float32]:
        """Returns reflectance, (n, band, y, x) in 0 to 1; NaN for nodata."""
        return to_reflectance(self.pixels(rows), self.manifest["offset"].to_numpy()[rows])


def open_patches(url: str) -> Patches:
    """Opens a finished patch store.

    Raises:
        UserError: There is no store at `url`, or its metadata cannot be true: memory is taken by what they claim.
    """
    card, place = read_card(url, PatchesCard), storage.join(url, "manifest.parquet")
    manifest = io.BytesIO(data := storage.read(place))
    if card.manifest_sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise arrays.damaged(place, "its digest is not that of the card")
    try:
        rows = open_parquet(manifest, place, len(data)).metadata.num_rows
    except UserError as error:
        raise UserError(f"{place} claims more rows than it can hold: {FORGED}") from error
    try:
        array = _pixels(url).open()
    except (KeyError, TypeError, ValueError) as error:  # raised by Zarr for contradictory metadata
        raise UserError(f"{url} has no readable pixels ({error}): {FORGED}") from error
    bands = tuple(array.attrs.get("bands", ()))
    if not _sound(array, rows, len(bands)):
        raise UserError(
            f"{url} claims patches of {array.dtype} {array.shape} in shards of {array.shards} and chunks of "
            f"{array.chunks}, {rows:,} rows and {len(bands)} bands: {FORGED}"
        )
    return Patches(url, card, gpd.read_parquet(manifest), bands)


def _sound(array: zarr.Array, rows: int, bands: int) -> bool:
    """Tells whether a store is as `create` makes it, within the bounds of `tasks.params.SampleParams`."""
    if array.ndim != 4 or array.shards is None or array.dtype != np.uint16:
        return False
    patches, side = array.shape[0], array.shape[3]
    patch, most = (bands, side, side), (MOST_PATCHES, MOST_BANDS, MOST_PIXELS, MOST_SHARD)
    within = all(0 < size <= bound for size, bound in zip((patches, bands, side, array.shards[0]), most, strict=True))
    return within and array.shape == (rows, *patch) and array.chunks == (1, *patch) and array.shards[1:] == patch


def create(url: str, patches: int, bands: tuple[str, ...], pixels: int, resolution_m: float, shard: int) -> None:
    """Writes the metadata of an empty store, unless it exists."""
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
    """Returns the manifest's `sha256` of a patch (band, y, x)."""
    return hashlib.sha256(patch.astype("<u2").tobytes()).hexdigest()


def write_manifest(url: str, rows: pd.DataFrame) -> str:
    """Writes the manifest as GeoParquet, and returns its SHA-256 for the card."""
    table = rows[list(MANIFEST)].astype(MANIFEST)
    places = gpd.points_from_xy(table.lon, table.lat, crs="EPSG:4326")
    storage.write(storage.join(url, "manifest.parquet"), data := _parquet(gpd.GeoDataFrame(table, geometry=places)))
    return hashlib.sha256(data).hexdigest()


def part(url: str, kind: str, number: int, unit: int) -> str:
    """Returns the URL of a unit's part; `kind` is `screen`, `plan` or `parts`, `number` the round."""
    return storage.join(url, kind, str(number), f"{unit:05d}.parquet")


def held(url: str, number: int) -> str:
    """Returns the URL where pixels of a round's incomplete shards wait: a patch store without manifest.

    It is deleted at the end.
    """
    return storage.join(url, "held", str(number))


def create_part(url: str, kind: str, number: int, unit: int, table: pd.DataFrame) -> None:
    """Stores a unit's part, unless another run has stored one: the first one counts for both."""
    storage.create(part(url, kind, number, unit), _parquet(table))


def read_part(url: str, kind: str, number: int, unit: int, columns: list[str] | None = None) -> pd.DataFrame:
    """Returns the part of a unit, or some columns of it."""
    return read_table(part(url, kind, number, unit), columns)


def read_table(url: str, columns: list[str] | None = None) -> pd.DataFrame:
    """Returns the part at a URL, or some columns of it.

    Raises:
        Damaged: The bytes are not those that were written.
    """
    data = storage.read(url)
    try:
        return open_parquet(io.BytesIO(data), url, len(data)).read(columns=columns).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise arrays.damaged(url, error) from error


def read_parts(url: str, kind: str, number: int, units: list[int], columns: list[str]) -> list[pd.DataFrame]:
    """Returns columns of the parts of many units, in order."""
    with ThreadPoolExecutor(READS) as pool:
        return list(pool.map(lambda unit: read_part(url, kind, number, unit, columns), units))


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, write_page_checksum=True)
    return buffer.getvalue()


def _pixels(url: str) -> arrays.Table:
    return arrays.Table(storage.join(url, "patches.zarr/pixels"))
