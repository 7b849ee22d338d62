"""Reads windows of cloud-optimised GeoTIFFs in their own projection, by few requests.

The bytes are fetched here, all that a scene needs at once, into sparse local files, and GDAL decodes those. So a
request can be counted, verified and repeated, latency is paid twice per scene (headers, then tiles), and what a
header or a tile holds is judged by a parser that stands corrupt bytes.
"""

import asyncio
import os
import struct
import warnings
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar, cast

import numpy as np
import rasterio
from affine import TransformNotInvertibleError
from numpy.typing import NDArray
from pyproj import Transformer
from pyproj.exceptions import ProjError
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from infra.errors import UserError
from infra.imagery.ranges import Ranges, RefusedAsset, Traffic, UnavailableAsset, UnreadableAsset, merged, run
from infra.imagery.tiffs import CorruptHeader, fetch_header

__all__ = ["RefusedAsset", "Traffic", "UnavailableAsset", "UnreadableAsset", "read_scene", "read_windows"]

T = TypeVar("T")

READINGS = 3  # reads of an asset whose bytes do not decode: damage on the way passes, damage at the source does not
HEADER = 16_384  # bytes of the first read: the header of a 10,980-pixel band with overviews takes 7,000
LARGEST_BLOCK = 1 << 28  # most bytes of a decoded tile or strip: a whole 10,980-pixel band takes 0.9 of it
TOGETHER = 1 << 22  # most pixels that are read at once for several windows
LEADER = 4  # bytes around a tile, in which GDAL's COGs repeat its size and its end
NUMBERS = ("uint8", "uint16")  # types of the scene classification and the bands
NODATA = 0  # nodata in what is returned, whatever the file has
TIE = 1e-4  # pixels; a place this near to an edge goes to the second pixel, despite rounding
PIXELS_ONLY = {"GEOREF_SOURCES": "NONE"}  # what the header tells of the CRS takes as long as all else of it
GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 128}

