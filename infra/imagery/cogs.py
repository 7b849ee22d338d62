"""Reads windows of a scene's assets in their own projection, by few requests: cloud-optimised GeoTIFFs here.

JPEG 2000 (`infra.imagery.jpeg2000`) and Zarr (`infra.imagery.zarrs`) are read by the same call. The bytes of a TIFF are
fetched here, all that a scene needs at once, into sparse local files, and GDAL decodes those. So a request can be
counted, verified and repeated, latency is paid twice per scene (headers, then tiles), and what a header or a tile holds
is judged by a parser that stands corrupt bytes.
"""

import asyncio
import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import NamedTemporaryFile
from typing import cast

import numpy as np
import rasterio
from affine import TransformNotInvertibleError
from numpy.typing import NDArray
from pyproj.exceptions import ProjError
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError

from infra.imagery import jpeg2000, zarrs
from infra.imagery.assets import FILE, Asset
from infra.imagery.ranges import (
    Ranges,
    RefusedAsset,
    Traffic,
    UnavailableAsset,
    UnreadableAsset,
    every,
    merged,
    run,
)
from infra.imagery.tiffs import CorruptHeader, fetch_header
from infra.imagery.windows import (
    NODATA,
    Grids,
    Layer,
    Places,
    Windows,
    check,
    check_block,
    frame_of,
    read_grids,
    tiles_under,
)

__all__ = ["RefusedAsset", "Traffic", "UnavailableAsset", "UnreadableAsset", "read_scene", "read_windows"]

READINGS = 3  # reads of an asset whose bytes do not decode: damage on the way passes, damage at the source does not
HEADER = 16_384  # bytes of the first read: the header of a 10,980-pixel band with overviews takes 7,000
LEADER = 4  # bytes around a tile, in which GDAL's COGs repeat its size and its end
PIXELS_ONLY = {"GEOREF_SOURCES": "NONE"}  # what the header tells of the CRS takes as long as all else of it
GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 128}

warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # of masks, which lie on their pixels' grid
CORRUPT = (CorruptHeader, RasterioError, CRSError, ProjError, TransformNotInvertibleError, struct.error)


