"""Tells of a Zarr in the older format 2 too, whose metadata lie beside those of format 3 and name the same chunks.

GDAL 3.10, of rasterio 1.4, reads format 2, and of format 3 not what was settled last (its codec `bytes`).
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

ROOT = "zarr.json"


def older(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the objects that format 2 has in place of each `zarr.json`.

    Args:
        files: The objects of a Zarr by name, of arrays whose chunks have keys as in format 2 and are packed by gzip
            or as they are.
    """
    found: dict[str, Any] = {}
    for name, data in files.items():
        before, _, last = name.rpartition("/")
        if last == ROOT:
            home = f"{before}/" if before else ""
            found |= {home + part: told for part, told in _node(json.loads(data)).items()}
    known = {"metadata": dict(sorted(found.items())), "zarr_consolidated_format": 1}
    return {name: json.dumps(told, indent=2).encode() for name, told in (found | {".zmetadata": known}).items()}


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what format 2 tells of a group or an array."""
    if node["node_type"] == "group":
        return {".zgroup": {"zarr_format": 2}, ".zattrs": node["attributes"]}
    levels = [codec["configuration"]["level"] for codec in node["codecs"] if codec["name"] == "gzip"]
    array = {
        "zarr_format": 2,
        "shape": node["shape"],
        "chunks": node["chunk_grid"]["configuration"]["chunk_shape"],
        "dtype": np.dtype(node["data_type"]).str,
        "compressor": {"id": "gzip", "level": levels[0]} if levels else None,
        "fill_value": node["fill_value"] or None,  # a 0 would be no data to readers of format 2
        "order": "C",
        "filters": None,
        "dimension_separator": "/",
    }
    return {".zarray": array, ".zattrs": node["attributes"] | {"_ARRAY_DIMENSIONS": node.get("dimension_names", [])}}
