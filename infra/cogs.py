"""Windows of cloud-optimised GeoTIFFs in their own projection, by few requests.

The bytes are fetched here, all that a scene needs at once, into sparse local files, and GDAL decodes those. So a
request can be counted, verified and repeated, latency is paid twice per scene (headers, then tiles), and what a
header or a tile holds is judged by a parser that stands corrupt bytes.
"""

import asyncio
import os
import struct
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar, cast

import numpy as np
import rasterio
from affine import TransformNotInvertibleError
from numpy.typing import NDArray
from pyproj import Transformer
from pyproj.exceptions import ProjError
from rasterio.errors import CRSError, RasterioError
from rasterio.windows import Window

from infra.errors import UserError
from infra.ranges import Ranges, Traffic, UnavailableAsset, UnreadableAsset, merged, run

__all__ = ["Traffic", "UnavailableAsset", "UnreadableAsset", "read_scene", "read_windows"]

T = TypeVar("T")

READINGS = 3  # of an asset whose bytes make no sense: on the way they may be so once, at their source for ever
HEADER = 16_384  # bytes read at first: the header of a 10,980-pixel band with its overviews takes 7,000
LARGEST_HEADER = 1 << 24
LEADER = 4  # bytes around a tile in which GDAL's COGs repeat its size and its end
NUMBERS = ("uint8", "uint16")  # the scene classification and the bands
GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 128}

TIFFS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
SIZES = dict(enumerate((0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)))  # bytes of a value by its TIFF type

Grid = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Columns and rows of the asset under each column and row of a window."""
Windows = list[NDArray | None]


class CorruptHeader(Exception):
    """The first bytes of an asset are no TIFF header, or one that contradicts itself."""


CORRUPT = (CorruptHeader, RasterioError, CRSError, ProjError, TransformNotInvertibleError, struct.error)


def read_scene(
    hrefs: Mapping[str, str],
    lonlat: NDArray[np.float64],
    pixels: int,
    resolution_m: float,
    traffic: Traffic | None = None,
) -> dict[str, Windows]:
    """Square windows of a scene's assets around places: one open per asset, all assets and windows at once.

    A coarser asset (20 and 60 m bands, the scene classification) is brought to `resolution_m` by its nearest
    pixels, on the pixel grid of the finest band: nothing is blended, so no nodata is, and all bands register.
    A window that crosses the edge is refused, never padded. Where a pixel lies is told by the file's header alone:
    items contradict it.

    Args:
        hrefs: Unsigned href (HTTP, `s3://`, or a path) by the asset's name.
        lonlat: (n, 2) places in degrees.
        pixels: Side of the windows.
        resolution_m: Pixel size of the windows in metres.
        traffic: Counts the requests and bytes, also of what fails.

    Returns:
        By the asset's name one (pixels, pixels) array per place, or None where the window leaves the asset.

    Raises:
        UnreadableAsset: An asset is gone, stays corrupt, or is no COG of one integer band.
        UnavailableAsset: An asset's server is down, busy or forbids it, after all attempts.
        UserError: A pixel size does not fit.
    """
    counted = Traffic() if traffic is None else traffic
    assets = {name: Ranges(href, counted) for name, href in hrefs.items()}
    return run(_read_scene(assets, Places(lonlat, pixels, resolution_m)))


def read_windows(href: str, lonlat: NDArray[np.float64], pixels: int, resolution_m: float) -> Windows:
    """The windows of one asset; see `read_scene`."""
    return read_scene({"asset": href}, lonlat, pixels, resolution_m)["asset"]


@dataclass(frozen=True)
class Places:
    """Where windows are wanted."""

    lonlat: NDArray[np.float64]
    pixels: int
    resolution_m: float

    def grids(self, source: rasterio.DatasetReader) -> list[Grid | None]:
        """The pixels of an asset under each window, or None where a window crosses its edge.

        The windows' grid begins at the asset's own corner, which the bands of a scene share: so a place gets the
        same window in every band, whatever the band's pixel size. Every pixel takes the asset's that holds its centre.
        """
        factor = self._factor(source.res[0])
        to_native = Transformer.from_crs(4326, source.crs, always_xy=True)
        x, y = to_native.transform(self.lonlat[:, 0], self.lonlat[:, 1])
        columns, rows = ~source.transform @ (np.asarray(x), np.asarray(y))
        corners = np.rint(np.column_stack([columns, rows]) * factor - self.pixels / 2)
        size = np.array([source.width, source.height]) * factor
        return [self._grid(corner, size, factor) for corner in corners]

    def _grid(self, corner: NDArray[np.float64], size: NDArray[np.intp], factor: int) -> Grid | None:
        if not ((corner >= 0) & (corner + self.pixels <= size)).all():  # also where a place has no coordinates
            return None
        columns, rows = ((int(start) + np.arange(self.pixels)) // factor for start in corner)
        return columns, rows

    def _factor(self, size_m: float) -> int:
        """Pixels of a window along one side of a pixel of the asset."""
        ratio = size_m / self.resolution_m
        if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise UserError(
                f"an asset of {size_m:g} m pixels does not fit windows of {self.resolution_m:g} m pixels: its pixel "
                "size must be a whole multiple of that"
            )
        return round(ratio)


async def _read_scene(assets: Mapping[str, Ranges], places: Places) -> dict[str, Windows]:
    return dict(zip(assets, await _all(_read_asset(asset, places) for asset in assets.values()), strict=True))


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of work done at once; the first error is raised when all has ended, so that nothing goes on behind it."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            raise error
    return cast("list[T]", results)


async def _read_asset(asset: Ranges, places: Places) -> Windows:
    """The windows of one asset, which is read anew while its bytes make no sense, or none of a band."""
    problem = ""
    for _ in range(READINGS):
        with suppress(*CORRUPT), _sparse_file() as (file, name):
            await _fetch_header(asset, file)
            problem, spans = await asyncio.to_thread(_plan, name, places)
            if problem:
                continue  # a header has no checksum: what it says may be so on the way alone
            await _all(_fetch(asset, file, *span) for span in merged(spans))
            return await asyncio.to_thread(_decode, name, places)
    raise asset.failure(UnreadableAsset, problem or "its bytes are corrupt")


@contextmanager
def _sparse_file() -> Iterator[tuple[int, str]]:
    """Descriptor and path of a file for the bytes of one asset; in memory where the system can, i.e. Linux."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("asset"), "wb") as file:
            yield file.fileno(), f"/proc/self/fd/{file.fileno()}"
    else:
        with NamedTemporaryFile(suffix=".tif") as named:
            yield named.fileno(), named.name


