"""Reads windows of Zarr arrays of one band, in version 2 and 3: each chunk under them is fetched and decoded once.

Zarr itself decodes, from a store of `infra.imagery.ranges`: so requests are counted, checked, repeated and led as those
of files are. An array of version 2 is read as one of version 3 with the same chunks, so that one set of codecs is
bounded (`infra.decoding`).

Where the pixels lie is told by the store: by the coordinates `x` and `y` beside the array, else by attributes of the
array, of its grid mapping or its groups. The item's CRS counts only where the store tells none.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyproj
import rasterio
from affine import Affine
from numpy.typing import NDArray
from pyproj.exceptions import ProjError
from zarr import AsyncArray
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import StorePath

from infra.addresses import is_web
from infra.decoding import unbounded
from infra.errors import UserError
from infra.imagery.ranges import MissingAsset, Ranges, RefusedAsset, every
from infra.imagery.tiffs import CorruptHeader
from infra.imagery.windows import NODATA, Frame, Grids, Layer, Places, Windows, check, tiles_under
from infra.zarr_stores import WebStore

DOCUMENTS = {"zarr": ("zarr.json", ".zarray"), "zarr3": ("zarr.json",), "zarr2": (".zarray", "zarr.json")}
LARGEST_DOCUMENT = 1 << 24  # bytes of metadata; a group's may hold those of all below it
LARGEST_AXIS = 1 << 17  # most coordinates along an axis
MOST_PARTS = 1 << 20  # most chunks of a shard
SPARE = 1 << 24  # bytes by which a shard may exceed twice its pixels: its index has 16 a chunk
AT_ONCE = 8  # chunks of an array that are decoded at a time
SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")  # of Blosc, by the number that version 2 has
CRS_KEYS = ("proj:code", "proj:epsg", "proj:wkt2", "proj:projjson", "crs_wkt", "spatial_ref", "horizontal_CRS_code")
TRANSFORM_KEYS = ("proj:transform", "spatial:transform")
WITHIN = (("other_metadata",), ("stac_discovery", "properties"))  # where EOPF's products tell their CRS
ABOVE = 6  # most groups above an array that are asked: `x.zarr/measurements/reflectance/r10m` has 4
WRONG = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)

Key = tuple[str, int, int]


@dataclass
class Objects:
    """The objects of one scene's arrays, each fetched once: bands share coordinates and windows share chunks."""

    held: dict[Key, asyncio.Task[bytes]] = field(default_factory=dict)
    """Bytes that were asked for, by href, start and stop."""
    known: dict[str, Ranges] = field(default_factory=dict)
    """What reads each object, by href."""

    def of(self, node: Ranges, href: str) -> Ranges:
        """Returns what reads an object, by the way to a node of its store."""
        return self.known.setdefault(href, Ranges(replace(node.asset, href=href), node.traffic))

    async def read(self, ranges: Ranges, start: int, stop: int) -> bytes:
        """Returns bytes of an object; fewer where it ends."""
        key = (ranges.asset.href, start, stop)
        if key not in self.held:
            self.held[key] = asyncio.ensure_future(ranges.read(start, stop))
        return await self.held[key]

    def forget(self) -> None:
        """Lets what was asked for be fetched anew."""
        self.held.clear()


@dataclass(frozen=True)
class Node:
    """An array or a group of a store."""

    asset: Ranges
    """Where it is."""
    objects: Objects
    """What was fetched."""

    @property
    def href(self) -> str:
        """Returns its href."""
        return self.asset.asset.href

    def below(self, key: str) -> "Node":
        """Returns an object, array or group below."""
        return Node(self.objects.of(self.asset, _below(self.href, key)), self.objects)

    def above(self) -> "Node":
        """Returns the group that holds it."""
        return Node(self.objects.of(self.asset, _above(self.href)), self.objects)

    async def document(self, name: str) -> dict[str, Any]:
        """Returns a JSON object of metadata.

        Raises:
            MissingAsset: There is none.
            CorruptHeader: It is none.
        """
        found = json.loads(await self.objects.read(self.below(name).asset, 0, LARGEST_DOCUMENT))
        if not isinstance(found, dict):
            raise CorruptHeader(f"{name} is no metadata")
        return found

    async def first(self, names: Iterable[str]) -> tuple[str, dict[str, Any]]:
        """Returns the first document that there is, and its name; one that is refused is there only if no other is."""
        refused: RefusedAsset | None = None
        for name in names:
            try:
                return name, await self.document(name)
            except MissingAsset:
                continue
            except RefusedAsset as error:
                refused = refused or error
        raise refused or self.asset.failure(MissingAsset, "no Zarr is there")

    async def zattrs(self) -> dict[str, Any]:
        """Returns the attributes of an array of version 2; empty where it has none."""
        with suppress(MissingAsset, RefusedAsset):
            return await self.document(".zattrs")
        return {}

    async def attributes(self) -> dict[str, Any]:
        """Returns the attributes of an array or group; empty where it has none."""
        with suppress(MissingAsset, RefusedAsset):
            name, found = await self.first(("zarr.json", ".zattrs"))
            return dict(found.get("attributes", {})) if name == "zarr.json" else found
        return {}


