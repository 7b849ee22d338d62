"""Zarr arrays as all products store them: each chunk ends with a CRC32C of its bytes, so that no flipped bit is read.

The checksum is the `crc32c` codec of the Zarr specification: any reader checks it. Arrays of before have none; they
are read as they are, and `unchecked` names them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from infra import storage
from infra.addresses import is_web, shown
from infra.bounds import EXPANSION, FREE
from infra.errors import UserError
from tasks.decoding import unbounded

LARGE = 1 << 30  # bytes to read at once from which these are compared with what is stored; a tile has 0.05 to 0.5 GB
MOST_CHUNKS = 1_000_000  # of one read, or of one shard; a tile has some thousand
CODECS = (ValueError, RuntimeError)  # what they raise of bytes that they cannot have written


class Damaged(UserError):
    """Stored bytes are not those that were written; the message names the object."""


def packed(compressor: Any = None) -> tuple[Any, ...]:
    """The codecs of a chunk's bytes: a compressor, Zstandard by default, then the checksum of what it leaves."""
    return compressor or ZstdCodec(), Crc32cCodec()


def read(array: zarr.Array, index: Any) -> NDArray:
    """A part of an array: numbers and slices as in numpy, or a list of rows.

    Raises:
        Damaged: A chunk of it cannot be what was written.
        UserError: It says that it is larger than what is stored can be.
    """
    check_size(array, index)
    try:
        return np.asarray(array.oindex[index] if isinstance(index, list) else array[index])
    except UserError:
        raise
    except CODECS as error:
        raise _told(array, _first_bad(array, index), error) from error


def check_size(array: zarr.Array, index: Any = ..., large: int = LARGE) -> None:
    """Refuses to read a part of an array that would take memory out of proportion with what is stored of it.

    Raises:
        UserError: It is too large, in too many chunks, or packed by what may unpack to anything.
    """
    if name := unbounded(array.metadata.codecs):
        raise UserError(
            f"{shown(_place(array))} is packed by {name}, which is not read: write it with zstd, gzip or blosc"
        )
    parts = _parts(array, index)
    size = prod(map(len, parts)) * getattr(array.metadata.data_type, "item_size", 1)
    chunks = prod(len(part) // side + 2 for part, side in zip(parts, array.chunks, strict=True))
    inner = prod(shard // chunk for shard, chunk in zip(array.shards or array.chunks, array.chunks, strict=True))
    if max(chunks, inner) > MOST_CHUNKS or (size > large and size > EXPANSION * _stored(_place(array))):
        raise UserError(
            f"{shown(_place(array))} says that it is of shape {array.shape}: {size:,} bytes to read, in some "
            f"{max(chunks, inner):,} chunks, which what is stored of it cannot be: it is damaged or hostile"
        )


def _place(array: zarr.Array) -> str:
    """The URL of an array."""
    return storage.join(array.store.url, array.path) if array.path else str(array.store.url)


def check_axes(url: str) -> None:
    """Refuses a Zarr group whose coordinates, which xarray reads when it opens them, are larger than can be."""
    for _, array in zarr.open_group(storage.zarr_store(url), mode="r").arrays():
        if array.ndim <= 1:
            check_size(array, large=FREE)


def _stored(place: str) -> int:
    """Bytes that are stored of an array; none of one on the web, which cannot be listed."""
    return 0 if is_web(place) else storage.size(place)


def _parts(array: zarr.Array, index: Any) -> list[range | list[int]]:
    """The numbers along each axis that an index asks for."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (array.ndim - len(parts) + 1)
    parts += [slice(None)] * (array.ndim - len(parts))
    return [_along(part, n) for part, n in zip(parts, array.shape, strict=True)]


def _along(part: Any, n: int) -> range | list[int]:
    if isinstance(part, slice):
        return range(n)[part]
    return list(part) if isinstance(part, list | np.ndarray) else [range(n)[int(part)]]


@dataclass(frozen=True)
class Rows:
    """A stored table that is read in blocks of rows."""

    array: zarr.Array
    """(n, columns)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, columns)."""
        return self.array.shape

    def __getitem__(self, rows: slice) -> NDArray:
        return read(self.array, rows)


def _told(array: zarr.Array, where: "Chunk", error: Exception) -> Damaged:
    place = storage.join(_place(array), array.metadata.encode_chunk_key(where.numbers))
    return damaged(place, error)


def damaged(place: str, error: Exception | str) -> Damaged:
    """What is said of an object whose bytes cannot be what was written."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return Damaged(f"{place} is damaged: its bytes are not those that were written ({reason}). Delete it and run again")


@dataclass(frozen=True)
class Chunk:
    """One object of an array: a shard, or a chunk where there are no shards."""

    numbers: tuple[int, ...]
    """Its place among them, along each axis."""

    def region(self, array: zarr.Array) -> tuple[slice, ...]:
        """The part of the array that it holds."""
        side = array.shards or array.chunks
        return tuple(slice(i * n, (i + 1) * n) for i, n in zip(self.numbers, side, strict=True))


def _first_bad(array: zarr.Array, index: Any) -> Chunk:
    """The first chunk of a part of an array that cannot be read; the last one, if it is none by itself."""
    chunk = Chunk((0,) * array.ndim)
    for chunk in _chunks(array, index):
        try:
            array[chunk.region(array)]
        except CODECS:
            break
    return chunk


def _chunks(array: zarr.Array, index: Any) -> Iterator[Chunk]:
    """The chunks that a part of an array is in."""
    sides = array.shards or array.chunks
    rows = [np.unique(np.asarray(part) // side) for part, side in zip(_parts(array, index), sides, strict=True)]
    return (Chunk(tuple(numbers)) for numbers in product(*(part.tolist() for part in rows)))


def is_checked(array: zarr.Array) -> bool:
    """Whether its chunks have checksums."""
    return any(isinstance(codec, Crc32cCodec) for codec in array.compressors)


def unchecked(url: str) -> list[str]:
    """Paths of the arrays under the Zarr group at `url` whose chunks have no checksums."""
    group = zarr.open_group(storage.zarr_store(url), mode="r")
    return sorted(name for name, item in group.members(max_depth=None) if not _vouched(item))


def _vouched(item: Any) -> bool:
    return not isinstance(item, zarr.Array) or is_checked(item)


@dataclass(frozen=True)
class Stored:
    """One object of a Zarr group."""

    array: str
    """Path of its array in the group."""
    chunk: Chunk
    """Which of its objects."""

    def __str__(self) -> str:
        return "/".join([self.array, "c", *map(str, self.chunk.numbers)])


def objects(url: str) -> list[Stored]:
    """All chunks that are stored under the Zarr group at `url`, in order."""
    found = (re.fullmatch(r"(.+)/c((?:/\d+)*)", path) for path in storage.paths(url))
    parts = ((match[1], match[2].split("/")[1:]) for match in found if match)
    return sorted((Stored(name, Chunk(tuple(map(int, numbers)))) for name, numbers in parts), key=str)


def check(url: str, stored: Stored) -> str:
    """Why an object of the Zarr group at `url` cannot be decoded; empty if it can."""
    array = zarr.open_array(storage.zarr_store(storage.join(url, stored.array)), mode="r")
    try:
        read(array, stored.chunk.region(array))
    except Damaged as error:
        return str(error)
    return ""
