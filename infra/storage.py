"""Objects by URL: `file:///directory/x` and `s3://bucket/key` by one code path, and what is read from `https://`.

Every write is one whole object: it is there entirely or not at all. Credentials come from the settings at the
moment of use and are in no URL, so a URL may be logged, stored and sent to workers.
"""

import asyncio
import fcntl
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import lru_cache, partial
from mimetypes import guess_type
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, ObjectStore, S3Store
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore as ZarrObjectStore

from infra import web
from infra.addresses import as_url as as_url
from infra.addresses import is_web, name_of, shown
from infra.errors import Unavailable, UserError
from infra.settings import settings
from infra.web import Refused

T = TypeVar("T")

ROOT = "zarr.json"  # of a Zarr, with the metadata of all
PIECE = 8 << 20  # bytes at a time, of what goes to disk
ATTEMPTS = 3  # beyond obstore's own, for what it takes for an answer: a body that is not whole, a lost connection
RETRIES: Any = {  # obstore's: some 4 s, as long as a server that restarts needs
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 3},
}
AMBIENT = (  # variables by which containers are told where their keys are
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
FORBIDDEN = (PermissionError, PermissionDeniedError, UnauthenticatedError)
REFUSED = (AlreadyExistsError, PreconditionError)  # an answer of the store, not a failure of it
EMPTY = ("416 Range Not Satisfiable", "Requested range was invalid")  # what asking for byte 0 of nothing comes to
BELOW_FILE = "Not a directory (os error 20)"
LASTING = ("NoSuchBucket", "No space left", "os error 28")  # signs of what no further attempt mends


def join(url: str, *parts: str) -> str:
    """`url` with path parts appended."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def _locate(url: str) -> tuple[ObjectStore, str]:
    """The object store that serves `url` (one per bucket and environment), and the key within it."""
    scheme, _, rest = url.partition("://")
    if scheme == "file" and rest.startswith("/"):
        return _local("/"), unquote(rest).strip("/")
    bucket, _, key = rest.partition("/")  # not by urlsplit: a key may hold # and ?
    if is_web(url):
        raise UserError(f"nothing can be written to {shown(url)}: use a path, file:///directory or s3://bucket/prefix")
    if scheme != "s3" or not bucket:
        raise UserError(f"the storage URL {url!r} is not one of ours: use file:///directory or s3://bucket/prefix")
    return _s3(bucket, ""), key.strip("/")


@lru_cache
def _local(directory: str) -> LocalStore:
    return LocalStore(directory, mkdir=True)


def _s3(bucket: str, prefix: str) -> S3Store:
    where = settings()
    keys = [k.get_secret_value() if k else None for k in (where.access_key, where.secret_key)]
    return _s3_with(bucket, prefix, where.s3_endpoint, where.region, *keys)


@lru_cache(maxsize=256)
def _s3_with(
    bucket: str, prefix: str, endpoint: str | None, region: str, key: str | None, secret: str | None
) -> S3Store:
    options: dict[str, Any] = {"region": region, "virtual_hosted_style_request": False}
    if endpoint:
        options |= {"endpoint": endpoint}
    if key and secret:
        options |= {"access_key_id": key, "secret_access_key": secret}
    elif not has_ambient_keys():
        options["skip_signature"] = True
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=options,
        client_options={"allow_http": bool(endpoint and endpoint.startswith("http://"))},
        retry_config=RETRIES,
    )


def has_ambient_keys() -> bool:
    """Whether this machine may have S3 keys beyond the settings': of a container, or of an EC2 instance.

    One without any asks for no keys and signs nothing: so it reads what is public.
    """
    vendor = Path("/sys/class/dmi/id/sys_vendor")
    told = any(name in os.environ for name in AMBIENT)
    return told or (vendor.exists() and "Amazon EC2" in vendor.read_text())


def patiently(call: Callable[[], T], url: str) -> T:
    """Calls, and calls again with backoff and jitter while the store does not answer.

    Raises:
        FileNotFoundError: There is no such object.
        UserError: The store is unreachable, full or forbids it; it names `url`.
    """
    for attempt in itertools.count(1):
        try:
            return call()
        except (BaseError, OSError) as error:
            time.sleep(_pause(error, attempt, url))
    raise AssertionError("unreachable: the last attempt returns or raises")


async def _patiently(call: Callable[[], Awaitable[T]], url: str) -> T:
    """The same on an event loop."""
    for attempt in itertools.count(1):
        try:
            return await call()
        except (BaseError, OSError) as error:
            await asyncio.sleep(_pause(error, attempt, url))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _pause(error: Exception, attempt: int, url: str) -> float:
    """Seconds to wait after a failed attempt; raises what no further one mends."""
    if isinstance(error, REFUSED) or (isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)):
        raise error
    if isinstance(error, FORBIDDEN):
        raise _forbidden(url) from error
    if attempt == ATTEMPTS or any(sign in str(error) for sign in LASTING):
        raise _unreachable(url, error) from error
    return min(8.0, 0.25 * 2 ** (attempt - 1)) * (0.5 + random.random())


def _forbidden(url: str) -> UserError:
    return Refused(
        f"access to {url} is forbidden: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "and that they may read and write this bucket"
    )


def _unreachable(url: str, error: Exception) -> UserError:
    text = str(error)
    if "NoSuchBucket" in text:
        return UserError(f"the bucket of {url} does not exist: create it, or set RANGEGRID_STORAGE_URL")
    if "No space left" in text or "os error 28" in text:
        return UserError(f"no space is left at {url}: free some, or set RANGEGRID_STORAGE_URL elsewhere")
    reason = text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
    return Unavailable(f"{_server(url)} did not serve {shown(url)} ({reason}): check that it is up and reachable")


def _server(url: str) -> str:
    if url.startswith("s3:"):
        return settings().s3_endpoint or "the S3 service"
    return urlsplit(url).netloc.rpartition("@")[2] or "the file system"


def read(url: str) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store is unreachable or forbids it.
    """
    if is_web(url):
        return patiently(lambda: web.read(url), url)
    store, name = _locate(url)
    return _get(store, name, url)[0]


def read_tagged(url: str) -> tuple[bytes, str]:
    """The whole object, and the tag of its version that `replace` takes.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store is unreachable or forbids it.
    """
    store, name = _locate(url)
    return _get(store, name, url)


@contextmanager
def as_file(url: str) -> Iterator[Path]:
    """Yields the object as a file of this machine: itself, or a copy that is gone after the block.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store is unreachable or forbids it.
    """
    if url.startswith("file:"):
        path = Path("/", _locate(url)[1])
        if not path.is_file():
            raise FileNotFoundError(path)
        yield path
        return
    with TemporaryDirectory() as scratch:
        path = Path(scratch, name_of(url))
        patiently(lambda: web.download(url, path) if is_web(url) else _fetch(url, path), url)
        yield path


def _fetch(url: str, path: Path) -> None:
    store, name = _locate(url)
    answer = obstore.get(store, name)
    with path.open("wb") as file:
        for piece in answer.stream(min_chunk_size=PIECE):
            file.write(piece)
    if (came := path.stat().st_size) != answer.meta["size"]:
        raise OSError(f"{came} bytes came for {answer.meta['size']}")


def upload(path: Path, url: str) -> None:
    """Writes a file, or every file of a directory, to `url`; what is named `ROOT`, which tells of the others, last."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in sorted(files, key=lambda file: file.relative_to(path).as_posix() == ROOT):
        target = join(url, file.relative_to(path).as_posix()) if file != path else url
        store, name = _locate(target)
        patiently(partial(obstore.put, store, name, file), target)


def _get(store: ObjectStore, name: str, url: str) -> tuple[bytes, str]:
    """The whole object, asked for as a range: its answer tells the object's size beside the body's; and its tag."""

    def whole() -> tuple[bytes, str]:
        try:
            answer = obstore.get(store, name, options={"range": {"offset": 0}})
        except BaseError as error:
            if any(sign in str(error) for sign in EMPTY):
                return b"", str(obstore.head(store, name)["e_tag"])
            raise _told_missing(error) from None
        data = bytes(answer.bytes())
        if len(data) != answer.meta["size"]:
            raise OSError(f"{len(data)} bytes came for {answer.meta['size']}")
        return data, str(answer.meta["e_tag"])

    return patiently(whole, url)


def _told_missing(error: Exception) -> Exception:
    """The error, or that there is no such object where a path goes on below a file."""
    return FileNotFoundError(str(error)) if BELOW_FILE in str(error) else error


def write(url: str, data: bytes) -> None:
    """Writes the whole object with one PUT, replacing what was there; S3 tells browsers its type, by its name."""
    store, name = _locate(url)
    kind = None if url.startswith("file:") else guess_type(name)[0]
    about: Any = {"Content-Type": kind} if kind else None
    patiently(lambda: obstore.put(store, name, data, attributes=about), url)


def create(url: str, data: bytes) -> bool:
    """Writes the object unless one is there; tells whether this call wrote it."""
    store, name = _locate(url)
    try:
        patiently(lambda: obstore.put(store, name, data, mode="create", use_multipart=False), url)
    except AlreadyExistsError:
        return False
    return True


def replace(url: str, data: bytes, tag: str | None) -> bool:
    """Writes the object if its version is still that of `tag`; of many who try, one succeeds.

    The answer to a write can be lost, and the write, repeated, is then refused because of itself. So after a refusal
    the object is read: if it is `data`, the write is taken for ours. Whoever must know puts a nonce in it.

    Args:
        url: The object.
        data: Its new content.
        tag: Of `read_tagged`; none: there is no object yet.

    Returns:
        Whether the object is `data` now.
    """
    store, name = _locate(url)
    if url.startswith("file:"):
        return _replace_local(url, data, tag)
    mode: Any = "create" if tag is None else {"e_tag": tag}
    try:
        patiently(lambda: obstore.put(store, name, data, mode=mode, use_multipart=False), url)
    except (*REFUSED, FileNotFoundError):
        return _current(url)[0] == data
    return True


def _replace_local(url: str, data: bytes, tag: str | None) -> bool:
    """A file system has no conditional write: the version is compared and the file renamed into place under a lock."""
    with _locked(Path("/", _locate(url)[1])):
        if _current(url)[1] != tag:
            return False
        write(url, data)
    return True


def _current(url: str) -> tuple[bytes | None, str | None]:
    try:
        return read_tagged(url)
    except FileNotFoundError:
        return None, None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file; the system releases it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def modified(url: str) -> datetime:
    """When the object was last written, in UTC.

    Raises:
        FileNotFoundError: There is none.
    """
    store, name = _locate(url)
    return patiently(lambda: obstore.head(store, name), url)["last_modified"]


def exists(url: str) -> bool:
    """Whether an object is there."""
    try:
        version(url)
    except FileNotFoundError:
        return False
    return True


def version(url: str) -> str:
    """What changes when the object does.

    Raises:
        FileNotFoundError: There is none.
    """
    if is_web(url):
        return patiently(lambda: web.version(url), url)
    store, name = _locate(url)

    def head() -> Any:
        try:
            return obstore.head(store, name)
        except BaseError as error:
            raise _told_missing(error) from None

    meta = patiently(head, url)
    return f"{meta.get('e_tag')} {meta['last_modified'].isoformat()} {meta['size']}"


def names(url: str) -> list[str]:
    """Names of the objects and directories directly under `url`, sorted; empty where nothing is."""
    store, name = _locate(url)
    listing = patiently(lambda: obstore.list_with_delimiter(store, name or None), url)
    paths = [*listing["common_prefixes"], *(meta["path"] for meta in listing["objects"])]
    found = (path.rstrip("/") for path in paths)
    return sorted(path.rpartition("/")[2] for path in found if path != name)  # S3 servers list emptied directories


def paths(url: str) -> list[str]:
    """Paths from `url` of every object under it; none of a directory, which may outlive its objects."""
    _, name = _locate(url)
    return [meta["path"].removeprefix(name).strip("/") for meta in _list(url)]


def shards(url: str) -> set[int]:
    """Numbers of the shards under `url`, the chunks of a Zarr array along its first dimension."""
    return {int(path.partition("/")[0]) for path in paths(url)}


def delete(url: str) -> None:
    """Deletes the object at `url` and every object under it."""
    store, name = _locate(url)
    if url.startswith("file:"):
        _delete_local(Path("/", name))
        return
    paths = [meta["path"] for meta in _list(url)]
    for start in range(0, len(paths), 1000):
        patiently(partial(obstore.delete, store, paths[start : start + 1000]), url)
    if exists(url):
        patiently(lambda: obstore.delete(store, name), url)


def _delete_local(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size(url: str) -> int:
    """Bytes of all objects under `url`."""
    return sum(meta["size"] for meta in _list(url))


def measured(url: str) -> tuple[int, datetime | None]:
    """Bytes of all objects under `url`, and when one of them was last written; nothing where there are none."""
    found = _list(url)
    return sum(meta["size"] for meta in found), max((meta["last_modified"] for meta in found), default=None)


def _list(url: str) -> list[Any]:
    store, name = _locate(url)
    return patiently(lambda: [meta for batch in obstore.list(store, prefix=name) for meta in batch], url)


def read_json(url: str) -> Any:
    """The object parsed as JSON."""
    return json.loads(read(url))


def write_json(url: str, value: Any) -> None:
    """Writes a value as readable JSON, in a stable order of keys."""
    write(url, json.dumps(value, indent=2, sort_keys=True).encode())


def presigned(url: str) -> str:
    """An HTTP URL that reads the object for an hour without keys: it holds a signature, so show it nowhere.

    Raises:
        UserError: There are no keys to sign with.
    """
    store, name = _locate(url)
    try:
        return obstore.sign(store, "GET", name, timedelta(hours=1))
    except BaseError:
        pass
    raise UserError(f"{url} needs keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def zarr_store(url: str, read_only: bool = False) -> Store:
    """A Zarr store at `url`, for `zarr.open_group(store=…)` and `xarray.open_zarr`; as patient as `read`."""
    if is_web(url):
        return WebStore(url)
    _, path = _locate(url)
    local = url.startswith("file:")
    store = _local("/" + path) if local else _s3(url.removeprefix("s3://").partition("/")[0], path)
    return _ZarrStore(store, url, read_only=read_only)


class _ZarrStore(ZarrObjectStore):
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
            return await _patiently(whole, join(self.url, key))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except Refused:
            if self.read_only and key != ROOT and await asyncio.to_thread(exists, join(self.url, ROOT)):
                return None  # a bucket that may not be listed says so of what is not there, as of a tile at sea
            raise

    async def exists(self, key: str) -> bool:
        return await _patiently(partial(super().exists, key), join(self.url, key))

    async def set(self, key: str, value: Buffer) -> None:
        await _patiently(partial(super().set, key, value), join(self.url, key))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await _patiently(partial(super().set_if_not_exists, key, value), join(self.url, key))


def _range(asked: ByteRequest | None) -> Any:
    """What Zarr asks for, in obstore's terms; the whole object as a range too, whose answer tells its size."""
    if isinstance(asked, RangeByteRequest):
        return asked.start, asked.end
    if isinstance(asked, SuffixByteRequest):
        return {"suffix": asked.suffix}
    return {"offset": asked.offset if asked else 0}


class WebStore(Store):
    """A Zarr on the web, read as it is asked for; what a server forbids while it serves the root is not there."""

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
            if key != ROOT and await asyncio.to_thread(exists, join(self.url, ROOT)):
                return None
            raise
        return prototype.buffer.from_bytes(body)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, asked) for key, asked in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(exists, join(self.url, key))

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
    """What Zarr asks for, as HTTP has it."""
    if isinstance(asked, RangeByteRequest):
        return f"{asked.start}-{asked.end - 1}"
    if isinstance(asked, SuffixByteRequest):
        return f"-{asked.suffix}"
    return f"{asked.offset}-" if asked else None


def check_writable(url: str, size: int = 0) -> None:
    """Refuses, before any work, a place that cannot be written, or a local one without room for `size` bytes.

    Raises:
        UserError: The bucket does not exist, access is forbidden, the disk is too full, or the service does not answer.
    """
    probe = join(url, ".rangegrid-write-check")
    write(probe, b"")
    if url.startswith("file:") and (free := shutil.disk_usage(Path("/", _locate(url)[1])).free) < size:
        raise UserError(
            f"{url} has {free / 1e9:,.1f} GB free and the run stores {size / 1e9:,.1f} GB: free some, or set "
            "RANGEGRID_STORAGE_URL elsewhere"
        )
    delete(probe)


def copy(source: str, target: str) -> None:
    """Copies the object at `source`, or every object under it, to `target`."""
    store, name = _locate(source)
    paths = [meta["path"] for meta in _list(source)]
    if not paths:
        write(target, read(source))
    for path in paths:
        write(join(target, path.removeprefix(name)), _get(store, path, source)[0])