def _below(href: str, key: str) -> str:
    """Returns the href of what is below another; a query signs it too."""
    if not is_web(href):
        return f"{href.rstrip('/')}/{key}"
    parts = urlsplit(href)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{key}").geturl()


def _above(href: str) -> str:
    """Returns the href of the group that holds an array or a group."""
    if not is_web(href):
        return href.rstrip("/").rpartition("/")[0]
    parts = urlsplit(href)
    return parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]).geturl()


@dataclass(frozen=True)
class Band:
    """An array that holds a band."""

    node: Node
    """Where it is."""
    array: AsyncArray[Any]
    """It, without the attributes of version 2."""
    attributes: dict[str, Any]
    """Its attributes."""
    axes: tuple[str, str]
    """Names of the coordinates of rows and columns."""

    @property
    def nodata(self) -> set[Any]:
        """Returns the numbers that mean no data: what chunks without bytes hold, and what the attributes tell."""
        told = (self.attributes.get(name) for name in ("_FillValue", "missing_value", "nodata"))
        return {self.array.metadata.fill_value, *(value for value in told if isinstance(value, int | float))}


async def read(asset: Ranges, places: Places, objects: Objects) -> Layer:
    """Reads the windows of an array.

    Args:
        asset: The array; its last part may be written in the other case.
        places: The windows.
        objects: What was fetched of the scene.

    Raises:
        CorruptHeader: It is no band, contradicts itself, or does not decode.
    """
    try:
        band = await _open(Node(asset, objects))
        frame = await _frame(band)
        check(frame)
        grids = places.grids(frame)
        return Layer(await _decode(band, frame, grids), frame.crs, frame.corner)
    except (UserError, CorruptHeader):
        raise
    except WRONG as error:
        raise CorruptHeader(f"its array does not decode, {type(error).__name__}") from error


async def _open(node: Node) -> Band:
    """Opens the array of a band."""
    band = await _array(*await _found(node))
    if band.array.ndim != 2 or np.dtype(band.array.dtype).kind not in "iufb":
        raise CorruptHeader(f"bands: an array of {band.array.dtype} {band.array.shape}")
    return band


