"""Writes STAC for catalogs: an Item for each published grid, and the Collection of all of them.

Both are made from what is stored, so they can be made again at any time: `write_item(home)` from the attributes of the
grid's Zarr, `write_collection(grids)` from the items that are there. Links are relative, so a copied bucket stays
whole. STAC 1.0.0 with the extensions datacube 2.1.0 and embeddings 0.0.1, which refers to that version of an Item.
"""

import posixpath
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import pystac
from pystac.extensions.datacube import DatacubeExtension, Dimension, Variable
from shapely import box, union_all
from shapely.geometry import mapping

from infra import storage
from infra.intervals import Interval
from infra.settings import settings
from tasks.cards import GRID
from tasks.core.earth.grid import GridSpec
from tasks.core.earth.region import Region
from tasks.grid.conventions import COPERNICUS, LEGAL_NOTICE, spec_of
from tasks.grid.store import spec_at
from tasks.release.lines import Version, versions_in

STAC, IDENTITY = "1.0.0", "rangegrid"
ITEM, COLLECTION = "item.json", "collection.json"
EXTENSIONS = [
    "https://stac-extensions.github.io/datacube/v2.1.0/schema.json",
    "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json",
]
SHOWN = ("data_type", "gsd", "cube:dimensions", "cube:variables")  # the collection's are those of its latest item
OPENED = "The grid, for xarray.open_zarr(URL, zarr_format=3)"
PARQUET = "application/vnd.apache.parquet"
ZARR, GEOTIFF = "application/vnd+zarr", pystac.MediaType.COG
FIRST_IMAGE = datetime(2015, 6, 27, tzinfo=UTC)  # first image of Sentinel-2A, four days after its launch
COMPACT_CARD = "compact-scorecard.json"
BESIDE = {
    "world.png": ("thumbnail", pystac.MediaType.PNG, ["thumbnail", "overview"], "First three principal components"),
    "world.tif": ("colours", GEOTIFF, ["visual"], "First three principal components, in the grid's CRS"),
    "evidence.png": ("evidence", pystac.MediaType.PNG, ["overview", "uncertainty"], "Distance to the nearest image"),
    "index.html": ("page", pystac.MediaType.HTML, ["overview"], "The maps, and how to open the grid"),
    "compact.zarr": ("compact", ZARR, ["data", "overview"], "Leading components in int8, a scale each: most readers'"),
    "compact.tif": ("compact-geotiff", GEOTIFF, ["data"], "The same as a GeoTIFF, a band for each component"),
    "explorer.zarr": ("explorer", ZARR, ["overview"], "Leading components in int8, of an earlier version"),
    "region.parquet": ("region", PARQUET, ["metadata"], "The polygons of the region that the grid is cut to"),
    COMPACT_CARD: ("compact-score-card", pystac.MediaType.JSON, ["metadata"], "Scores of probes, compact product"),
    "scorecard.json": ("score-card", pystac.MediaType.JSON, ["metadata"], "Scores of linear probes"),
}


def write_item(home: str) -> dict[str, Any]:
    """Writes the Item of the grid in the directory `home`, and returns it."""
    return _write(storage.join(home, ITEM), make_item(home))


def _write(url: str, made: pystac.STACObject) -> dict[str, Any]:
    """Writes an Item or a Collection as it is, of our version of STAC: pystac has its own for the whole process."""
    told = made.to_dict(include_self_link=False, transform_hrefs=False) | {"stac_version": STAC}
    storage.write_json(url, told)
    return told


