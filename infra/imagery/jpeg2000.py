"""Reads windows of JPEG 2000: the tiles under them are fetched, and GDAL's OpenJPEG decodes a file of these alone.

ISO/IEC 15444-1. A file is a chain of boxes, which tell the CRS, and a codestream: its main header, then the parts of
its tiles. Where a part lies is told by the header (TLM), else by the parts themselves, each of which tells its length
(SOT): then they are walked one by one, unless the file is so small that it is read whole.
"""

import asyncio
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import rasterio

from infra.imagery.ranges import Ranges, every, merged
from infra.imagery.tiffs import LARGEST_HEADER, CorruptHeader, Take
from infra.imagery.windows import Frame, Grids, Layer, Places, Windows, check, frame_of, read_grids, tiles_under

BOX, CODESTREAM = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"  # how a file of boxes begins, and a codestream
SIGN = 12  # bytes that tell
SOT, SOD, SIZ, COD = 0xFF90, 0xFF93, 0xFF51, 0xFF52
TLM, PLM, PPM = 0xFF55, 0xFF57, 0xFF60  # what the main header may tell of the tiles
OTHERWISE = (0xFF53, 0xFF5D, 0xFF5E, 0xFF5F)  # COC, QCC, RGN, POC: of more components than one, or other orders
END = b"\xff\xd9"
PART = 12  # bytes of a SOT marker with its segment
MOST_BOXES, MOST_TILES = 64, 16_384  # most boxes before the codestream, most tiles: a band has 121
MOST_BLOCKS = 1 << 18  # most code-blocks of a tile, for which OpenJPEG takes memory each; 1,024 pixels a side have 256
WHOLE = 1 << 21  # bytes of a file that is read whole where its header does not tell where the tiles are
GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 128}


def begins(head: bytes) -> bool:
    """Tells whether bytes begin JPEG 2000."""
    return head.startswith((BOX, CODESTREAM))


@dataclass(frozen=True)
class Front:
    """What comes before the tiles."""

    boxes: bytes
    """The boxes before the codestream's."""
    main: list[tuple[int, bytes]]
    """Marker and segment (with its length) of the main header, in order."""
    tiles: int
    """Offset of the first tile's part."""
    end: int
    """Offset behind the codestream; 0: the file's end."""

    def segment(self, marker: int) -> bytes:
        """Returns the content of the first segment of a marker.

        Raises:
            CorruptHeader: There is none.
        """
        found = next((body[2:] for kind, body in self.main if kind == marker), None)
        if found is None:
            raise CorruptHeader
        return found

    def file(self, parts: bytes) -> bytes:
        """Returns a file of parts of tiles, without what tells where others were."""
        kept = [struct.pack(">H", kind) + body for kind, body in self.main if kind not in (TLM, PLM)]
        stream = CODESTREAM[:2] + b"".join(kept) + parts + END
        if not self.boxes:
            return stream
        return self.boxes + struct.pack(">I4s", 8 + len(stream), b"jp2c") + stream


