"""Decodes Zarr chunks to no more bytes than their array says; importing this module registers the decoders.

A chunk of some kilobytes can unpack to gigabytes, and Zarr compares sizes only after that has happened. These decoders
take the size from the metadata before they unpack, and bound it by the stored bytes.
"""

import gzip
import io
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numcodecs import Blosc
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr import codecs
from zarr.abc.buffer import Buffer, NDBuffer
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, GzipCodec, ShardingCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec
from zarr.registry import register_codec

from infra import bounds

FRAME = b"\x28\xb5\x2f\xfd"  # magic number: the first bytes of a frame of Zstandard

Bytes = NDArray[np.uint8]


class _Bounded(BytesBytesCodec):
    """A compressor that is told how many bytes may come out.

    `_decode_sync` is what Zarr's protocol for codecs, `zarr.abc.codec.SupportsSyncCodec`, wants to be overridden.
    """

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        packed = np.ascontiguousarray(chunk_bytes.as_numpy_array()).view(np.uint8)
        size, most = _size(chunk_spec), bounds.most(packed.size)
        if size is not None and size > most:
            raise ValueError(f"{packed.size:,} bytes are said to hold {size:,}")
        found = self._unpacked(packed, most if size is None else size)
        if found is None or (size is not None and len(found) != size):
            raise ValueError(f"it does not hold the {size or most:,} bytes of its chunk" + " at most" * (size is None))
        return chunk_spec.prototype.buffer.from_bytes(found)

    def _unpacked(self, packed: Bytes, most: int) -> Any:
        """Returns the unpacked bytes, or None where there are more than `most`."""
        raise NotImplementedError


def _size(spec: ArraySpec) -> int | None:
    """Returns the bytes of a chunk, or None where its values have no fixed length."""
    each = getattr(spec.dtype, "item_size", None)
    if each is None:
        return None
    return prod(spec.shape) * each


class BoundedZstd(_Bounded, ZstdCodec):
    """Zstandard with a bound."""

    def _unpacked(self, packed: Bytes, most: int) -> Any:
        if _told(packed) == most:
            return Zstd().decode(packed, np.empty(most, np.uint8))
        try:  # several frames, or a frame that does not tell its size
            found = pa.CompressedInputStream(pa.BufferReader(packed), "zstd").read(most + 1)
        except OSError as error:
            raise ValueError(str(error)) from None
        return found if len(found) <= most else None


def _told(packed: Bytes) -> int | None:
    """Returns the size that a frame of Zstandard tells of its content (RFC 8878, 3.1.1.1), or None."""
    head = packed[:18].tobytes()
    if head[:4] != FRAME or len(head) < 6:
        return None
    single = head[4] >> 5 & 1
    at, length = 6 - single + (0, 1, 2, 4)[head[4] & 3], (single, 2, 4, 8)[head[4] >> 6]
    if length:
        return int.from_bytes(head[at : at + length], "little") + 256 * (length == 2)
    return None


class BoundedGzip(_Bounded, GzipCodec):
    """Gzip with a bound."""

    def _unpacked(self, packed: Bytes, most: int) -> Any:
        try:
            found = gzip.GzipFile(fileobj=io.BytesIO(packed.tobytes())).read(most + 1)
        except (OSError, EOFError) as error:
            raise ValueError(str(error)) from None
        return found if len(found) <= most else None


class BoundedBlosc(_Bounded, BloscCodec):
    """Blosc with a bound; its header tells the size at bytes 4 to 8."""

    def _unpacked(self, packed: Bytes, most: int) -> Any:
        size = int.from_bytes(packed[4:8].tobytes(), "little")
        if size <= most:
            return Blosc().decode(packed, np.empty(size, np.uint8))
        return None


class VLenUTF8Codec(codecs.VLenUTF8Codec):
    """Texts with a bound; the first four bytes tell their number. Zarr insists on this class name."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        count = int.from_bytes(chunk_bytes.as_numpy_array()[:4].tobytes(), "little")
        if count != prod(chunk_spec.shape):
            raise ValueError(f"it holds {count:,} texts, and its chunk {prod(chunk_spec.shape):,}")
        return super()._decode_sync(chunk_bytes, chunk_spec)


DECODERS = {"zstd": BoundedZstd, "gzip": BoundedGzip, "blosc": BoundedBlosc, "vlen-utf8": VLenUTF8Codec}
PACKED = ("zstd", "gzip", "blosc")

for _name, _decoder in DECODERS.items():
    register_codec(_name, _decoder)
    zarr.config.set({f"codecs.{_name}": f"{_decoder.__module__}.{_decoder.__qualname__}"})


def unbounded(chain: Sequence[Any]) -> str:
    """Returns the name of a codec whose output is not bounded here; empty where there is none.

    Args:
        chain: The codecs of an array. Bounded: numbers to bytes, then at most one compressor of PACKED, then checksums.
    """
    first, *rest = (codec for codec in chain if _named(codec) != "transpose")
    if isinstance(first, ShardingCodec):
        inner = unbounded(first.codecs) or unbounded(first.index_codecs)
        return inner or next((name for name in map(_named, rest) if name != "crc32c"), "")
    if _named(first) not in ("bytes", "vlen-utf8"):
        return _named(first)
    after = rest[1:] if rest and _named(rest[0]) in PACKED else rest
    return next((name for name in map(_named, after) if name != "crc32c"), "")


def _named(codec: Any) -> str:
    return str(codec.to_dict()["name"])