def make_item(home: str) -> pystac.Item:
    """Returns the Item of a grid, from its Zarr's metadata and what lies beside it."""
    node = storage.read_json(storage.join(home, GRID, "zarr.json"))
    attrs, arrays = node["attributes"], node["consolidated_metadata"]["metadata"]
    columns = next(arrays[name]["shape"][-1] for name in ("embedding", "visual") if name in arrays)
    spec, (moment, period) = spec_of(attrs, columns), _period(home, attrs)
    region = spec_at(home, spec, is_cut="region" in attrs["rangegrid:made_of"]).region
    item = pystac.Item(
        id=posixpath.basename(home.rstrip("/")),
        geometry=region.geometry if region else _geometry(spec),
        bbox=list(spec.plane.bounds(spec.box)),
        datetime=moment,
        properties=period | _described(spec, region, attrs, arrays),
        stac_extensions=EXTENSIONS,
        collection=IDENTITY,
        assets=_assets(home, attrs),
    )
    DatacubeExtension.ext(item).apply(*_cube(spec, arrays))
    item.add_links([pystac.Link(rel, f"../{COLLECTION}") for rel in ("root", "parent", "collection")])
    item.add_link(pystac.Link("emb:model", _from(home, attrs["geoemb:model"])))
    item.add_links([pystac.Link("emb:source-data", _from(home, url)) for url in attrs["geoemb:source_data"]])
    return item


def _geometry(spec: GridSpec) -> dict[str, Any]:
    """Returns the bounds of the grid as a shape, in two pieces where they cross 180 degrees."""
    west, south, east, north = spec.plane.bounds(spec.box)
    if west < east:
        spans = [(west, east)]
    else:
        spans = [(west, 180.0), (-180.0, east)]
    return mapping(union_all([box(left, south, right, north) for left, right in spans]))


