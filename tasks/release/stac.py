"""Writes STAC for catalogs: an Item for each published grid, and the Collection of all of them.

Both are made from what is stored, so they can be made again at any time: `write_item(home)` from the attributes of the
grid's Zarr, `write_collection(grids)` from the items that are there, in each of which it tells the version's place
among the others. Links are relative, so a copied bucket stays whole, and lead to what everybody may read. The version
of STAC is 1.0.0, to whose Item the schema of the embeddings extension 0.0.1 holds all; what that does not rule is of
today.
"""

import hashlib
import json
import posixpath
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import pystac
from shapely import box, union_all
from shapely.geometry import mapping

from infra import storage
from infra.intervals import Interval
from tasks.cards import GRID
from tasks.core.earth.grid import GridSpec
from tasks.core.earth.region import Region
from tasks.grid.conventions import COPERNICUS, LEGAL_NOTICE, MODEL, SOURCE, spec_of
from tasks.grid.store import spec_at
from tasks.release import succession
from tasks.release.lines import Version, versions_in
from tasks.release.origins import MODEL_CARD, RANGE, SCIENTIFIC, cited, write_origins

STAC, IDENTITY = "1.0.0", "rangegrid"
ITEM, COLLECTION, SCORES = "item.json", "collection.json", "scorecard.json"
EXTENSIONS = [
    "https://stac-extensions.github.io/datacube/v2.3.0/schema.json",
    "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json",
    SCIENTIFIC,
]
OF_ITEMS = [
    *EXTENSIONS,
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    succession.SCHEMA,
    "https://stac-extensions.github.io/zarr/v1.1.0/schema.json",
]
OF_COLLECTION = [*EXTENSIONS, "https://stac-extensions.github.io/item-assets/v1.0.0/schema.json", succession.SCHEMA]
SHOWN = ("data_type", "gsd", "cube:dimensions", "cube:variables")  # the collection's are those of its latest item
OPENED = "The grid, for xarray.open_zarr(URL, zarr_format=3)"
PARQUET = "application/vnd.apache.parquet"
ZARR, GEOTIFF = "application/vnd.zarr; version=3", pystac.MediaType.COG
FORMER_ZARR = "application/vnd+zarr"  # the only one that QGIS knows, up to 4.2.2 at least
HASHED = 64 * 2**20  # bytes of the largest file that is read for its checksum
SHA2_256 = "1220"  # of a multihash: the function, and the length of a digest in bytes
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
    MODEL_CARD: (
        "model-card",
        pystac.MediaType.JSON,
        ["metadata"],
        "Architecture, training and metrics of the encoder",
    ),
    SCORES: ("score-card", pystac.MediaType.JSON, ["metadata"], "Scores of linear probes"),
}


def write_item(home: str) -> dict[str, Any]:
    """Writes the Item of the grid in the directory `home` with what it leads to, and returns it.

    What a former Item tells of the version's place among others is kept.
    """
    url, attrs = storage.join(home, ITEM), _node(home)["attributes"]
    moment, period = _period(home, attrs)
    end = pystac.utils.datetime_to_str(moment) if moment else period["end_datetime"]
    write_origins(home, attrs["attribution"], (period.get("start_datetime"), end))
    told = _told(make_item(home))
    if storage.exists(url):
        told = succession.kept(told, storage.read_json(url))
    storage.write_json(url, told)
    return told


def _told(made: pystac.STACObject) -> dict[str, Any]:
    """Returns an Item or a Collection as it is, of our version of STAC: pystac has its own for the whole process."""
    return made.to_dict(include_self_link=False, transform_hrefs=False) | {"stac_version": STAC}


def _node(home: str) -> dict[str, Any]:
    """Returns the metadata of the grid in a directory."""
    return storage.read_json(storage.join(home, GRID, "zarr.json"))


