"""Catalogs without a server: a stac-geoparquet file or an item collection, at a path, `file://` or `s3://`."""

import copy
import io
import json
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from stac_geoparquet.arrow import stac_table_to_items

from infra import storage
from infra.errors import CatalogUnavailable, UserError

PARQUET, JSON = (".parquet", ".geoparquet"), (".json", ".geojson")


class Items(NamedTuple):
    """The items of a file, as they are there: turning all of a large file into objects would take too long."""

    rows: pa.Table | list[Any]
    """Rows of stac-geoparquet, or features."""
    collection: NDArray[np.str_]
    """Collection of each."""
    bounds: NDArray[np.float64]
    """(n, 4): west, south, east, north of each geometry as it is written; NaN where there is none."""

    def at(self, keep: NDArray[np.bool_]) -> list[Any]:
        """Some of them as features."""
        if isinstance(self.rows, pa.Table):
            return list(stac_table_to_items(self.rows.filter(pa.array(keep))))
        return [copy.deepcopy(feature) for feature, kept in zip(self.rows, keep, strict=True) if kept]


def is_file(url: str) -> bool:
    """Whether a catalog is a file rather than an API."""
    return urlsplit(url).scheme not in ("http", "https")


def search_file(url: str, lonlat: NDArray[np.float64]) -> list[Any]:
    """The features whose bounds hold any of the points, and all that are wider than half the Earth.

    Args:
        url: Path, `file://` or `s3://`.
        lonlat: (n, 2) points in degrees.

    Raises:
        CatalogUnavailable: There is no such file, or it cannot be reached.
        UserError: It holds no items.
    """
    items = open_file(url)
    west, south, east, north = items.bounds.T
    keep = ~(east - west <= 180) | (west < -180) | (east > 180)  # where there is no geometry too, to be counted
    for lon, lat in lonlat:
        keep |= (west <= lon) & (lon <= east) & (south <= lat) & (lat <= north)
    return items.at(keep)


def open_file(url: str) -> Items:
    """The items of a file, read once for as long as it does not change.

    Raises:
        CatalogUnavailable: There is no such file, or it cannot be reached.
        UserError: It holds no items.
    """
    place = storage.as_url(url)
    try:
        version = storage.version(place)
    except (FileNotFoundError, UserError) as error:
        raise CatalogUnavailable(f"no catalog can be read at {url} ({error}): check RANGEGRID_STAC_URL") from None
    return _opened(place, version)


@lru_cache(maxsize=2)
def _opened(url: str, version: str) -> Items:
    kind = PurePosixPath(urlsplit(url).path).suffix.lower()
    if kind not in PARQUET + JSON:
        raise UserError(f"{url} is no catalog: give a file that ends in {', '.join(PARQUET + JSON)}, or an API's URL")
    try:
        return _from_parquet(storage.read(url)) if kind in PARQUET else _from_json(storage.read(url))
    except (pa.ArrowException, KeyError, ValueError, TypeError, shapely.errors.ShapelyError) as error:
        raise UserError(
            f"{url} is no catalog ({type(error).__name__}): give stac-geoparquet, or a GeoJSON FeatureCollection of "
            "STAC items"
        ) from None


def _from_parquet(data: bytes) -> Items:
    table = pq.read_table(io.BytesIO(data))
    bounds = shapely.bounds(shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False)))
    return Items(table, table["collection"].to_numpy(zero_copy_only=False).astype(str), bounds)


def _from_json(data: bytes) -> Items:
    features = json.loads(data)["features"]
    shapes = [_shape(feature) for feature in features]
    collections = [str(feature.get("collection")) if isinstance(feature, dict) else "" for feature in features]
    return Items(features, np.array(collections), shapely.bounds(np.array(shapes, object)).reshape(-1, 4))


def _shape(feature: Any) -> shapely.Geometry | None:
    try:
        return shapely.geometry.shape(feature["geometry"])
    except (KeyError, TypeError, AttributeError, ValueError, shapely.errors.ShapelyError):
        return None
