"""Reads Zarr arrays with checks: each chunk ends with a CRC32C of its bytes, so that no flipped bit is read unnoticed.

The checksum is the `crc32c` codec of the Zarr specification, so any reader checks it. Arrays of earlier versions have
none: they are read without a check, and `unchecked` names them.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.errors import ContainsArrayError

from infra import storage
from infra.addresses import is_web, shown
from infra.bounds import EXPANSION, FREE
from infra.decoding import unbounded
from infra.errors import UserError

LARGE = 1 << 30  # bytes of one read, above which they are compared with the stored ones; a tile has 0.05 to 0.5 GB
MOST_CHUNKS = 1_000_000  # chunks; bounds one read, and one shard; a tile has some thousand
CODECS = (ValueError, RuntimeError)  # raised by codecs for bytes that they cannot have written


class Damaged(UserError):
    """Stored bytes are not those that were written; the message names the object."""


def packed(compressor: Any = None) -> tuple[Any, ...]:
    """Returns the codecs of a chunk's bytes: a compressor, by default Zstandard, then the checksum."""
    return compressor or ZstdCodec(), Crc32cCodec()


def read(array: zarr.Array, index: Any) -> NDArray:
    """Returns a part of an array.

    Args:
        array: The array.
        index: Numbers and slices as in NumPy, or a list of rows.

    Raises:
        Damaged: The bytes of a chunk are not those that were written.
        UserError: The array claims a size that its stored bytes cannot have.
    """
    check_size(array, index)
    try:
        return np.asarray(array.oindex[index] if isinstance(index, list) else array[index])
    except UserError:
        raise
    except CODECS as error:
        raise _told(array, _first_bad(array, index), error) from error


def check_size(array: zarr.Array, index: Any = ..., large: int = LARGE) -> None:
    """Refuses to read a part of an array that would take memory out of proportion to its stored bytes.

    Raises:
        UserError: The part is too large or has too many chunks, or a codec may unpack to any size.
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
    """Returns the URL of an array."""
    if array.path:
        return storage.join(array.store.url, array.path)
    return str(array.store.url)


def check_axes(url: str) -> None:
    """Refuses a Zarr group with coordinates that are too large: xarray reads them whole when it opens the group."""
    for _, array in zarr.open_group(storage.zarr_store(url), mode="r").arrays():
        if array.ndim <= 1:
            check_size(array, large=FREE)


def _stored(place: str) -> int:
    """Returns the stored bytes of an array; 0 for one on the web, which cannot be listed."""
    return 0 if is_web(place) else storage.size(place)


def _parts(array: zarr.Array, index: Any) -> list[range | list[int]]:
    """Returns the positions along each axis that an index asks for."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (array.ndim - len(parts) + 1)
    parts += [slice(None)] * (array.ndim - len(parts))
    return [_along(part, n) for part, n in zip(parts, array.shape, strict=True)]


def _along(part: Any, n: int) -> range | list[int]:
    if isinstance(part, slice):
        return range(n)[part]
    if isinstance(part, list | np.ndarray):
        return list(part)
    return [range(n)[int(part)]]


@dataclass(frozen=True)
class Rows:
    """A stored table that is read in blocks of rows."""

    array: zarr.Array
    """(n, columns)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns (n, columns)."""
        return self.array.shape

    def __getitem__(self, rows: slice) -> NDArray:
        return read(self.array, rows)


