"""Turns rows of stac-geoparquet into features, whatever form its specification leaves open.

Rows without type or collection, properties flat or nested, boxes as structs or lists, times as times or text,
geometries as WKB or native GeoArrow.
"""

import io
from datetime import UTC, datetime
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

TOP = ("type", "stac_version", "stac_extensions", "id", "bbox", "links", "assets", "collection")  # top level of an item


def shapes_of(table: pa.Table) -> NDArray[np.object_]:
    """Returns geometries from WKB or GeoArrow's own layouts; None where the bytes are no geometry."""
    kind = table.schema.field("geometry").type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return shapely.from_wkb(np.array(table["geometry"].to_pylist(), object), on_invalid="ignore")
    if b"geo" in (table.schema.metadata or {}):
        pq.write_table(table.select(["geometry"]), alone := io.BytesIO())
        return gpd.read_parquet(alone).geometry.to_numpy()
    return gpd.GeoDataFrame.from_arrow(table.select(["geometry"])).geometry.to_numpy()


def feature_of(row: dict[str, Any], shape: shapely.Geometry | None) -> dict[str, Any]:
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
