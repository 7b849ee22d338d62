"""What catalogs find: a STAC Item for each published grid, and the Collection of all of them.

Both are made from what is stored, so they can be made again at any time: `write_item(home)` from the attributes of the
grid's Zarr, `write_collection(grids)` from the items that are there. Links are relative, so a copied bucket stays
whole. STAC 1.0.0 with the extensions datacube 2.1.0 and embeddings 0.0.1, which refers to that version of an Item.
"""

import posixpath
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from shapely import box, union_all
from shapely.geometry import mapping

from infra import storage
from infra.intervals import Interval
from infra.settings import settings
from tasks.cards import GRID
from tasks.core.earth.grid import GridSpec
from tasks.grid.conventions import COPERNICUS, LEGAL_NOTICE, spec_of
from tasks.release.lines import versions_in
from tasks.release.versions import Version

ITEM, COLLECTION = "item.json", "collection.json"
EXTENSIONS = [
    "https://stac-extensions.github.io/datacube/v2.1.0/schema.json",
    "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json",
]
OPENED = "The grid, for xarray.open_zarr(URL, zarr_format=3)"
ZARR, GEOTIFF = "application/vnd+zarr", "image/tiff; application=geotiff; profile=cloud-optimized"
FIRST_IMAGE = datetime(2015, 6, 27, tzinfo=UTC)  # of Sentinel-2A, four days after its launch
BESIDE = {
    "world.png": ("thumbnail", "image/png", ["thumbnail", "overview"], "First three principal components"),
    "world.tif": ("colours", GEOTIFF, ["visual"], "First three principal components, in the grid's CRS"),
    "evidence.png": ("evidence", "image/png", ["overview", "uncertainty"], "Distance to the nearest image"),
    "index.html": ("page", "text/html", ["overview"], "The maps, and how to open the grid"),
    "scorecard.json": ("score-card", "application/json", ["metadata"], "Scores of linear probes"),
}


def write_item(home: str) -> dict[str, Any]:
    """Writes the Item of the grid in the directory `home`, and returns it."""
    item = make_item(home)
    storage.write_json(storage.join(home, ITEM), item)
    return item


def make_item(home: str) -> dict[str, Any]:
    """The Item of a grid, from its Zarr's metadata and what lies beside it."""
    node = storage.read_json(storage.join(home, GRID, "zarr.json"))
    attrs, arrays = node["attributes"], node["consolidated_metadata"]["metadata"]
    columns = next(arrays[name]["shape"][-1] for name in ("embedding", "visual") if name in arrays)
    identity, spec = posixpath.basename(home.rstrip("/")), spec_of(attrs, columns)
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": EXTENSIONS,
        "id": identity,
        "collection": "rangegrid",
        "bbox": list(spec.plane.bounds(spec.box)),
        "geometry": _geometry(spec),
        "properties": _period(home, attrs) | _described(spec, attrs, arrays) | _cube(spec, arrays),
        "links": [
            *({"rel": rel, "href": f"../{COLLECTION}"} for rel in ("root", "parent", "collection")),
            {"rel": "emb:model", "href": _from(home, attrs["geoemb:model"])},
            *({"rel": "emb:source-data", "href": _from(home, url)} for url in attrs["geoemb:source_data"]),
        ],
        "assets": _assets(home, attrs),
    }


def _geometry(spec: GridSpec) -> dict[str, Any]:
    """The bounds of the grid as a shape: two, where they cross 180 degrees."""
    west, south, east, north = spec.plane.bounds(spec.box)
    spans = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
    return mapping(union_all([box(left, south, right, north) for left, right in spans]))


