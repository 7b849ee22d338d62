"""Writes empty shards where a grid has no land, for readers of stores that answer 403, not 404, for a missing object.

A bucket that may be read but not listed answers so. A Zarr reader takes only 404 for a chunk of fill values, so a 403
ends the read. An empty shard is its index: 16 bytes of ones for each chunk, and their checksum.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import prod
from typing import Any

import google_crc32c

from infra import storage

SHARDED = "sharding_indexed"
WRITERS = 16  # empty shards written at a time
INDEX = ["bytes", "crc32c"]  # codecs of the index of an empty shard


def fill_seas(url: str) -> int:
    """Writes an empty shard wherever a Zarr has none; call it once all shards with data exist. Overwrites nothing.

    Args:
        url: URL of the Zarr, with consolidated metadata.

    Returns:
        The number of empty shards written.
    """
    metadata = storage.read_json(storage.join(url, "zarr.json"))["consolidated_metadata"]["metadata"]
    sharded = {name: array for name, array in metadata.items() if _sharding(array)}
    missing = [(name, key) for name, array in sharded.items() for key in _missing(url, name, array)]
    with ThreadPoolExecutor(WRITERS) as pool:
        wrote = pool.map(lambda at: storage.create(storage.join(url, *at), empty_shard(sharded[at[0]])), missing)
        return sum(wrote)


def empty_shard(array: dict[str, Any]) -> bytes:
    """Returns the bytes of a shard without chunks, for an array's metadata."""
    sharding = _sharding(array)
    codecs = [codec["name"] for codec in sharding["index_codecs"]]
    if codecs != INDEX:
        raise ValueError(f"a shard's index of codecs {codecs} is unknown: {INDEX} is what we write")
    sides = zip(_shard(array), sharding["chunk_shape"], strict=True)
    index = b"\xff" * (16 * prod(shard // chunk for shard, chunk in sides))
    return index + google_crc32c.value(index).to_bytes(4, "little")


def _sharding(array: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = next(iter(array.get("codecs", [])), {})
    if first.get("name") == SHARDED:
        return first["configuration"]
    return {}


def _shard(array: dict[str, Any]) -> list[int]:
    return array["chunk_grid"]["configuration"]["chunk_shape"]


def _missing(url: str, name: str, array: dict[str, Any]) -> Iterator[str]:
    """Yields the keys of the shards that do not exist, below the array."""
    there = {f"c/{path}" for path in storage.paths(storage.join(url, name, "c"))}
    counts = [-(-size // side) for size, side in zip(array["shape"], _shard(array), strict=True)]
    for place in product(*map(range, counts)):
        key = "/".join(map(str, ("c", *place)))
        if key not in there:
            yield key
