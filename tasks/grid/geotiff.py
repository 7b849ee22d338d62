"""Makes the compact product of a grid as a cloud-optimised GeoTIFF, `compact.tif` beside `compact.zarr`.

A band is a component, with its name, its scale and its offset in the header; overviews are the product's levels.
Workers pack tiles of all bands, of which the file is then put together: header and overviews first, and the tiles of
one place one after the other, so that one request reads a place in all bands. GDAL cannot be asked for that: it writes
a file from one process, and resumes none. What it tells of place and bands is taken from a small file that it writes.
"""

import struct
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rasterio.io import MemoryFile

from infra import storage
from tasks import arrays
from tasks.cards import COMPACT
from tasks.core.earth.grid import Tile
from tasks.core.quantize import NODATA_CODE
from tasks.grid import store
from tasks.grid.companion import TOLD, open_codes
from tasks.grid.levels import Level, pyramid
from tasks.units import run_units

if TYPE_CHECKING:
    from distributed import Client

NAME = "compact.tif"
PARTS = "compact.tif.parts"  # packed tiles, until the file is whole
SIDE = 256  # cells along a side of a tile
LEVEL = 6  # of deflate
LAYOUT = (324, 325)  # tags of the tiles' offsets and sizes
PLACED = (33550, 33922, 34264, 34735, 34736, 34737, 42112)  # tags of place, CRS, and GDAL's own of the bands
NODATA = 42113
TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 12: "d", 16: "Q"}  # of TIFF: numbers as struct has them
SHORT, LONG, LONG8 = 3, 4, 16
Tags = dict[int, tuple[int, bytes]]  # type and values of each tag
Unit = tuple[Level, Tile]


def publish_geotiff(client: "Client", compact: str) -> str:
    """Makes the GeoTIFF of a compact product, unless it is there, and resumes what an earlier run began.

    Args:
        client: The Dask cluster. A unit holds 256 x 256 cells in all bands, 25 MB of 384.
        compact: URL of the compact product's Zarr.

    Returns:
        The URL of the file.
    """
    home = compact.removesuffix("/" + COMPACT)
    url, parts = storage.join(home, NAME), storage.join(home, PARTS)
    if not storage.exists(url):
        _make(client, compact, url, parts)
    storage.delete(parts)
    return url


def _make(client: "Client", compact: str, url: str, parts: str) -> None:
    """Packs what tiles are not there, and puts the file together; a run that overlaps may have done both."""
    found = reversed(pyramid(Level.own(store.open_spec(compact))))
    units = [(level, tile) for level in found for tile in level.tiles(SIDE)]
    done = set(storage.paths(parts))
    left = [unit for unit in units if _name(unit) not in done]
    run_units(client, partial(pack, compact, parts), left, label="compact GeoTIFF", there=len(units) - len(left))
    with TemporaryDirectory() as scratch:
        path = Path(scratch, NAME)
        try:
            put_together(path, compact, parts, units)
        except FileNotFoundError:
            if not storage.exists(url):
                raise
        else:
            storage.upload(path, url)


def _name(unit: Unit) -> str:
    level, tile = unit
    return f"x{level.times}-{tile}"


def pack(compact: str, parts: str, unit: Unit) -> None:
    """Packs a tile of all bands, each by itself: their sizes, then their bytes."""
    level, tile = unit
    codes = arrays.read(open_codes(compact, level), (slice(None), *tile.window))
    whole = np.full((len(codes), SIDE, SIDE), NODATA_CODE, np.int8)
    whole[:, : tile.rows, : tile.columns] = codes
    steps = np.diff(whole.view(np.uint8), axis=2, prepend=np.uint8(0))  # predictor 2: differences along rows
    packed = [zlib.compress(band.tobytes(), LEVEL) for band in steps]
    storage.write(
        storage.join(parts, _name(unit)), struct.pack(f"<{len(packed)}I", *map(len, packed)) + b"".join(packed)
    )


def put_together(path: Path, compact: str, parts: str, units: list[Unit]) -> None:
    """Writes the file of parts: the header twice, since where the tiles lie depends on its length."""
    bands, about = store.open_vectors(compact).shape[0], described(compact)
    with path.open("w+b") as file:
        start = file.write(header(about, bands, units, np.zeros((len(units), bands), np.int64), 0))
        sizes = np.empty((len(units), bands), np.int64)
        for i, unit in enumerate(units):
            part = storage.read(storage.join(parts, _name(unit)))
            sizes[i] = struct.unpack_from(f"<{bands}I", part)
            file.write(part[4 * bands :])
        file.seek(0)
        file.write(header(about, bands, units, sizes, start))