Grid = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Columns and rows of the asset under each column and row of a window."""
Grids = Sequence[Grid | None]
Windows = list[NDArray | None]
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # of masks, which lie on their pixels' grid
CORRUPT = (CorruptHeader, RasterioError, CRSError, ProjError, TransformNotInvertibleError, struct.error)


def read_scene(
    hrefs: Mapping[str, str],
    lonlat: NDArray[np.float64],
    pixels: int,
    resolution_m: float,
    traffic: Traffic | None = None,
) -> dict[str, Windows]:
    """Reads square windows of a scene's assets around places: one open per asset, all assets and windows at once.

    A coarser asset (20 and 60 m bands, the scene classification) is brought to `resolution_m` by its nearest
    pixels, from one corner per place for all bands: nothing is blended, so no nodata is, and all bands register.
    A window that crosses the edge is refused, never padded. Where a pixel lies is told by the file's header alone:
    items contradict it. Pixels that the file declares to have no data (its header's nodata, tiles without bytes, its
    mask) are 0.

    Args:
        hrefs: Unsigned href (HTTP, `s3://`, or a path) by the asset's name.
        lonlat: (n, 2) places in degrees; none: the headers alone are read, and judged.
        pixels: Side of the windows.
        resolution_m: Pixel size of the windows in metres.
        traffic: Counts the requests and bytes, also of what fails.

    Returns:
        By the asset's name one (pixels, pixels) array per place, or None where the window leaves the asset.

    Raises:
        UnreadableAsset: An asset is gone, stays corrupt, is no COG of one integer band, or has another corner.
        RefusedAsset: An asset's server forbids it, after all attempts.
        UnavailableAsset: An asset's server is down or busy, after all attempts.
        UserError: A pixel size does not fit.
    """
    counted = Traffic() if traffic is None else traffic
    assets = {name: Ranges(href, counted) for name, href in hrefs.items()}
    return run(_read_scene(assets, Places(lonlat, pixels, resolution_m)))


def read_windows(href: str, lonlat: NDArray[np.float64], pixels: int, resolution_m: float) -> Windows:
    """Reads the windows of one asset; see `read_scene`."""
    return read_scene({"asset": href}, lonlat, pixels, resolution_m)["asset"]


@dataclass(frozen=True)
class Places:
    """The windows to read."""

    lonlat: NDArray[np.float64]
    pixels: int
    resolution_m: float

    def grids(self, source: rasterio.DatasetReader) -> list[Grid | None]:
        """Returns the pixels of an asset under each window, or None where a window crosses its edge.

        The windows' grid begins at the asset's own corner, which the bands of a scene share (`_register` holds them to
        it), and is reckoned from the corner and `resolution_m` alone: so a place gets the same window in every band.
        Every pixel takes the asset's that holds its centre.
        """
        factor = self._factor(source.res[0])
        x, y = _to_native(source.crs).transform(self.lonlat[:, 0], self.lonlat[:, 1])
        left, top = source.transform.c, source.transform.f
        middles = np.column_stack([np.asarray(x) - left, top - np.asarray(y)]) / self.resolution_m
        corners = np.floor(middles - self.pixels / 2 + 0.5 + TIE)
        size = np.array([source.width, source.height]) * factor
        return [self._grid(corner, size, factor) for corner in corners]

    def _grid(self, corner: NDArray[np.float64], size: NDArray[np.intp], factor: int) -> Grid | None:
        if not ((corner >= 0) & (corner + self.pixels <= size)).all():  # also where a place has no coordinates
            return None
        columns, rows = ((int(start) + np.arange(self.pixels)) // factor for start in corner)
        return columns, rows

    def _factor(self, size_m: float) -> int:
        """Returns the pixels of a window along one side of a pixel of the asset."""
        ratio = size_m / self.resolution_m
        if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise UserError(
                f"an asset of {size_m:g} m pixels does not fit windows of {self.resolution_m:g} m pixels: its pixel "
                "size must be a whole multiple of that"
            )
        return round(ratio)


@lru_cache(maxsize=256)
def _to_native(crs: rasterio.CRS) -> Transformer:
    """Returns what projects degrees (lon, lat) to a CRS: to make one takes longer than to project many places."""
    return Transformer.from_crs(4326, crs, always_xy=True)


@dataclass(frozen=True)
class Layer:
    """The windows of one asset."""

    windows: Windows
    """The windows, one per place."""
    crs: rasterio.CRS
    """CRS of the asset."""
    corner: tuple[float, float]
    """The asset's upper left corner, x and y."""


async def _read_scene(assets: Mapping[str, Ranges], places: Places) -> dict[str, Windows]:
    work = (_read_asset(asset, places) for asset in assets.values())
    found = await asyncio.gather(*work, return_exceptions=True)  # all end, so that nothing goes on behind an error
    errors = [layer for layer in found if isinstance(layer, BaseException)]
    if errors:
        error = min(errors, key=_weight)
        if isinstance(error, RefusedAsset):
            served = [asset for asset, layer in zip(assets.values(), found, strict=True) if isinstance(layer, Layer)]
            error.neighbours += tuple(asset.href for asset in served)
        raise error
    layers = cast("list[Layer]", found)
    _register(list(assets.values()), layers, places.resolution_m)
    return {name: layer.windows for name, layer in zip(assets, layers, strict=True)}


def _weight(error: BaseException) -> int:
    """Orders errors by what they tell of a scene: our own faults, then missing assets, then outages."""
    kinds = (RefusedAsset, UnavailableAsset, UnreadableAsset)
    return -next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), len(kinds))


def _register(assets: list[Ranges], layers: list[Layer], resolution_m: float) -> None:
    """Refuses a scene whose assets do not begin at one corner: their windows would lie apart."""
    for asset, layer in zip(assets, layers, strict=True):
        apart = np.abs(np.subtract(layer.corner, layers[0].corner)).max()
        if layer.crs != layers[0].crs or not apart <= 1e-3 * resolution_m:
            raise asset.failure(
                UnreadableAsset, f"its corner is {layer.corner} in {layer.crs}, another band's {layers[0].corner}"
            )


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns results of concurrent work; raises the first error once all has ended, so that nothing runs on."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            raise error
    return cast("list[T]", results)