def _described(spec: GridSpec, region: Region | None, attrs: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    covered = "global land" if spec.is_globe else "land"
    if region:
        covered = f"land of {region.name}"
    found: dict[str, Any] = {
        "title": f"RANGE embeddings{f' of {region.name}' if region else ''}, {spec.size}",
        "description": attrs["attribution"],
        "gsd": attrs["geoemb:gsd"],
        "data_type": attrs["geoemb:data_type"],
        "emb:runtime_parameters": attrs["rangegrid:made_of"],
        "emb:spatial_coverage": covered,
        "rangegrid:code": attrs["geoemb:build_version"],
    }
    if (resolution := attrs.get("rangegrid:field", {}).get("whole_half_km")) is not None:
        found["rangegrid:resolution_km"] = resolution
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


def _period(home: str, attrs: dict[str, Any]) -> tuple[datetime | None, dict[str, Any]]:
    """Returns the time window of the images, where their sample still exists, else when the grid was begun."""
    begun = storage.modified(storage.join(home, GRID, "zarr.json")).astimezone(UTC)
    window = attrs.get("rangegrid:datetime")
    if window is None:
        return begun.replace(microsecond=0), {}
    return None, Interval.parse(window).temporal(FIRST_IMAGE, begun)


def _cube(spec: GridSpec, arrays: dict[str, Any]) -> tuple[dict[str, Dimension], dict[str, Variable]]:
    (west, south, east, north), (y, x) = spec.box, spec.plane.dims
    epsg = spec.plane.name.removeprefix("EPSG:")
    system = int(epsg) if epsg.isdigit() else spec.plane.definition.to_wkt()
    dimensions: dict[str, Any] = {
        name: {"type": "spatial", "axis": axis, "extent": extent, "step": step, "reference_system": system}
        for name, axis, extent, step in ((x, "x", [west, east], spec.step), (y, "y", [south, north], -spec.step))
    }
    variables: dict[str, Variable] = {}
    for name, array in arrays.items():
        dims = array.get("dimension_names", [])  # a group, a coarser level, has none
        if "/" not in name and name not in dims and {y, x} <= set(dims):
            about = {"dimensions": dims, "variable_type": "data", "unit": array["attributes"]["units"]}
            variables[name] = Variable(about)
            for dim, size in zip(dims, array["shape"], strict=True):
                dimensions.setdefault(dim, {"type": "embedding", "extent": [0, size - 1], "step": 1})
    return {name: Dimension.from_dict(about) for name, about in dimensions.items()}, variables


def _assets(home: str, attrs: dict[str, Any]) -> dict[str, pystac.Asset]:
    card = _from(home, storage.join(attrs["geoemb:model"], "card.json"))
    trained = "Architecture, training and metrics of the encoder"
    there = storage.names(home)
    return {
        "embeddings": pystac.Asset(f"./{GRID}", OPENED, media_type=ZARR, roles=["data"]),
        "model-card": pystac.Asset(card, trained, media_type=pystac.MediaType.JSON, roles=["metadata"]),
        **{
            key: pystac.Asset(f"./{name}", title, media_type=kind, roles=roles)
            for name, (key, kind, roles, title) in BESIDE.items()
            if name in there
        },
    }


def _from(home: str, url: str) -> str:
    """Returns a URL relative to `home` within our storage, else as it is."""
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
    return _write(storage.join(grids, COLLECTION), collection)


def _read_item(home: str) -> pystac.Item | None:
    url = storage.join(home, ITEM)
    if not storage.exists(url):
        return None
    return pystac.Item.from_dict(storage.read_json(url), migrate=False, preserve_dict=False)


def make_collection(
    items: dict[str, pystac.Item], latest: str, known: Mapping[str, Version] = MappingProxyType({})
) -> pystac.Collection:
    """Returns the Collection of items by id; its links tell of each its line, and whether it was withdrawn."""
    shown = items[latest]
    own = {
        "emb:type": "pixel",
        "emb:dimensions": _dimensions(shown),
        "emb:fit_for_use": ["classification", "regression", "retrieval"],
    }
    collection = pystac.Collection(
        id=IDENTITY,
        title="RANGE geo-embeddings of the land",
        description=f"Grids of RANGE embeddings, one Item per version. {shown.properties['description']}.",
        license="proprietary",
        extent=_extent(items.values()),
        stac_extensions=EXTENSIONS,
        summaries=_summaries(items.values()),
        extra_fields=own | {name: shown.properties[name] for name in SHOWN},
    )
    collection.clear_links()  # of pystac's own, which are absolute
    collection.add_links(_links(items, latest, known))
    return collection


def _summaries(items: Collection[pystac.Item]) -> pystac.Summaries:
    found = {name: sorted({item.properties[name] for item in items}) for name in ("data_type", "gsd")}
    found["emb:dimensions"] = sorted({_dimensions(item) for item in items})
    return pystac.Summaries(found, maxcount=len(items) + 1)  # pystac leaves out a list of `maxcount` values


def _links(items: dict[str, pystac.Item], latest: str, known: Mapping[str, Version]) -> list[pystac.Link]:
    shown = items[latest]
    links = [pystac.Link("root", f"./{COLLECTION}")]
    links += [_link("item", name, known.get(name)) for name in items]
    links += [_link("latest-version", name, known.get(name)) for name in _in_force(items, latest, known)]
    models = [link for link in shown.links if link.rel.startswith("emb:")]
    links += [pystac.Link(link.rel, str(link.target).removeprefix("../")) for link in models]
    if COPERNICUS in shown.properties["description"]:
        links.append(pystac.Link("license", LEGAL_NOTICE, title="Terms of Copernicus Sentinel data"))
    return links


def _in_force(items: Iterable[str], latest: str, known: Mapping[str, Version]) -> list[str]:
    """Returns the given grid, and the latest of every other line."""
    others = [name for name in items if name in known and known[name].state == "latest"]
    return list(dict.fromkeys([latest, *others]))


def _link(rel: str, name: str, version: Version | None) -> pystac.Link:
    link = pystac.Link(rel, f"./{name}/{ITEM}", pystac.MediaType.GEOJSON)
    if version is not None:
        link.title = f"{version.line}, {version.state}"
        link.extra_fields = {"rangegrid:line": version.line, "rangegrid:state": version.state}
        if version.state == "withdrawn":
            link.extra_fields["deprecated"] = True
    return link


def _extent(items: Collection[pystac.Item]) -> pystac.Extent:
    """Returns the extent of all items: all around the globe where one crosses 180 degrees, which pystac overlooks."""
    extent = pystac.Extent.from_items(items)
    if any(item.bbox and item.bbox[0] > item.bbox[2] for item in items):
        ((_, south, _, north),) = extent.spatial.bboxes
        extent.spatial = pystac.SpatialExtent([[-180.0, south, 180.0, north]])
    return extent


def _dimensions(item: pystac.Item) -> int:
    """Returns the length of a vector, from the dimensions of the embedding or of its blocks."""
    cube = item.properties["cube:dimensions"].values()
    return sum(dim["extent"][1] + 1 for dim in cube if dim["type"] == "embedding")