def header(about: Tags, bands: int, units: list[Unit], sizes: NDArray[np.int64], start: int) -> bytes:
    """Returns the header of a BigTIFF: that of the whole image, then those of its overviews.

    Args:
        about: Tags of place and bands.
        bands: Number of bands.
        units: The tiles, in the order of the file.
        sizes: Bytes of each, (tile, band).
        start: Where the first tile begins.
    """
    offsets = (start + np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    found = list(dict.fromkeys(level for level, _ in units))[::-1]
    data = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16)
    for level in found:
        mine = [i for i, (other, _) in enumerate(units) if other == level]
        tags = image(level, bands) | (about if level is found[0] else {NODATA: about[NODATA]})
        tags |= {254: _values(LONG, int(level is not found[0]))}
        tags |= {tag: _values(LONG8, *of[mine].T.ravel()) for tag, of in zip(LAYOUT, (offsets, sizes), strict=True)}
        data += directory(tags, len(data), is_last=level is found[-1])
    return data


def image(level: Level, bands: int) -> Tags:
    """Returns the tags of an image in tiles, of bands of int8 that lie apart, packed by deflate with differences."""
    one = {256: level.columns, 257: level.rows, 322: SIDE, 323: SIDE}
    short = {258: [8] * bands, 259: [8], 262: [1], 277: [bands], 284: [2], 317: [2], 339: [2] * bands}
    if bands > 1:
        short[338] = [0] * (bands - 1)
    return {tag: _values(LONG, n) for tag, n in one.items()} | {tag: _values(SHORT, *n) for tag, n in short.items()}


def _values(kind: int, *values: int) -> tuple[int, bytes]:
    return kind, struct.pack(f"<{len(values)}{TYPES[kind]}", *(int(value) for value in values))


def directory(tags: Tags, start: int, is_last: bool) -> bytes:
    """Returns a directory of tags that begins at `start` of a BigTIFF, and after it what has no room in its entries."""
    end = start + 8 + 20 * len(tags) + 8
    entries, beyond = b"", b""
    for tag, (kind, data) in sorted(tags.items()):
        count = len(data) // struct.calcsize(f"<{TYPES[kind]}")
        if len(data) <= 8:
            place = data.ljust(8, b"\0")
        else:
            place = struct.pack("<Q", end + len(beyond))
            beyond += data.ljust(-(-len(data) // 8) * 8, b"\0")
        entries += struct.pack("<HHQ", tag, kind, count) + place
    following = 0 if is_last else end + len(beyond)
    return struct.pack("<Q", len(tags)) + entries + struct.pack("<Q", following) + beyond


def described(compact: str) -> Tags:
    """Returns the tags by which GDAL tells place, CRS, no data, and names, scales and offsets of the bands."""
    spec, attrs, scale = store.open_spec(compact), store.attributes(compact), store.scale_of(compact)
    assert scale is not None, "a compact product has scales"
    profile: dict[str, Any] = {"driver": "GTiff", "width": 1, "height": 1, "count": len(scale), "dtype": "int8"}
    profile |= {"crs": spec.plane.definition.to_wkt(), "nodata": NODATA_CODE, "interleave": "band"}
    with MemoryFile() as memory:
        with memory.open(**profile, transform=Level.own(spec).affine) as file:
            file.descriptions = [f"component {n + 1}" for n in range(len(scale))]
            file.scales, file.offsets = [float(value) for value in scale], [0.0] * len(scale)
            file.update_tags(**{name: attrs[name] for name in TOLD if isinstance(attrs.get(name), str)})
        return {tag: told for tag, told in read_tags(memory.read()) if tag in (*PLACED, NODATA)}


def read_tags(data: bytes) -> Iterator[tuple[int, tuple[int, bytes]]]:
    """Yields the tags of the first directory of a little-endian TIFF of before BigTIFF."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from("<HHI", data, entry)
        if kind in TYPES:
            size = length * struct.calcsize(f"<{TYPES[kind]}")
            place = entry + 8 if size <= 4 else struct.unpack_from("<I", data, entry + 8)[0]
            yield tag, (kind, data[place : place + size])