async def _array(node: Node, name: str, told: dict[str, Any]) -> Band:
    """Returns an array by its metadata, after a check that what is read of it takes memory in proportion."""
    if name == ".zarray":
        attributes = await node.zattrs()
        axes, told = attributes.get("_ARRAY_DIMENSIONS"), _as_version_3(told)
    else:
        attributes, axes = dict(told.get("attributes") or {}), told.get("dimension_names")
    if told.get("node_type", "array") != "array":
        raise CorruptHeader("it is a group of Zarr, no array")
    store = Stored(node)
    array = AsyncArray.from_dict(StorePath(store), told | {"attributes": {}})
    if codec := unbounded(array.metadata.codecs):
        raise CorruptHeader(f"it is packed by {codec}, which is not read: zstd, gzip and blosc are")
    shards = array.shards or array.chunks
    if min(array.shape) < 1 or prod(map(lambda whole, part: whole // part, shards, array.chunks)) > MOST_PARTS:
        raise CorruptHeader(f"it is of shape {array.shape}, in shards of {shards} and chunks of {array.chunks}")
    store.most = 2 * prod(array.chunks) * np.dtype(array.dtype).itemsize + SPARE
    if not isinstance(axes, list | tuple) or len(axes) != 2:
        axes = ("y", "x")
    return Band(node, array, attributes, (str(axes[0]), str(axes[1])))


class Stored(WebStore):
    """Zarr's view of the objects below an array."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.href)
        self.node = node
        self.most = 0  # bytes of an object that is read whole

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        ranges, objects = self.node.below(key).asset, self.node.objects
        try:
            if isinstance(byte_range, RangeByteRequest):
                body = await objects.read(ranges, byte_range.start, byte_range.end)
            elif isinstance(byte_range, SuffixByteRequest):
                await objects.read(ranges, 0, 1)  # tells the size
                body = await objects.read(ranges, max(ranges.size - byte_range.suffix, 0), ranges.size)
            else:
                body = await objects.read(ranges, 0, self.most)
        except MissingAsset:
            return None
        return prototype.buffer.from_bytes(body)


async def _found(node: Node) -> tuple[Node, str, dict[str, Any]]:
    """Returns an array's node and metadata: EOPF writes bands in lower case, and items tell either."""
    documents = DOCUMENTS[node.asset.asset.format]
    name = urlsplit(node.href).path.rstrip("/").rpartition("/")[2]
    try:
        return node, *await node.first(documents)
    except MissingAsset:
        if name.swapcase() == name:
            raise
        other = node.above().below(name.swapcase())
        return other, *await other.first(documents)


def _as_version_3(told: dict[str, Any]) -> dict[str, Any]:
    """Returns metadata of version 2 in version 3: the same chunks, by codecs that are bounded."""
    kind = np.dtype(told["dtype"])
    packing = told.get("compressor")
    if told.get("filters"):
        raise CorruptHeader(f"it is filtered by {', '.join(each['id'] for each in told['filters'])}")
    codecs: list[dict[str, Any]] = [
        {"name": "bytes", "configuration": {"endian": "big" if kind.str[0] == ">" else "little"}}
    ]
    if told.get("order") == "F":
        codecs.insert(0, {"name": "transpose", "configuration": {"order": [1, 0]}})
    if packing:
        codecs.append(_packed(packing, kind.itemsize))
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": told["shape"],
        "data_type": kind.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": told["chunks"]}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": told.get("dimension_separator", ".")}},
        "fill_value": told.get("fill_value") or 0,
        "codecs": codecs,
    }