async def _fetch(asset: Ranges, file: int, start: int, stop: int) -> None:
    os.pwrite(file, await asset.read(start, stop), start)


async def _fetch_header(asset: Ranges, file: int) -> None:
    """Puts an asset's header into a sparse file as large as the asset: nothing that GDAL parses is a hole."""
    head = await asset.read(0, HEADER)
    while (end := header_end(head)) > len(head):
        if end > min(asset.size, LARGEST_HEADER):
            raise CorruptHeader
        head += await asset.read(len(head), end)
    os.ftruncate(file, asset.size)
    os.pwrite(file, head, 0)


def header_end(head: bytes) -> int:
    """Where the first image's tags and their arrays end, as far as its beginning tells; TIFF 6.0 and BigTIFF.

    Raises:
        CorruptHeader: It is no TIFF.
        struct.error: It ends within its first bytes.
    """
    if head[:4] not in TIFFS:
        raise CorruptHeader
    order, big = TIFFS[head[:4]]
    size, entry, inline = ("Q", f"{order}HHQQ", 8) if big else ("I", f"{order}HHII", 4)
    (at,) = struct.unpack_from(order + size, head, inline)
    if at + 8 > len(head):
        return at + 8
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), head, at)
    at += 8 if big else 2
    ends = [at + count * struct.calcsize(entry)]
    if ends[0] <= len(head):
        tags = struct.iter_unpack(entry, head[at : ends[0]])
        arrays = ((where, number * SIZES.get(kind, 0)) for _, kind, number, where in tags)
        ends += [where + length for where, length in arrays if length > inline]
    return max(ends)


def _plan(name: str, places: Places) -> tuple[str, list[tuple[int, int]]]:
    """What makes an asset useless, and else the bytes of the tiles under the windows."""
    with rasterio.Env(**GDAL), rasterio.open(name, driver="GTiff") as source:
        if source.count != 1 or source.dtypes[0] not in NUMBERS or not source.crs:
            return f"bands: {', '.join(source.dtypes)}, in {source.crs or 'no CRS'}", []
        height, width = source.block_shapes[0]
        tiles = {
            tile
            for columns, rows in filter(None, places.grids(source))
            for tile in product(np.unique(columns // width), np.unique(rows // height))
        }
        spans = [span for tile in tiles if (span := _span(source, tile))]
        largest = 2 * width * height * np.dtype(source.dtypes[0]).itemsize  # deflate adds less than a thousandth
    if any(stop - start > largest or stop > os.stat(name).st_size + LEADER for start, stop in spans):
        raise CorruptHeader
    return "", spans


def _span(source: rasterio.DatasetReader, tile: tuple[int, int]) -> tuple[int, int] | None:
    """First byte of a tile and the one after its last, or None for a tile that is nodata by having no bytes."""
    where, size = (source.get_tag_item(f"BLOCK_{what}_{tile[0]}_{tile[1]}", "TIFF", 1) for what in ("OFFSET", "SIZE"))
    return (int(where) - LEADER, int(where) + int(size) + LEADER) if where and size else None


def _decode(name: str, places: Places) -> Windows:
    with rasterio.Env(**GDAL), rasterio.open(name, driver="GTiff") as source:
        return [grid and _read(source, *grid) for grid in places.grids(source)]


def _read(source: rasterio.DatasetReader, columns: NDArray[np.intp], rows: NDArray[np.intp]) -> NDArray:
    data = source.read(1, window=Window(columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1))
    return data[np.ix_(rows - rows[0], columns - columns[0])]
