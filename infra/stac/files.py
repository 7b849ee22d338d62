"""Reads catalogs without a server: items in stac-geoparquet or JSON, at a path, `file://`, `s3://` or `https://`.

What the formats leave open is read as it comes (`infra.stac.rows`); JSON as a collection or an item a line. A file is
read whole, and kept until it changes, unless it is stac-geoparquet of more than `WHOLE` bytes: that is read in parts
(`infra.stac.dumps`).
"""

import copy
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from infra import storage
from infra.addresses import is_web, shown
from infra.bounds import open_parquet
from infra.errors import CatalogUnavailable, RefusedHop, Unavailable, UserError
from infra.intervals import Interval
from infra.stac.dumps import Dump, open_dump
from infra.stac.rows import TOP as TOP
from infra.stac.rows import feature_of, shapes_of

PARQUET, JSON = (".parquet", ".geoparquet"), (".json", ".geojson", ".ndjson", ".jsonl")
FRESH = 600.0  # seconds for which a web file is kept, where its server does not tell of changes
WHOLE = 32 << 20  # bytes of the largest stac-geoparquet that is held in memory whole
NO_ITEMS = (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError, shapely.errors.ShapelyError)


class Items(NamedTuple):
    """The items of a file, unparsed: making objects of all items of a large file would take too long."""

    rows: pa.Table | list[Any]
    """Rows of stac-geoparquet, or features."""
    shapes: NDArray[np.object_]
    """Geometry of each as written; None where there is none."""
    collections: list[str]
    """Collection of each; empty where it states none."""
    bounds: NDArray[np.float64]
    """(n, 4): west, south, east, north of each geometry; NaN where there is none."""

    def at(self, keep: NDArray[np.bool_]) -> list[Any]:
        """Returns some items as features."""
        if isinstance(self.rows, pa.Table):
            rows = self.rows.filter(pa.array(keep)).to_pylist(maps_as_pydicts="lossy")
            return [feature_of(row, shape) for row, shape in zip(rows, self.shapes[keep], strict=True)]
        return [copy.deepcopy(feature) for feature, kept in zip(self.rows, keep, strict=True) if kept]

    def near(self, lonlat: NDArray[np.float64], window: Interval) -> list[Any]:
        """Returns the features whose bounds hold any of the points, and those of unclear bounds, of any time."""
        west, south, east, north = self.bounds.T
        keep = ~(east - west <= 180) | (west < -180) | (east > 180)  # where there is no geometry too, to be counted
        for lon, lat in lonlat:
            keep |= (west <= lon) & (lon <= east) & (south <= lat) & (lat <= north)
        return self.at(keep)


def is_file(url: str) -> bool:
    """Tells whether a catalog is a file rather than an API."""
    return not is_web(url) or _kind(url) in PARQUET + JSON


def _kind(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).suffix.lower()


def search_file(url: str, lonlat: NDArray[np.float64], window: Interval) -> list[Any]:
    """Returns the features that may hold any of the points; those that do not, or of another time, may be among them.

    Args:
        url: Path, `file://`, `s3://` or `https://`.
        lonlat: (n, 2) points in degrees.
        window: Time window.

    Raises:
        CatalogUnavailable: There is no such file, or it cannot be reached.
        UserError: It holds no items.
    """
    items = open_file(url)
    try:
        return items.near(lonlat, window)
    except (CatalogUnavailable, Unavailable):
        raise
    except (UserError, *NO_ITEMS) as error:
        raise _refusal(url, error) from None


def open_file(url: str) -> Items | Dump:
    """Reads the items of a file, once until it changes; of a large one what its parts tell.

    Raises:
        CatalogUnavailable: There is no such file, or it cannot be reached.
        UserError: It holds no items.
    """
    place = storage.as_url(url)
    with _reaching(place):
        version = storage.version(place) or f"{time.monotonic() // FRESH:.0f}"
    return _opened(place, version)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Makes it one sentence that there is no such file, or that it cannot be reached: another catalog may stand in."""
    try:
        yield
    except RefusedHop:
        raise
    except (FileNotFoundError, UserError) as error:
        raise CatalogUnavailable(
            f"no catalog can be read at {shown(url)} ({error}): check RANGEGRID_STAC_URL"
        ) from None


@lru_cache(maxsize=2)
def _opened(url: str, version: str) -> Items | Dump:
    if _kind(url) not in PARQUET + JSON:
        kinds = ", ".join(PARQUET + JSON)
        raise UserError(f"{shown(url)} is no catalog: give a file that ends in {kinds}, or an API's URL")
    with _reaching(url):
        size = storage.length(url) if _kind(url) in PARQUET else 0
        data = storage.read(url) if size is None or size <= WHOLE else b""
    try:
        if size and not data:
            return open_dump(url, size, version)
        if _kind(url) in PARQUET:
            return _from_parquet(data)
        return _from_json(data)
    except (CatalogUnavailable, Unavailable):
        raise
    except (UserError, *NO_ITEMS) as error:
        raise _refusal(url, error) from None


def _refusal(url: str, error: Exception) -> UserError:
    reason = error if isinstance(error, UserError) else type(error).__name__
    return UserError(
        f"{shown(url)} is no catalog ({reason}): give stac-geoparquet, or a GeoJSON FeatureCollection of STAC items"
    )


def _from_parquet(data: bytes) -> Items:
    table = open_parquet(io.BytesIO(data), "the file", len(data)).read()
    shapes = shapes_of(table)
    if "collection" in table.column_names:
        told = table["collection"].to_pylist()
    else:
        told = [None] * len(table)
    rows = table.drop_columns(["geometry"])
    return Items(rows, shapes, [str(name or "") for name in told], shapely.bounds(shapes).reshape(-1, 4))


def _from_json(data: bytes) -> Items:
    features = _features(data.decode("utf-8-sig"))
    shapes = np.array([_shape(feature) for feature in features], object)
    collections = [str(feature.get("collection") or "") if isinstance(feature, dict) else "" for feature in features]
    return Items(features, shapes, collections, shapely.bounds(shapes).reshape(-1, 4))


def _features(text: str) -> list[Any]:
    """Returns the features of a collection, of a single item, or of an item per line."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        return lines
    if content.get("type") in ("Catalog", "Collection") and "features" not in content:
        raise UserError("a static STAC catalog, which cannot be searched")
    if content.get("type") == "Feature":
        return [content]
    return list(content["features"])


def _shape(feature: Any) -> shapely.Geometry | None:
    try:
        return shapely.geometry.shape(feature["geometry"])
    except NO_ITEMS:
        return None