async def _read_asset(asset: Ranges, places: Places) -> Layer:
    """Reads the windows of one asset, anew while its bytes do not decode."""
    if asset.lies_beside(".msk"):
        raise asset.failure(UnreadableAsset, "its mask is in a file of its own, .msk, which is not read")
    problem = ""
    for _ in range(READINGS):
        try:
            with _sparse_file() as (file, name):
                sparse = Sparse(asset, file)
                mask = await fetch_header(sparse.take)
                if mask is None:
                    names = [name]
                else:
                    names = [name, f"GTIFF_DIR:off:{mask}:{name}"]
                plan = await asyncio.to_thread(_plan, names, places, asset.size)
                await _all(sparse.fetch(*span) for span in merged(plan.spans))
                return Layer(await asyncio.to_thread(_decode, names, plan.grids), plan.crs, plan.corner)
        except CORRUPT as error:  # a header has no checksum: what it says may be so on the way alone
            problem = str(error) if isinstance(error, CorruptHeader) else ""
    raise asset.failure(UnreadableAsset, problem or "its bytes are corrupt")


@contextmanager
def _sparse_file() -> Iterator[tuple[int, str]]:
    """Yields descriptor and path of a file for the bytes of one asset; on Linux in memory."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("asset"), "wb+") as file:
            yield file.fileno(), f"/proc/self/fd/{file.fileno()}"
    else:
        with NamedTemporaryFile(suffix=".tif") as named:
            yield named.fileno(), named.name


class Sparse:
    """The fetched bytes of an asset, in a sparse file as large as the asset."""

    def __init__(self, asset: Ranges, file: int) -> None:
        self.asset, self.file = asset, file
        self.there: list[tuple[int, int]] = []

    async def fetch(self, start: int, stop: int) -> None:
        """Writes bytes into the file."""
        os.pwrite(self.file, await self.asset.read(start, stop), start)

    async def take(self, start: int, stop: int) -> bytes:
        """Returns bytes of the header, and fetches what follows them too.

        Raises:
            CorruptHeader: The asset has no such bytes.
        """
        if not any(first <= start and stop <= last for first, last in self.there):
            if self.there and stop > self.asset.size:
                raise CorruptHeader
            ahead = max(stop, start + HEADER)
            await self.fetch(start, min(ahead, self.asset.size) if self.there else ahead)
            self.there.append((start, min(ahead, self.asset.size)))
            os.ftruncate(self.file, self.asset.size)
        return os.pread(self.file, stop - start, start)


@dataclass(frozen=True)
class Plan:
    """What the header of an asset tells."""

    spans: list[tuple[int, int]]
    """Byte ranges of the tiles under the windows, of its mask too."""
    grids: Grids
    """The pixels under each window."""
    crs: rasterio.CRS
    """CRS of the asset."""
    corner: tuple[float, float]
    """The asset's upper left corner, x and y."""


def _plan(names: list[str], places: Places, size: int) -> Plan:
    """Reads the header of an asset and of its mask.

    Raises:
        CorruptHeader: It is no band, or contradicts itself; the text says how.
    """
    with rasterio.Env(**GDAL), rasterio.open(names[0], driver="GTiff") as source:
        _check(_problem(source))
        grids = places.grids(source)
        spans = _spans(source, grids)
        for name in names[1:]:
            with rasterio.open(name, driver="GTiff", **PIXELS_ONLY) as mask:
                if mask.shape != source.shape or mask.count != 1:
                    raise CorruptHeader(f"its mask of {mask.shape} is not for its {source.shape} pixels")
                _check(_large(mask), "of its mask, ")
                spans += _spans(mask, grids)
        if any(stop > size + LEADER for _, stop in spans):
            raise CorruptHeader
        return Plan(spans, grids, source.crs, (source.transform.c, source.transform.f))


def _check(problem: str, of: str = "") -> None:
    """Refuses an image that has a problem."""
    if problem:
        raise CorruptHeader(of + problem)


