"""Opens Zarr stores on `infra.buckets` and `infra.web`, with their retries."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any, Self

import obstore
from obstore.store import ObjectStore
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import ObjectStore as ZarrObjectStore

from infra import web
from infra.addresses import join, shown
from infra.buckets import patiently, patiently_async
from infra.errors import Refused, UserError

ROOT = "zarr.json"  # object of a group's metadata, with that of all arrays


class BucketStore(ZarrObjectStore):
    """Zarr's own store, but bodies are held to the length that their answers tell, and errors name the URL."""

    def __init__(self, store: ObjectStore, url: str, *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.url = url

    def with_read_only(self, read_only: bool = False) -> Self:
        return type(self)(self.store, self.url, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        options: Any = {"range": _range(byte_range)}

        async def whole() -> Buffer:
            answer = await obstore.get_async(self.store, key, options=options)
            body = await answer.bytes_async()
            first, last = answer.range
            if len(body) != last - first:
                raise OSError(f"{len(body)} bytes came for {last - first}")
            return prototype.buffer.from_bytes(body)

        try:
            return await patiently_async(whole, join(self.url, key))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except Refused:
            if self.read_only and key != ROOT and await self.exists(ROOT):
                return None  # a bucket that may not be listed says so of what is not there, as of a tile at sea
            raise

    async def exists(self, key: str) -> bool:
        return await patiently_async(partial(super().exists, key), join(self.url, key))

    async def set(self, key: str, value: Buffer) -> None:
        await patiently_async(partial(super().set, key, value), join(self.url, key))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await patiently_async(partial(super().set_if_not_exists, key, value), join(self.url, key))


def _range(asked: ByteRequest | None) -> Any:
    """Translates Zarr's byte request to obstore's; the whole object is a range too, whose answer tells its size."""
    if isinstance(asked, RangeByteRequest):
        return asked.start, asked.end
    if isinstance(asked, SuffixByteRequest):
        return {"suffix": asked.suffix}
    return {"offset": asked.offset if asked else 0}


class WebStore(Store):
    """A Zarr on the web; an object that a server forbids while it serves the root counts as missing."""

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, url: str) -> None:
        super().__init__(read_only=True)
        self.url = url

    def with_read_only(self, read_only: bool = False) -> Self:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WebStore) and other.url == self.url

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        url, span = join(self.url, key), _span(byte_range)
        try:
            body = await asyncio.to_thread(patiently, lambda: web.read(url, span), url)
        except FileNotFoundError:
            return None
        except Refused:
            if key != ROOT and await self.exists(ROOT):
                return None
            raise
        return prototype.buffer.from_bytes(body)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, asked) for key, asked in key_ranges)))

    async def exists(self, key: str) -> bool:
        url = join(self.url, key)
        try:
            await asyncio.to_thread(patiently, lambda: web.version(url), url)
        except FileNotFoundError:
            return False
        return True

    async def set(self, key: str, value: Buffer) -> None:
        raise UserError(f"nothing can be written to {shown(self.url)}")

    async def delete(self, key: str) -> None:
        raise UserError(f"nothing can be deleted at {shown(self.url)}")

    async def list(self) -> AsyncIterator[str]:
        raise UserError(f"{shown(self.url)} cannot be listed")
        yield

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        return self.list()

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        return self.list()


def _span(asked: ByteRequest | None) -> str | None:
    """Translates Zarr's byte request to an HTTP range."""
    if isinstance(asked, RangeByteRequest):
        return f"{asked.start}-{asked.end - 1}"
    if isinstance(asked, SuffixByteRequest):
        return f"-{asked.suffix}"
    return f"{asked.offset}-" if asked else None