def _described(spec: GridSpec, attrs: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "title": f"RANGE embeddings, {spec.size}",
        "description": attrs["attribution"],
        "gsd": attrs["geoemb:gsd"],
        "data_type": attrs["geoemb:data_type"],
        "emb:runtime_parameters": attrs["rangegrid:made_of"],
        "emb:spatial_coverage": "global land" if spec.is_globe else "land",
        "rangegrid:code": attrs["geoemb:build_version"],
    }
    if quantization := attrs.get("geoemb:quantization"):
        scaled = [arrays[name]["attributes"] for name in ("visual", "location") if name in arrays]
        scales = {
            "scale": [a["scale_factor"] for a in scaled],
            "offset": [a["add_offset"] for a in scaled],
        }
        found["emb:quantization"] = quantization | (scales if scaled else {})
    if "distance_km" in arrays:
        meaning = "effective number and largest weight of the images behind a cell, and distance to the nearest"
        found["emb:uncertainty"] = {"method": "evidence of retrieval", "description": meaning}
    return found


def _period(home: str, attrs: dict[str, Any]) -> dict[str, Any]:
    """When the images are from, where their sample is still known; else when the grid was begun."""
    begun = storage.modified(storage.join(home, GRID, "zarr.json")).astimezone(UTC)
    window = attrs.get("rangegrid:datetime")
    if window is None:
        return {"datetime": begun.strftime("%Y-%m-%dT%H:%M:%SZ")}
    return Interval.parse(window).temporal(FIRST_IMAGE, begun)


def _cube(spec: GridSpec, arrays: dict[str, Any]) -> dict[str, Any]:
    (west, south, east, north), (y, x) = spec.box, spec.plane.dims
    epsg = spec.plane.name.removeprefix("EPSG:")
    system = int(epsg) if epsg.isdigit() else spec.plane.definition.to_wkt()
    dimensions: dict[str, Any] = {
        name: {"type": "spatial", "axis": axis, "extent": extent, "step": step, "reference_system": system}
        for name, axis, extent, step in ((x, "x", [west, east], spec.step), (y, "y", [south, north], -spec.step))
    }
    variables: dict[str, Any] = {}
    for name, array in arrays.items():
        dims = array.get("dimension_names", [])  # a group, a coarser level, has none
        if "/" not in name and name not in dims and {y, x} <= set(dims):
            variables[name] = {"dimensions": dims, "variable_type": "data", "unit": array["attributes"]["units"]}
            for dim, size in zip(dims, array["shape"], strict=True):
                dimensions.setdefault(dim, {"type": "embedding", "extent": [0, size - 1], "step": 1})
    return {"cube:dimensions": dimensions, "cube:variables": variables}


def _assets(home: str, attrs: dict[str, Any]) -> dict[str, Any]:
    assets: dict[str, Any] = {
        "embeddings": {"href": f"./{GRID}", "type": ZARR, "roles": ["data"], "title": OPENED},
        "model-card": {
            "href": _from(home, storage.join(attrs["geoemb:model"], "card.json")),
            "type": "application/json",
            "roles": ["metadata"],
            "title": "Architecture, training and metrics of the encoder",
        },
    }
    there = storage.names(home)
    for name, (key, kind, roles, title) in BESIDE.items():
        if name in there:
            assets[key] = {"href": f"./{name}", "type": kind, "roles": roles, "title": title}
    return assets


def _from(home: str, url: str) -> str:
    """The URL as seen from `home`: relative within our storage, else as it is."""
    root = settings().storage_url.rstrip("/") + "/"
    if not (url.startswith(root) and home.startswith(root)):
        return url
    return posixpath.relpath(url.removeprefix(root), home.removeprefix(root))


def write_collection(
    grids: str, latest: str | None = None, known: Mapping[str, Version] = MappingProxyType({})
) -> dict[str, Any] | None:
    """Writes the Collection of the items that are in the directories under `grids`, if any, and returns it.

    Args:
        grids: URL of the directory of all grids.
        latest: Id of the grid that is in force, whose fields the collection takes; unset, the last by name.
        known: The versions by id, where their lines and states are known.
    """
    items = {name: item for name in versions_in(grids) if (item := _read_item(storage.join(grids, name)))}
    if not items:
        return None
    collection = make_collection(items, latest if latest in items else max(items), known)
    storage.write_json(storage.join(grids, COLLECTION), collection)
    return collection