@dataclass(frozen=True)
class Table:
    """A stored array of rows that workers write side by side, each a whole object: a shard, or a chunk without shards.

    Where an array has further axes before its rows, a position along these goes before the rows.
    """

    url: str
    """URL of the array: `<Zarr>/<name>`."""

    def create(self, shape: tuple[int, ...], **options: Any) -> None:
        """Writes the metadata of the empty array and of its group, unless they are there.

        Args:
            shape: Of all rows.
            options: As `zarr.create_array` takes them.

        Raises:
            UserError: One of another shape is there.
        """
        if not storage.exists(storage.join(self.url, "zarr.json")):
            self._create(shape, **options)
        elif (there := self.open().shape) != shape:
            raise UserError(
                f"{self.url} is of an unfinished product of shape {there}, not {shape}: delete it, or name another"
            )

    def _create(self, shape: tuple[int, ...], **options: Any) -> None:
        home, _, name = self.url.rpartition("/")
        group = zarr.open_group(storage.zarr_store(home), mode="a")
        with suppress(ContainsArrayError):  # of an earlier run, or of one at the same time: the same
            group.create_array(name, shape=shape, **{"compressors": packed()} | options)

    def open(self, mode: Literal["r", "r+"] = "r") -> zarr.Array:
        """Opens the array."""
        return zarr.open_array(storage.zarr_store(self.url), mode=mode)

    def read(self, index: Any) -> NDArray:
        """Reads a part of the array, as the module's `read` does."""
        return read(self.open(), index)

    def write(self, start: int, rows: NDArray, *before: int) -> None:
        """Writes one whole object.

        Raises:
            UserError: The rows are not one whole object.
        """
        array, axis = self.open("r+"), len(before)
        whole, total = (array.shards or array.chunks)[axis], array.shape[axis]
        stop = start + len(rows)
        if start % whole or stop != min(start + whole, total):
            raise UserError(
                f"rows {start} to {stop} of {self.url} are not one whole shard of {whole}: two workers could write the "
                "same shard"
            )
        array[(*before, slice(start, stop))] = rows

    def written(self, *before: int) -> set[int]:
        """Returns the numbers of the objects that are there."""
        return storage.shards(storage.join(self.url, "c", *map(str, before)))


def _told(array: zarr.Array, where: "Chunk", error: Exception) -> Damaged:
    place = storage.join(_place(array), array.metadata.encode_chunk_key(where.numbers))
    return damaged(place, error)


def damaged(place: str, error: Exception | str) -> Damaged:
    """Returns the error for an object whose bytes are not those that were written."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return Damaged(f"{place} is damaged: its bytes are not those that were written ({reason}). Delete it and run again")


@dataclass(frozen=True)
class Chunk:
    """One stored object of an array: a shard, or a chunk where there are no shards."""

    numbers: tuple[int, ...]
    """Number of the object along each axis."""

    def region(self, array: zarr.Array) -> tuple[slice, ...]:
        """Returns the part of the array that the object holds."""
        side = array.shards or array.chunks
        return tuple(slice(i * n, (i + 1) * n) for i, n in zip(self.numbers, side, strict=True))


def _first_bad(array: zarr.Array, index: Any) -> Chunk:
    """Returns the first object of a part of an array that cannot be read, or the last one where each can by itself."""
    chunk = Chunk((0,) * array.ndim)
    for chunk in _chunks(array, index):
        try:
            array[chunk.region(array)]
        except CODECS:
            break
    return chunk


def _chunks(array: zarr.Array, index: Any) -> Iterator[Chunk]:
    """Returns the objects that hold a part of an array."""
    sides = array.shards or array.chunks
    rows = [np.unique(np.asarray(part) // side) for part, side in zip(_parts(array, index), sides, strict=True)]
    return (Chunk(tuple(numbers)) for numbers in product(*(part.tolist() for part in rows)))


def is_checked(array: zarr.Array) -> bool:
    """Tells whether the chunks of an array have checksums."""
    return any(isinstance(codec, Crc32cCodec) for codec in array.compressors)


def unchecked(url: str) -> list[str]:
    """Returns the paths of arrays in the Zarr group at `url` whose chunks have no checksums."""
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
    """Which object of the array."""

    def __str__(self) -> str:
        return "/".join([self.array, "c", *map(str, self.chunk.numbers)])


def objects(url: str) -> list[Stored]:
    """Returns all objects of the arrays in the Zarr group at `url`, sorted by name."""
    found = []
    for path in storage.paths(url):
        if match := re.fullmatch(r"(.+)/c((?:/\d+)*)", path):
            numbers = match[2].split("/")[1:]
            found.append(Stored(match[1], Chunk(tuple(map(int, numbers)))))
    return sorted(found, key=str)


def check(url: str, stored: Stored) -> str:
    """Returns why an object of the Zarr group at `url` cannot be decoded; empty if it can."""
    array = zarr.open_array(storage.zarr_store(storage.join(url, stored.array)), mode="r")
    try:
        read(array, stored.chunk.region(array))
    except Damaged as error:
        return str(error)
    return ""