def read_scene(
    hrefs: Mapping[str, Asset | str],
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
        hrefs: Asset by its name, or the href of a file alone: unsigned, HTTP, `s3://`, or a path.
        lonlat: (n, 2) places in degrees; none: the headers alone are read, and judged.
        pixels: Side of the windows.
        resolution_m: Pixel size of the windows in metres.
        traffic: Counts the requests and bytes, also of what fails.

    Returns:
        By the asset's name one (pixels, pixels) array per place, or None where the window leaves the asset.

    Raises:
        UnreadableAsset: An asset is gone, stays corrupt, is no band of integers, or has another corner.
        RefusedAsset: An asset's server forbids it, after all attempts.
        UnavailableAsset: An asset's server is down or busy, after all attempts.
        UserError: A pixel size does not fit.
    """
    counted = Traffic() if traffic is None else traffic
    assets = {name: Ranges(href, counted) for name, href in hrefs.items()}
    return run(_read_scene(assets, Places(lonlat, pixels, resolution_m)))


def read_windows(href: Asset | str, lonlat: NDArray[np.float64], pixels: int, resolution_m: float) -> Windows:
    """Reads the windows of one asset; see `read_scene`."""
    return read_scene({"asset": href}, lonlat, pixels, resolution_m)["asset"]


async def _read_scene(assets: Mapping[str, Ranges], places: Places) -> dict[str, Windows]:
    objects = zarrs.Objects()
    work = (_read_asset(asset, places, objects) for asset in assets.values())
    found = await asyncio.gather(*work, return_exceptions=True)  # all end, so that nothing goes on behind an error
    errors = [layer for layer in found if isinstance(layer, BaseException)]
    if errors:
        error = min(errors, key=_weight)
        if isinstance(error, RefusedAsset):
            served = [asset for asset, layer in zip(assets.values(), found, strict=True) if isinstance(layer, Layer)]
            error.neighbours += tuple(asset.asset for asset in served)
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


async def _read_asset(asset: Ranges, places: Places, objects: zarrs.Objects) -> Layer:
    """Reads the windows of one asset, anew while its bytes do not decode."""
    if asset.lies_beside(".msk"):
        raise asset.failure(UnreadableAsset, "its mask is in a file of its own, .msk, which is not read")
    problem = ""
    for _ in range(READINGS):
        try:
            if asset.asset.format != FILE:
                return await zarrs.read(asset, places, objects)
            return await _read_file(asset, places)
        except CORRUPT as error:  # a header has no checksum: what it says may be so on the way alone
            problem = str(error) if isinstance(error, CorruptHeader) else ""
            objects.forget()
    raise asset.failure(UnreadableAsset, problem or "its bytes are corrupt")


async def _read_file(asset: Ranges, places: Places) -> Layer:
    """Reads the windows of a TIFF or of JPEG 2000, which its first bytes tell apart."""
    with _sparse_file() as (file, name):
        sparse = Sparse(asset, file)
        if jpeg2000.begins(await sparse.take(0, jpeg2000.SIGN)):
            return await jpeg2000.read(asset, sparse.take, places, name)
        mask = await fetch_header(sparse.take)
        if mask is None:
            names = [name]
        else:
            names = [name, f"GTIFF_DIR:off:{mask}:{name}"]
        plan = await asyncio.to_thread(_plan, names, places, asset.size)
        await every(sparse.fetch(*span) for span in merged(plan.spans))
        return Layer(await asyncio.to_thread(_decode, names, plan.grids), plan.crs, plan.corner)


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
        frame = frame_of(source)
        check(frame)
        grids = places.grids(frame)
        spans = _spans(source, grids)
        for name in names[1:]:
            with rasterio.open(name, driver="GTiff", **PIXELS_ONLY) as mask:
                if mask.shape != source.shape or mask.count != 1:
                    raise CorruptHeader(f"its mask of {mask.shape} is not for its {source.shape} pixels")
                check_block(frame_of(mask))
                spans += _spans(mask, grids)
        if any(stop > size + LEADER for _, stop in spans):
            raise CorruptHeader
        return Plan(spans, grids, source.crs, frame.corner)


def _spans(source: rasterio.DatasetReader, grids: Grids) -> list[tuple[int, int]]:
    """Returns the byte ranges of the tiles under the windows.

    Raises:
        CorruptHeader: A tile is longer than any of its pixels.
    """
    spans = [span for tile in tiles_under(source.block_shapes[0], grids) if (span := _span(source, tile))]
    height, width = source.block_shapes[0]
    largest = 2 * width * height * np.dtype(source.dtypes[0]).itemsize  # deflate adds less than a thousandth
    if any(stop - start > largest + 2 * LEADER for start, stop in spans):
        raise CorruptHeader
    return spans


def _span(source: rasterio.DatasetReader, tile: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the first byte of a tile and the one after its last, or None for a tile without bytes (nodata)."""
    where, size = (source.get_tag_item(f"BLOCK_{what}_{tile[0]}_{tile[1]}", "TIFF", 1) for what in ("OFFSET", "SIZE"))
    if where and size:
        return (max(0, int(where) - LEADER), int(where) + int(size) + LEADER)
    return None


def _decode(names: list[str], grids: Grids) -> Windows:
    """Returns the pixels under each window, 0 where the asset declares to have none."""
    with rasterio.Env(**GDAL), rasterio.open(names[0], driver="GTiff", **PIXELS_ONLY) as source:
        windows = read_grids(source, grids)
        for window in windows:
            if window is not None and source.nodata:
                window[window == source.nodata] = NODATA
        for name in names[1:]:
            with rasterio.open(name, driver="GTiff", **PIXELS_ONLY) as mask:
                for window, hidden in zip(windows, read_grids(mask, grids), strict=True):
                    if window is not None:
                        window[hidden == 0] = NODATA
        return windows
