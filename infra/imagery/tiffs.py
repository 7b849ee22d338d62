"""Reads headers of TIFFs: finds the bytes that must be fetched before a file can be opened, wherever they lie.

TIFF 6.0 and BigTIFF. A header is a chain of directories, one per image: the pixels, overviews, and masks of either.
"""

import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

LARGEST_HEADER = 1 << 24  # most bytes read of a header
MOST_DIRECTORIES, MOST_TAGS = 64, 4096  # most directories of a file, most tags of a directory
SUBFILE, REDUCED, MASK = 254, 1, 4  # tag of the kind of image, and two of its bits
SIZES = dict(enumerate((0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)))  # bytes of a value by its TIFF type

Take = Callable[[int, int], Awaitable[bytes]]
"""Fetches the bytes from a start to before a stop."""

OTHERS = {
    b"\x89HDF": "HDF5 or netCDF",
    b"CDF": "netCDF",
    b"\x89PNG": "a PNG",
    b"\xff\xd8\xff": "a JPEG",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip file",
    b"{": "JSON, as of Zarr",
    b"<": "HTML or XML, as of an error or a login page",
}


class CorruptHeader(Exception):
    """Bytes that are no sound TIFF header; the text says what they are, where it is known."""


class Layout(NamedTuple):
    """How a TIFF writes its numbers."""

    order: str
    """`<` or `>`, as `struct` has it."""
    number: str
    """Format of the number of tags of a directory."""
    offset: str
    """Format of an offset."""
    entry: str
    """Format of a tag: number, type, count, and its value or where it is."""


TIFFS = {
    sign + version: Layout(order, *formats)
    for sign, order in ((b"II", "<"), (b"MM", ">"))
    for number, formats in ((42, ("H", "I", "HHII")), (43, ("Q", "Q", "HHQQ")))
    for version in (struct.pack(f"{order}H", number),)
}


@dataclass(frozen=True)
class Directory:
    """One image of a TIFF (a directory)."""

    at: int
    """Offset of the directory in the file."""
    purpose: int
    """Bits of its tag `SUBFILE`; 0 the pixels themselves."""
    arrays: tuple[tuple[int, int], ...]
    """First and last byte of tag values that lie elsewhere."""
    following: int
    """Offset of the next directory; 0: none."""


async def fetch_header(take: Take) -> int | None:
    """Fetches all directories, and the arrays of the pixels and of their mask.

    Returns:
        The offset of the directory of the pixels' mask, if there is one.

    Raises:
        CorruptHeader: It is no TIFF, or contradicts itself.
        struct.error: It ends early.
    """
    found = await _directories(take)
    masks = [directory for directory in found[1:] if directory.purpose & (MASK | REDUCED) == MASK]
    arrays = [array for directory in [found[0], *masks[:1]] for array in directory.arrays]
    if sum(stop - start for start, stop in arrays) > LARGEST_HEADER:
        raise CorruptHeader
    for start, stop in sorted(arrays):
        await take(start, stop)
    return masks[0].at if masks else None


async def _directories(take: Take) -> list[Directory]:
    head = await take(0, 16)
    layout = TIFFS.get(head[:4])
    if layout is None:
        raise CorruptHeader(next((f"it is {name}" for sign, name in OTHERS.items() if head.startswith(sign)), ""))
    (at,) = struct.unpack_from(layout.order + layout.offset, head, struct.calcsize("=" + layout.offset))
    found: list[Directory] = []
    while at or not found:
        if len(found) == MOST_DIRECTORIES or any(at == directory.at for directory in found):
            raise CorruptHeader
        found.append(await _directory(take, layout, at))
        at = found[-1].following
    return found


async def _directory(take: Take, layout: Layout, at: int) -> Directory:
    order, number, offset, entry = layout.order, layout.number, layout.offset, layout.order + layout.entry
    begin = at + struct.calcsize(f"={number}")
    (tagged,) = struct.unpack(order + number, await take(at, begin))
    if not 0 < tagged <= MOST_TAGS:
        raise CorruptHeader
    end = begin + tagged * struct.calcsize(entry)
    inline = struct.calcsize(f"={offset}")
    body = await take(begin, end + inline)
    tags = list(struct.iter_unpack(entry, body[: end - begin]))
    lengths = [(where, SIZES.get(kind, 0) * values) for _, kind, values, where in tags]
    (following,) = struct.unpack(order + offset, body[end - begin :])
    return Directory(
        at,
        next((_value(layout, kind, where) for tag, kind, _, where in tags if tag == SUBFILE), 0),
        tuple((where, where + length) for where, length in lengths if length > inline),
        following,
    )


def _value(layout: Layout, kind: int, field: int) -> int:
    """Returns the number in a tag's value field; a shorter number is in the field's first bytes."""
    if layout.order == ">":
        spare = 8 * (struct.calcsize(f"={layout.offset}") - SIZES.get(kind, 0))
    else:
        spare = 0
    return field >> max(spare, 0)
