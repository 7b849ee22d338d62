"""Zarr arrays as all products store them: each chunk ends with a CRC32C of its bytes, so that no flipped bit is read.

The checksum is the `crc32c` codec of the Zarr specification: any reader checks it. Arrays of before have none; they
are read as they are, and `unchecked` names them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from infra import storage
from infra.errors import UserError

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
    """
    try:
        return np.asarray(array.oindex[index] if isinstance(index, list) else array[index])
    except UserError:
        raise
    except CODECS as error:
        raise _told(array, _first_bad(array, index), error) from error


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
    path = [array.path] if array.path else []
    place = storage.join(array.store.url, *path, array.metadata.encode_chunk_key(where.numbers))
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
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (array.ndim - len(parts) + 1)
    parts += [slice(None)] * (array.ndim - len(parts))
    sides = array.shards or array.chunks
    rows = [np.unique(np.arange(n)[part] // side) for part, n, side in zip(parts, array.shape, sides, strict=True)]
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