def make_item(home: str) -> pystac.Item:
    """Returns the Item of a grid, from its Zarr's metadata and what lies beside it."""
    node = _node(home)
    attrs, arrays = node["attributes"], node["consolidated_metadata"]["metadata"]
    columns = next(arrays[name]["shape"][-1] for name in ("embedding", "visual") if name in arrays)
    spec, (moment, period) = spec_of(attrs, columns), _period(home, attrs)
    region = spec_at(home, spec, is_cut="region" in attrs["rangegrid:made_of"]).region
    there = set(storage.names(home))
    item = pystac.Item(
        id=posixpath.basename(home.rstrip("/")),
        geometry=region.geometry if region else _geometry(spec),
        bbox=list(spec.plane.bounds(spec.box)),
        datetime=moment,
        properties=period | _described(spec, region, attrs, arrays) | _projection(attrs) | _cube(spec, arrays),
        stac_extensions=OF_ITEMS,
        collection=IDENTITY,
        assets=_assets(home, there),
    )
    item.add_links(_item_links(attrs, there))
    return item


def _item_links(attrs: dict[str, Any], there: set[str]) -> list[pystac.Link]:
    """Returns the links of an Item, but for those to other versions."""
    links = [pystac.Link(rel, f"../{COLLECTION}", pystac.MediaType.JSON) for rel in ("root", "parent", "collection")]
    links.append(pystac.Link("store", f"./{GRID}", ZARR, "The Zarr of the grid"))
    if MODEL in there:
        links.append(pystac.Link("emb:model", f"./{MODEL}", pystac.MediaType.GEOJSON, "The location encoder"))
    links.append(pystac.Link("emb:source-data", f"./{SOURCE}", pystac.MediaType.JSON, "The images"))
    if SCORES in there:
        links.append(pystac.Link("emb:benchmark", f"./{SCORES}", pystac.MediaType.JSON, "Scores of linear probes"))
    if COPERNICUS in attrs["attribution"]:
        links.append(pystac.Link("license", LEGAL_NOTICE, title="Terms of Copernicus Sentinel data"))
    return links + cited([RANGE])