def _read_item(home: str) -> dict[str, Any] | None:
    url = storage.join(home, ITEM)
    return storage.read_json(url) if storage.exists(url) else None


def make_collection(
    items: dict[str, dict[str, Any]], latest: str, known: Mapping[str, Version] = MappingProxyType({})
) -> dict[str, Any]:
    """Returns the Collection of items by id; its links tell of each its line, and whether it was withdrawn."""
    shown = items[latest]
    properties = shown["properties"]
    times = [_extent(item["properties"]) for item in items.values()]
    copernicus = COPERNICUS in properties["description"]
    models = [
        {**link, "href": link["href"].removeprefix("../")} for link in shown["links"] if link["rel"].startswith("emb:")
    ]
    return {
        "type": "Collection",
        "stac_version": "1.0.0",
        "stac_extensions": EXTENSIONS,
        "id": "rangegrid",
        "title": "RANGE geo-embeddings of the land",
        "description": f"Grids of RANGE embeddings, one Item per version. {properties['description']}.",
        "license": "proprietary",
        "extent": {
            "spatial": {"bbox": [_around([item["bbox"] for item in items.values()])]},
            "temporal": {"interval": [[min(start for start, _ in times), max(end for _, end in times)]]},
        },
        "emb:type": "pixel",
        "emb:dimensions": _dimensions(properties),
        "data_type": properties["data_type"],
        "gsd": properties["gsd"],
        "emb:fit_for_use": ["classification", "regression", "retrieval"],
        "cube:dimensions": properties["cube:dimensions"],
        "cube:variables": properties["cube:variables"],
        "summaries": {
            "data_type": sorted({item["properties"]["data_type"] for item in items.values()}),
            "gsd": sorted({item["properties"]["gsd"] for item in items.values()}),
            "emb:dimensions": sorted({_dimensions(item["properties"]) for item in items.values()}),
        },
        "links": [
            {"rel": "root", "href": f"./{COLLECTION}"},
            *(_link("item", name, known.get(name)) for name in items),
            *(_link("latest-version", name, known.get(name)) for name in _in_force(items, latest, known)),
            *models,
            *([{"rel": "license", "href": LEGAL_NOTICE, "title": "Terms of Copernicus Sentinel data"}] * copernicus),
        ],
    }


def _in_force(items: Iterable[str], latest: str, known: Mapping[str, Version]) -> list[str]:
    """The given grid, and the latest of every other line."""
    others = [name for name in items if name in known and known[name].state == "latest"]
    return list(dict.fromkeys([latest, *others]))


def _link(rel: str, name: str, version: Version | None) -> dict[str, Any]:
    link: dict[str, Any] = {"rel": rel, "href": f"./{name}/{ITEM}", "type": "application/geo+json"}
    if version is None:
        return link
    link |= {"title": f"{version.line}, {version.state}", "rangegrid:line": version.line}
    withdrawn = {"deprecated": True} if version.state == "withdrawn" else {}
    return link | {"rangegrid:state": version.state} | withdrawn


def _around(boxes: list[list[float]]) -> list[float]:
    """A box around all, in degrees; the whole way around the globe where one of them crosses 180."""
    wests, souths, easts, norths = zip(*boxes, strict=True)
    crosses = any(west > east for west, east in zip(wests, easts, strict=True))
    west, east = (-180.0, 180.0) if crosses else (min(wests), max(easts))
    return [west, min(souths), east, max(norths)]


def _extent(properties: dict[str, Any]) -> tuple[str, str]:
    moment = properties["datetime"]
    return properties.get("start_datetime", moment), properties.get("end_datetime", moment)


def _dimensions(properties: dict[str, Any]) -> int:
    """Length of a vector: of the embedding's dimension, or of those of its blocks."""
    cube = properties["cube:dimensions"].values()
    return sum(dim["extent"][1] + 1 for dim in cube if dim["type"] == "embedding")