def _problem(source: rasterio.DatasetReader) -> str:
    """Returns why an image is no band; empty where it is one."""
    if source.count != 1 or source.dtypes[0] not in NUMBERS or not source.crs:
        return f"bands: {', '.join(source.dtypes)}, in {source.crs or 'no CRS'}"
    grid = source.transform
    if grid.b or grid.d or grid.a <= 0 or abs(grid.a + grid.e) > 1e-6 * grid.a:
        return f"its pixels are not square with north up: {tuple(grid)[:6]}"
    return _large(source)


def _large(source: rasterio.DatasetReader) -> str:
    """Returns why the tiles of an image are too large to decode; empty where they are not."""
    height, width = source.block_shapes[0]
    fits = height * width * np.dtype(source.dtypes[0]).itemsize <= LARGEST_BLOCK
    if fits:
        return ""
    return f"its tiles have {width} x {height} pixels"


def _spans(source: rasterio.DatasetReader, grids: Grids) -> list[tuple[int, int]]:
    """Returns the byte ranges of the tiles under the windows.

    Raises:
        CorruptHeader: A tile is longer than any of its pixels.
    """
    spans = [span for tile in _tiles(source, grids) if (span := _span(source, tile))]
    height, width = source.block_shapes[0]
    largest = 2 * width * height * np.dtype(source.dtypes[0]).itemsize  # deflate adds less than a thousandth
    if any(stop - start > largest + 2 * LEADER for start, stop in spans):
        raise CorruptHeader
    return spans


def _tiles(source: rasterio.DatasetReader, grids: Grids) -> set[tuple[int, int]]:
    """Returns column and row of the tiles under the windows."""
    height, width = source.block_shapes[0]
    return {
        tile
        for columns, rows in filter(None, grids)
        for tile in product(
            range(columns[0] // width, columns[-1] // width + 1), range(rows[0] // height, rows[-1] // height + 1)
        )
    }


def _span(source: rasterio.DatasetReader, tile: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the first byte of a tile and the one after its last, or None for a tile without bytes (nodata)."""
    where, size = (source.get_tag_item(f"BLOCK_{what}_{tile[0]}_{tile[1]}", "TIFF", 1) for what in ("OFFSET", "SIZE"))
    if where and size:
        return (max(0, int(where) - LEADER), int(where) + int(size) + LEADER)
    return None


def _decode(names: list[str], grids: Grids) -> Windows:
    """Returns the pixels under each window, 0 where the asset declares to have none."""
    with rasterio.Env(**GDAL), rasterio.open(names[0], driver="GTiff", **PIXELS_ONLY) as source:
        windows = _read(source, grids)
        for window in windows:
            if window is not None and source.nodata:
                window[window == source.nodata] = NODATA
        for name in names[1:]:
            with rasterio.open(name, driver="GTiff", **PIXELS_ONLY) as mask:
                for window, hidden in zip(windows, _read(mask, grids), strict=True):
                    if window is not None:
                        window[hidden == 0] = NODATA
        return windows


def _read(source: rasterio.DatasetReader, grids: Grids) -> Windows:
    """Returns the pixels under each window: read at once where no other tile lies among theirs, else one by one.

    A read costs a fraction of a millisecond however small the window is, and a tile among theirs may not be there.
    """
    inside = [grid for grid in grids if grid is not None]
    if not inside:
        return [None] * len(grids)
    columns, rows = (np.sort(np.concatenate(axis)) for axis in zip(*inside, strict=True))
    is_small = (columns[-1] - columns[0] + 1) * (rows[-1] - rows[0] + 1) <= TOGETHER
    if is_small and _tiles(source, [(columns, rows)]) == _tiles(source, grids):
        return _within(source, (columns, rows), grids)
    return [grid and _within(source, grid, [grid])[0] for grid in grids]


def _within(source: rasterio.DatasetReader, extent: Grid, grids: Grids) -> Windows:
    """Returns windows by one read of all from the first to the last pixel of an extent, which holds them."""
    columns, rows = extent
    data = source.read(1, window=Window.from_slices((rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)))
    return [grid and data[np.ix_(grid[1] - rows[0], grid[0] - columns[0])] for grid in grids]
