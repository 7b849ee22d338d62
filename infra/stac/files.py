"""Reads catalogs without a server: items in stac-geoparquet or JSON, at a path, `file://`, `s3://` or `https://`.

What the formats leave open is read as it comes: rows without type or collection, properties flat or nested, boxes as
structs or lists, times as times or text, geometries as WKB or native GeoArrow; JSON as a collection or an item a line.
"""

import copy
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import geopandas as gpd
import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from infra import storage
from infra.addresses import is_web, shown
from infra.bounds import open_parquet
from infra.errors import CatalogUnavailable, RefusedHop, UserError

PARQUET, JSON = (".parquet", ".geoparquet"), (".json", ".geojson", ".ndjson", ".jsonl")
FRESH = 600.0  # seconds for which a web file is kept, where its server does not tell of changes
TOP = ("type", "stac_version", "stac_extensions", "id", "bbox", "links", "assets", "collection")  # top level of an item
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
            return [_feature(row, shape) for row, shape in zip(rows, self.shapes[keep], strict=True)]
        return [copy.deepcopy(feature) for feature, kept in zip(self.rows, keep, strict=True) if kept]


def is_file(url: str) -> bool:
    """Tells whether a catalog is a file rather than an API."""
    return not is_web(url) or _kind(url) in PARQUET + JSON


def _kind(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).suffix.lower()


def search_file(url: str, lonlat: NDArray[np.float64]) -> list[Any]:
    """Returns the features whose bounds hold any of the points, and all that are wider than half the Earth.

    Args:
        url: Path, `file://`, `s3://` or `https://`.
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
    try:
        return items.at(keep)
    except (UserError, *NO_ITEMS) as error:
        raise _refusal(url, error) from None


def open_file(url: str) -> Items:
    """Reads the items of a file, once until it changes.

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
def _opened(url: str, version: str) -> Items:
    if _kind(url) not in PARQUET + JSON:
        kinds = ", ".join(PARQUET + JSON)
        raise UserError(f"{shown(url)} is no catalog: give a file that ends in {kinds}, or an API's URL")
    with _reaching(url):
        data = storage.read(url)
    try:
        if _kind(url) in PARQUET:
            return _from_parquet(data)
        return _from_json(data)
    except (UserError, *NO_ITEMS) as error:
        raise _refusal(url, error) from None


def _refusal(url: str, error: Exception) -> UserError:
    reason = error if isinstance(error, UserError) else type(error).__name__
    return UserError(
        f"{shown(url)} is no catalog ({reason}): give stac-geoparquet, or a GeoJSON FeatureCollection of STAC items"
    )


def _from_parquet(data: bytes) -> Items:
    table = open_parquet(io.BytesIO(data), "the file", len(data)).read()
    shapes = _shapes(table, data)
    if "collection" in table.column_names:
        told = table["collection"].to_pylist()
    else:
        told = [None] * len(table)
    rows = table.drop_columns(["geometry"])
    return Items(rows, shapes, [str(name or "") for name in told], shapely.bounds(shapes).reshape(-1, 4))


def _shapes(table: pa.Table, data: bytes) -> NDArray[np.object_]:
    """Returns geometries from WKB or GeoArrow's own layouts; None where the bytes are no geometry."""
    kind = table.schema.field("geometry").type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return shapely.from_wkb(np.array(table["geometry"].to_pylist(), object), on_invalid="ignore")
    if b"geo" in (table.schema.metadata or {}):
        return gpd.read_parquet(io.BytesIO(data), columns=["geometry"]).geometry.to_numpy()
    return gpd.GeoDataFrame.from_arrow(table.select(["geometry"])).geometry.to_numpy()


def _feature(row: dict[str, Any], shape: shapely.Geometry | None) -> dict[str, Any]:
    """Returns a row as a feature: nulls are left out, and columns beyond an item's top level are properties."""
    plain = {name: _plain(value) for name, value in row.items() if value is not None}
    box = plain.pop("bbox", None)
    top = {name: plain.pop(name) for name in TOP if name in plain}
    found = {"type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "links": [], "assets": {}} | top
    if box:
        corners = ("xmin", "ymin", "zmin", "xmax", "ymax", "zmax")
        if isinstance(box, dict):
            found["bbox"] = [box[corner] for corner in corners if corner in box]
        else:
            found["bbox"] = box
    geometry = None if shape is None else shapely.geometry.mapping(shape)
    return found | {"geometry": geometry, "properties": plain.pop("properties", {}) | plain}


def _plain(value: Any) -> Any:
    """Returns a value of a table for JSON, without nulls of fields that other rows have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):  # of proj:geometry
        return shapely.geometry.mapping(shapely.from_wkb(value))
    return value


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