def _projection(attrs: dict[str, Any]) -> dict[str, Any]:
    """Returns the CRS and the raster of the cells, as the Zarr tells them."""
    code = attrs.get("proj:code")
    crs = {"proj:code": code} if code else {"proj:code": None, "proj:wkt2": attrs["proj:wkt2"]}
    return crs | {f"proj:{name}": attrs[f"spatial:{name}"] for name in ("bbox", "shape", "transform")}


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
    years = _years(attrs.get("rangegrid:datetime"))
    found: dict[str, Any] = {
        "title": f"RANGE embeddings{f' of {region.name}' if region else ''}, {spec.size}{years}",
        "description": f"A vector of {attrs['geoemb:dimensions']} numbers for each cell of {covered}, which stands for "
        f"what satellite images show there. Images: {attrs['attribution']}",
        "license": "proprietary",
        "sci:publications": [RANGE],
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


def _years(window: str | None) -> str:
    """Returns the years of a time window for a title; nothing where an end is open, or none is known."""
    if window is None:
        return ""
    span = Interval.parse(window)
    if span.start is None or span.end is None:
        return ""
    return ", " + " to ".join(dict.fromkeys([f"{span.start.year}", f"{span.end.year}"]))


def _period(home: str, attrs: dict[str, Any]) -> tuple[datetime | None, dict[str, Any]]:
    """Returns the time window of the images, where their sample still exists, else when the grid was begun."""
    begun = storage.modified(storage.join(home, GRID, "zarr.json")).astimezone(UTC)
    window = attrs.get("rangegrid:datetime")
    if window is None:
        return begun.replace(microsecond=0), {}
    return None, Interval.parse(window).temporal(FIRST_IMAGE, begun)


def _cube(spec: GridSpec, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the datacube extension."""
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


def _assets(home: str, there: set[str]) -> dict[str, pystac.Asset]:
    """Returns the assets: the grid under its media type and the former one, and what lies beside it."""
    also = "The same grid, by the media type that QGIS knows"
    assets = {
        "embeddings": pystac.Asset(f"./{GRID}", OPENED, media_type=ZARR, roles=["data"]),
        "embeddings-qgis": pystac.Asset(f"./{GRID}", also, media_type=FORMER_ZARR, roles=["alternate"]),
    }
    for name, (key, kind, roles, title) in BESIDE.items():
        if name in there:
            assets[key] = pystac.Asset(f"./{name}", title, media_type=kind, roles=roles)
    for asset in assets.values():
        url = storage.join(home, asset.href.removeprefix("./"))
        asset.extra_fields = _of_zarr(url) if asset.href.endswith(".zarr") else _of_file(url)
    return assets


def _of_zarr(url: str) -> dict[str, Any]:
    """Returns what the Zarr extension tells of an asset."""
    try:
        node = storage.read_json(storage.join(url, "zarr.json"))
    except FileNotFoundError:  # an unfinished companion
        return {}
    told = {f"zarr:{name}": node[name] for name in ("zarr_format", "node_type")}
    return told | {"zarr:consolidated": bool(node.get("consolidated_metadata"))}


def _of_file(url: str) -> dict[str, Any]:
    """Returns size and checksum of a file; a large one is not read for its checksum."""
    size = storage.length(url)
    if size is None or size > HASHED:
        return {"file:size": size} if size else {}
    return {"file:size": size, "file:checksum": SHA2_256 + hashlib.sha256(storage.read(url)).hexdigest()}


def write_collection(
    grids: str,
    latest: str | None = None,
    known: Mapping[str, Version] = MappingProxyType({}),
    chains: Mapping[str, list[str]] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """Writes the Collection of the items that are in the directories under `grids`, if any, and returns it.

    Args:
        grids: URL of the directory of all grids.
        latest: Id of the grid that is in force, whose fields the collection takes; unset, the last by name.
        known: The versions by id, where their lines and states are known: their items tell these then.
        chains: By line, the versions that were in force, oldest first, as far as they are there.
    """
    stored = {name: found for name in versions_in(grids) if (found := _stored_item(grids, name))}
    items = {name: _placed(grids, name, stored, known.get(name), chains) for name in stored}
    if not items:
        return None
    collection = _told(make_collection(items, latest if latest in items else max(items), known))
    storage.write_json(storage.join(grids, COLLECTION), collection)
    return collection


def _placed(
    grids: str,
    name: str,
    stored: Mapping[str, tuple[dict[str, Any], str]],
    version: Version | None,
    chains: Mapping[str, list[str]],
) -> pystac.Item:
    """Returns an item once it tells its version's place among the others, of which only those with an item are told."""
    told, tag = stored[name]
    if version is not None:
        chain = chains.get(version.line, [])
        placed = succession.placed(told, version, chain, set(stored), ITEM)
        if placed != told:
            # Unless another run wrote it, or deleted it, meanwhile.
            storage.replace(storage.join(grids, name, ITEM), storage.as_json(placed), tag)
        told = placed
    return pystac.Item.from_dict(told, migrate=False, preserve_dict=False)


def _stored_item(grids: str, name: str) -> tuple[dict[str, Any], str] | None:
    """Returns the item of a version and the tag of its object; none where it has none."""
    try:
        data, tag = storage.read_tagged(storage.join(grids, name, ITEM))
    except FileNotFoundError:
        return None
    return json.loads(data), tag


def make_collection(
    items: dict[str, pystac.Item], latest: str, known: Mapping[str, Version] = MappingProxyType({})
) -> pystac.Collection:
    """Returns the Collection of items by id; its links tell of each its line, and whether it was withdrawn."""
    shown = items[latest]
    own = {
        "emb:type": "pixel",
        "emb:dimensions": _dimensions(shown),
        "emb:fit_for_use": ["classification", "regression", "retrieval"],
        "sci:publications": [RANGE],
        "item_assets": _asset_kinds(items.values()),
    }
    names = [name for name in (*SHOWN, "version") if name in shown.properties]
    collection = pystac.Collection(
        id=IDENTITY,
        title="RANGE geo-embeddings of the land",
        description=f"Grids of RANGE embeddings, one Item per version. The latest: {shown.properties['description']}.",
        keywords=["embeddings", "satellite images", "land", "machine learning"],
        license="proprietary",
        extent=_extent(items.values()),
        stac_extensions=OF_COLLECTION,
        summaries=_summaries(items.values()),
        extra_fields=own | {name: shown.properties[name] for name in names},
    )
    collection.clear_links()  # of pystac's own, which are absolute
    collection.add_links(_links(items, latest, known))
    return collection


def _summaries(items: Collection[pystac.Item]) -> pystac.Summaries:
    found: dict[str, Any] = {}
    for name in ("data_type", "gsd", "proj:code", "rangegrid:line"):
        told = {item.properties[name] for item in items if item.properties.get(name) is not None}
        if told:
            found[name] = sorted(told)
    found["emb:dimensions"] = sorted({_dimensions(item) for item in items})
    return pystac.Summaries(found, maxcount=len(items) + 1)  # pystac leaves out a list of `maxcount` values


def _asset_kinds(items: Collection[pystac.Item]) -> dict[str, Any]:
    """Returns of every asset that an item has what it is, wherever it lies."""
    every = {key: asset for item in items for key, asset in item.assets.items()}
    return {key: {"title": a.title, "type": a.media_type, "roles": a.roles} for key, a in sorted(every.items())}


def _links(items: dict[str, pystac.Item], latest: str, known: Mapping[str, Version]) -> list[pystac.Link]:
    shown = items[latest]
    links = [pystac.Link("root", f"./{COLLECTION}", pystac.MediaType.JSON)]
    links += [_link("item", name, known.get(name)) for name in items]
    links.append(_link(succession.LATEST, latest, known.get(latest)))
    for link in shown.links:
        if str(link.rel).startswith("emb:"):
            links.append(pystac.Link(link.rel, _from_collection(latest, str(link.target)), link.media_type, link.title))
    if COPERNICUS in shown.properties["description"]:
        links.append(pystac.Link("license", LEGAL_NOTICE, title="Terms of Copernicus Sentinel data"))
    return links + cited([RANGE])


def _from_collection(name: str, href: str) -> str:
    """Returns the address of a version's link as the collection sees it."""
    if urlsplit(href).scheme:
        return href
    return "./" + posixpath.normpath(posixpath.join(name, href))


def _link(rel: str, name: str, version: Version | None) -> pystac.Link:
    link = pystac.Link(rel, f"./{name}/{ITEM}", pystac.MediaType.GEOJSON)
    if version is not None:
        link.title = f"{version.line}, {version.state}"
        link.extra_fields = {"rangegrid:line": version.line, "rangegrid:state": version.state}
        if version.state == "withdrawn":
            link.extra_fields["deprecated"] = True
    return link


def _extent(items: Collection[pystac.Item]) -> pystac.Extent:
    """Returns the extent of all items, with each of several time windows after the whole.

    In space it is all around the globe where an item crosses 180 degrees, which pystac overlooks.
    """
    extent = pystac.Extent.from_items(items)
    if any(item.bbox and item.bbox[0] > item.bbox[2] for item in items):
        ((_, south, _, north),) = extent.spatial.bboxes
        extent.spatial = pystac.SpatialExtent([[-180.0, south, 180.0, north]])
    ends = ((item.common_metadata.start_datetime, item.common_metadata.end_datetime) for item in items)
    windows = sorted({(start, end) for start, end in ends if start and end})
    if len(windows) > 1:
        extent.temporal.intervals += [list(window) for window in windows]
    return extent


def _dimensions(item: pystac.Item) -> int:
    """Returns the length of a vector, from the dimensions of the embedding or of its blocks."""
    cube = item.properties["cube:dimensions"].values()
    return sum(dim["extent"][1] + 1 for dim in cube if dim["type"] == "embedding")