class Size(NamedTuple):
    """Rows and columns of an image and of its tiles."""

    shape: tuple[int, int]
    tile: tuple[int, int]

    @property
    def across(self) -> int:
        """Returns the tiles in a row."""
        return -(-self.shape[1] // self.tile[1])

    @property
    def tiles(self) -> int:
        """Returns the number of tiles."""
        return self.across * -(-self.shape[0] // self.tile[0])

    def under(self, block: tuple[int, int], grids: Grids) -> set[int]:
        """Returns the numbers of the tiles of the blocks, as GDAL reads them, that lie under windows."""
        found: set[int] = set()
        for column, row in tiles_under(block, grids):
            rows, columns = (
                range(n * of // each, -(-min((n + 1) * of, whole) // each))
                for n, of, each, whole in zip((row, column), block, self.tile, self.shape, strict=True)
            )
            found |= {y * self.across + x for y, x in product(rows, columns)}
        return found


class Part(NamedTuple):
    """A part of a tile in the file."""

    tile: int
    start: int
    stop: int


async def read(asset: Ranges, take: Take, places: Places, name: str) -> Layer:
    """Reads the windows of an asset that begins as JPEG 2000.

    Args:
        asset: The asset.
        take: Returns bytes of its header.
        places: The windows.
        name: Path of a file that may be written anew.

    Raises:
        CorruptHeader: It is no band, or contradicts itself.
        RasterioError: A tile does not decode.
    """
    front = await _front(take)
    size = _size(front)
    frame = await asyncio.to_thread(_frame, front, size, name)
    grids = places.grids(frame)
    wanted = set(range(size.tiles)) if _is_packed(front) else size.under(frame.block, grids)
    parts = [part for part in await _parts(asset, front, wanted) if part.tile in wanted] if wanted else []
    if not wanted <= {part.tile for part in parts}:
        raise CorruptHeader("it ends before its last tile")
    content = await _fetch(asset, parts)
    windows = await asyncio.to_thread(_decode, front.file(content), size, name, grids)
    return Layer(windows, frame.crs, frame.corner)


def _is_packed(front: Front) -> bool:
    """Tells whether the main header holds what belongs to the tiles, so that it serves all of them alone."""
    return any(kind == PPM for kind, _ in front.main)


async def _front(take: Take) -> Front:
    start, stop, boxes = 0, 0, b""
    if (await take(0, SIGN)).startswith(BOX):
        at, start, stop = await _codestream(take)
        boxes = await take(0, at)
    if await take(start, start + 2) != CODESTREAM[:2]:
        raise CorruptHeader
    main, at = [], start + 2
    while (marker := struct.unpack(">H", await take(at, at + 2))[0]) != SOT:
        (length,) = struct.unpack(">H", await take(at + 2, at + 4))
        if marker < 0xFF00 or length < 2 or at - start > LARGEST_HEADER:
            raise CorruptHeader
        main.append((marker, await take(at + 2, at + 2 + length)))
        at += 2 + length
    return Front(boxes, main, at, stop)


async def _codestream(take: Take) -> tuple[int, int, int]:
    """Returns where the codestream's box begins, where its content does, and where it ends (0: with the file)."""
    at = 0
    for _ in range(MOST_BOXES):
        length, kind, long = struct.unpack(">I4sQ", await take(at, at + 16))
        head = 16 if length == 1 else 8
        size = long if length == 1 else length
        if kind == b"jp2c":
            return at, at + head, at + size if size else 0
        if size < head or at + size > LARGEST_HEADER:
            raise CorruptHeader
        at += size
    raise CorruptHeader


def _size(front: Front) -> Size:
    """Returns the size of an image of one component that begins where its grid does.

    Raises:
        CorruptHeader: It is another one, or its tiles have so many parts that they cannot be a band's.
    """
    _, width, height, left, top, *tile, count = struct.unpack(">HIIIIIIIIH", front.segment(SIZ)[:36])
    tile_width, tile_height, *corner = tile
    if not (width and height and tile_width and tile_height) or left or top or any(corner):
        raise CorruptHeader("its pixels or tiles do not begin at its corner")
    if count != 1:
        raise CorruptHeader(f"bands: {count}")
    size = Size((height, width), (min(tile_height, height), min(tile_width, width)))
    if size.tiles > MOST_TILES:
        raise CorruptHeader(f"it has {size.tiles:,} tiles")
    _check_blocks(front, size)
    return size


def _check_blocks(front: Front, size: Size) -> None:
    """Refuses tiles of very many code-blocks or precincts."""
    style, _, _, _, levels, wide, high, *_ = struct.unpack_from(">BBHBBBB", front.segment(COD))
    told = front.segment(COD)[10 : 11 + levels]
    precincts = list(told) if style & 1 else [0xFF]
    if levels > 32 or wide > 8 or high > 8 or (style & 1 and len(precincts) != levels + 1):
        raise CorruptHeader
    if any(kind in OTHERWISE for kind, _ in front.main):
        raise CorruptHeader("its components are told one by one")
    width = min(1 << wide + 2, *(1 << max(told & 15, 1) - 1 for told in precincts))
    height = min(1 << high + 2, *(1 << max(told >> 4, 1) - 1 for told in precincts))
    blocks = -(-size.tile[0] // height) * -(-size.tile[1] // width)
    if blocks > MOST_BLOCKS:
        raise CorruptHeader(f"its tiles have {blocks:,} code-blocks")


def _frame(front: Front, size: Size, name: str) -> Frame:
    """Returns the frame of an asset from its header alone."""
    with open(name, "wb") as file:
        file.write(front.file(struct.pack(">HHHIBB", SOT, 10, 0, 14, 0, 1) + b"\xff\x93"))
    with rasterio.Env(**GDAL), _open(name, size) as source:
        frame = frame_of(source)
        check(frame)
        if frame.shape != size.shape:
            raise CorruptHeader
        return frame


def _open(name: str, size: Size) -> rasterio.DatasetReader:
    """Opens a file; blocks are its tiles, but for a single one, of which only what a window needs is decoded."""
    return rasterio.open(name, driver="JP2OpenJPEG", USE_TILE_AS_BLOCK="NO" if size.tiles == 1 else "YES")


async def _parts(asset: Ranges, front: Front, wanted: set[int]) -> list[Part]:
    """Returns the parts of the tiles in the order of the file, those of the wanted ones at least."""
    told = list(_told(front))
    if told:
        return told
    if asset.size > WHOLE:
        return await _walk(asset.read, front, asset.size, wanted)
    whole = await asset.read(front.tiles, front.end or asset.size)

    async def held(start: int, stop: int) -> bytes:
        return whole[start - front.tiles : stop - front.tiles]

    return await _walk(held, front, asset.size, wanted)


def _told(front: Front) -> Iterator[Part]:
    """Yields the parts of tiles that the main header tells; none where it tells of none."""
    at, number = front.tiles, 0
    for segment in sorted((body[2:] for kind, body in front.main if kind == TLM), key=lambda body: body[:1]):
        kind = segment[1]
        tile, length = ("", "B", "H")[min(kind >> 4 & 3, 2)], "I" if kind & 0x40 else "H"
        for entry in struct.iter_unpack(f">{tile}{length}", segment[2:]):
            yield Part(entry[0] if tile else number, at, at + entry[-1])
            at, number = at + entry[-1], number + 1


async def _walk(read: Take, front: Front, size: int, wanted: set[int]) -> list[Part]:
    """Returns the parts of the tiles until all of the wanted ones have come."""
    at, end, found = front.tiles, front.end or size, Counter[int]()
    missing, parts = set(wanted), list[Part]()
    while at + PART <= end and missing and len(parts) < MOST_TILES:
        head = await read(at, at + PART)
        if head.startswith(END):
            break
        part, count = _part(head, at, end)
        parts.append(part)
        found[part.tile] += 1
        if found[part.tile] == count:
            missing.discard(part.tile)
        at = part.stop
    return parts


def _part(head: bytes, at: int, end: int) -> tuple[Part, int]:
    """Returns the part that begins with `head`, and the number of its tile's parts (0: not told).

    Raises:
        CorruptHeader: None begins there.
    """
    marker, segment, tile, length, _, count = struct.unpack(">HHHIBB", head[:PART])
    if marker != SOT or segment != PART - 2 or (length and length < PART + 2) or at + length > end:
        raise CorruptHeader
    return Part(tile, at, at + length if length else end), count  # without a length it is the last one


async def _fetch(asset: Ranges, parts: list[Part]) -> bytes:
    """Returns parts of tiles, one behind the other."""
    spans = merged((part.start, part.stop) for part in parts)
    bodies = await every(asset.read(*span) for span in spans)
    found = []
    for part in parts:
        first, body = next((span[0], body) for span, body in zip(spans, bodies, strict=True) if part.start < span[1])
        content = body[part.start - first : part.stop - first]
        _check_part(content, part)
        found.append(content)
    return b"".join(found)


def _check_part(content: bytes, part: Part) -> None:
    """Refuses a part of a tile that is another one, or is packed otherwise than the main header tells."""
    told, _ = _part(content, part.start, part.stop)
    if told != part:
        raise CorruptHeader
    at = PART
    while (marker := struct.unpack_from(">H", content, at)[0]) != SOD:
        if marker in (COD, *OTHERWISE):
            raise CorruptHeader("its tiles are packed in several ways")
        at += 2 + struct.unpack_from(">H", content, at + 2)[0]


def _decode(content: bytes, size: Size, name: str, grids: Grids) -> Windows:
    """Returns the pixels under each window; JPEG 2000 declares no nodata but 0."""
    if not any(grid is not None for grid in grids):
        return [None] * len(grids)
    with open(name, "wb") as file:
        file.write(content)
    with rasterio.Env(**GDAL), _open(name, size) as source:
        return read_grids(source, grids)