def _packed(packing: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns a compressor of version 2 in version 3."""
    name, level = packing["id"], packing.get("level", 1)
    if name == "zstd":
        return {"name": name, "configuration": {"level": level, "checksum": bool(packing.get("checksum"))}}
    if name == "gzip":
        return {"name": name, "configuration": {"level": level}}
    if name != "blosc":
        raise CorruptHeader(f"it is packed by {name}, which is not read: zstd, gzip and blosc are")
    shuffle = SHUFFLES[max(packing.get("shuffle", 1), 0)]
    how = {"cname": packing.get("cname", "lz4"), "clevel": packing.get("clevel", 5), "shuffle": shuffle}
    return {"name": name, "configuration": how | {"typesize": size, "blocksize": packing.get("blocksize", 0)}}


async def _frame(band: Band) -> Frame:
    """Returns where an array's pixels lie."""
    above, mapping = band.node.above(), band.attributes.get("grid_mapping")
    rows, columns = (int(n) for n in band.array.shape)
    y, x = await every(_axis(above.below(name), n) for name, n in zip(band.axes, (rows, columns), strict=True))
    told = [band.attributes]
    if isinstance(mapping, str):
        told.append(await above.below(mapping).attributes())
    told.append(await above.attributes())
    transform = _by_axes(x, y) or next(filter(None, map(_by_attributes, told)), None)
    if transform is None:
        raise CorruptHeader("nothing tells where its pixels lie: neither coordinates beside it nor attributes")
    block = (int(band.array.chunks[0]), int(band.array.chunks[1]))
    return Frame(await _crs(band, told), transform, (rows, columns), block, (np.dtype(band.array.dtype).name,))


async def _axis(node: Node, count: int) -> NDArray[np.float64] | None:
    """Returns the coordinates along an axis, or None where there are none."""
    try:
        found = await _array(node, *await node.first(("zarr.json", ".zarray")))
    except (MissingAsset, RefusedAsset):
        return None
    if found.array.shape != (count,) or count > LARGEST_AXIS or max(found.array.chunks) > LARGEST_AXIS:
        raise CorruptHeader(f"its coordinates are of shape {found.array.shape}, and its side has {count} pixels")
    return np.asarray(await found.array.getitem(slice(None)), np.float64)


def _by_axes(x: NDArray[np.float64] | None, y: NDArray[np.float64] | None) -> Affine | None:
    """Returns the grid whose pixels' centres have these coordinates, or None where there are none.

    Raises:
        CorruptHeader: They are not evenly spaced.
    """
    if x is None or y is None or min(len(x), len(y)) < 2:
        return None
    steps = [(axis[-1] - axis[0]) / (len(axis) - 1) for axis in (x, y)]
    for axis, step in zip((x, y), steps, strict=True):
        if not np.abs(np.diff(axis) - step).max() <= 1e-3 * abs(step):
            raise CorruptHeader("its coordinates are not evenly spaced")
    return Affine(steps[0], 0, x[0] - steps[0] / 2, 0, steps[1], y[0] - steps[1] / 2)


def _by_attributes(told: Mapping[str, Any]) -> Affine | None:
    """Returns the grid that attributes tell: six or nine numbers, or GDAL's text of six in another order."""
    if isinstance(text := told.get("GeoTransform"), str):
        return Affine.from_gdal(*map(float, text.split()))
    found = next((told[key] for key in TRANSFORM_KEYS if isinstance(told.get(key), list)), None)
    if found is None:
        return None
    return Affine(*map(float, found[:6]))


async def _crs(band: Band, told: Sequence[Mapping[str, Any]]) -> rasterio.CRS | None:
    """Returns the CRS that the attributes tell, else that of a group above, else the item's."""
    for attributes in told:
        if found := _crs_of(attributes):
            return found
    group = band.node.above()
    for _ in range(ABOVE):
        if urlsplit(group.href).path.endswith(".zarr") or "/" not in urlsplit(group.href).path.strip("/"):
            break
        group = group.above()
        if found := _crs_of(await group.attributes()):
            return found
    return _crs_of({"proj:code": band.node.asset.asset.crs})


def _crs_of(attributes: Mapping[str, Any]) -> rasterio.CRS | None:
    """Returns the CRS that attributes tell, or None."""
    places = [attributes]
    for path in WITHIN:
        inner: Any = attributes
        for name in path:
            inner = inner.get(name) if isinstance(inner, dict) else None
        places += [inner] if isinstance(inner, dict) else []
    for value in (place[key] for place in places for key in CRS_KEYS if place.get(key)):
        with suppress(ProjError):
            known = pyproj.CRS.from_user_input(int(value) if str(value).isdigit() else value)
            code = known.to_epsg()
            return rasterio.CRS.from_epsg(code) if code else rasterio.CRS.from_wkt(known.to_wkt())
    return None


async def _decode(band: Band, frame: Frame, grids: Grids) -> Windows:
    """Returns the pixels under each window, 0 where the array declares to have none."""
    kind = np.dtype(frame.dtypes[0])
    windows: Windows = [grid and np.empty((len(grid[1]), len(grid[0])), kind) for grid in grids]
    few = asyncio.Semaphore(AT_ONCE)

    async def decode(column: int, row: int) -> None:
        top, left = row * frame.block[0], column * frame.block[1]
        part = (slice(top, top + frame.block[0]), slice(left, left + frame.block[1]))
        async with few:
            data = np.asarray(await band.array.getitem(part)).astype(kind)
        data[np.isin(data, list(band.nodata))] = NODATA
        for window, grid in zip(windows, grids, strict=True):
            if window is not None and grid is not None:
                _put(window, grid, data, left, top)

    await every(decode(*tile) for tile in sorted(tiles_under(frame.block, grids)))
    return windows


def _put(window: NDArray, grid: tuple[NDArray, NDArray], data: NDArray, left: int, top: int) -> None:
    """Puts what a chunk has of a window into it."""
    columns, rows = grid[0] - left, grid[1] - top
    x = np.flatnonzero((columns >= 0) & (columns < data.shape[1]))
    y = np.flatnonzero((rows >= 0) & (rows < data.shape[0]))
    window[np.ix_(y, x)] = data[np.ix_(rows[y], columns[x])]
