"""Reads and writes objects by URL: `file:///directory/x` and `s3://bucket/key`, and reads from `https://`.

Every write is one whole object: it is there entirely or not at all.
"""

import gzip
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from functools import partial
from mimetypes import guess_type
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore
from zarr.abc.store import Store

from infra import buckets, web
from infra.addresses import as_url as as_url
from infra.addresses import is_web, name_of
from infra.addresses import join as join
from infra.buckets import REFUSED, locate, patiently
from infra.errors import UserError
from infra.zarr_stores import ROOT, BucketStore, WebStore

PIECE = 8 << 20  # bytes read at a time, on the way to disk
# obstore tells these causes by a text alone too, see infra.buckets. An empty object, asked for from byte 0 on, is an
# error by S3's rules and by https://github.com/apache/arrow-rs-object-store/issues/453 on disk.
EMPTY = ("416 Range Not Satisfiable", "Requested range was invalid")
BELOW_FILE = "Not a directory (os error 20)"


def read(url: str) -> bytes:
    """Returns the whole object.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store is unreachable or forbids it.
    """
    if is_web(url):
        return patiently(lambda: web.read(url), url)
    store, name = locate(url)
    return _get(store, name, url)[0]


def read_part(url: str, start: int, count: int) -> bytes:
    """Returns so many bytes of the object, from a position on.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store is unreachable, forbids it or serves no parts.
    """

    def part() -> bytes:
        if is_web(url):
            data = web.read(url, f"{start}-{start + count - 1}")
        else:
            data = bytes(obstore.get_range(*locate(url), start=start, length=count))
        if len(data) != count:
            raise OSError(f"{len(data)} bytes came for {count}")
        return data

    return patiently(part, url)


def length(url: str) -> int | None:
    """Returns the bytes of the object; None where its server does not tell.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store is unreachable or forbids it.
    """
    if is_web(url):
        return patiently(lambda: web.length(url), url)
    return patiently(lambda: obstore.head(*locate(url)), url)["size"]


def read_tagged(url: str) -> tuple[bytes, str]:
    """Returns the whole object, and the tag of its version, for `replace`.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store is unreachable or forbids it.
    """
    store, name = locate(url)
    return _get(store, name, url)


@contextmanager
def as_file(url: str) -> Iterator[Path]:
    """Yields the object as a file of this machine: itself, or a copy that is gone after the block.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store is unreachable or forbids it.
    """
    if url.startswith("file:"):
        path = Path("/", locate(url)[1])
        if not path.is_file():
            raise FileNotFoundError(path)
        yield path
        return
    with TemporaryDirectory() as scratch:
        path = Path(scratch, name_of(url))
        patiently(lambda: web.download(url, path) if is_web(url) else _fetch(url, path), url)
        yield path


def _fetch(url: str, path: Path) -> None:
    store, name = locate(url)
    answer = obstore.get(store, name)
    with path.open("wb") as file:
        for piece in answer.stream(min_chunk_size=PIECE):
            file.write(piece)
    if (came := path.stat().st_size) != answer.meta["size"]:
        raise OSError(f"{came} bytes came for {answer.meta['size']}")


def upload(path: Path, url: str) -> None:
    """Writes a file, or every file of a directory, to `url`; what is named `ROOT`, which tells of the others, last."""
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in sorted(files, key=lambda file: file.relative_to(path).as_posix() == ROOT):
        if file != path:
            target = join(url, file.relative_to(path).as_posix())
        else:
            target = url
        store, name = locate(target)
        patiently(partial(obstore.put, store, name, file), target)


def _get(store: ObjectStore, name: str, url: str) -> tuple[bytes, str]:
    """Returns the whole object and its tag, read as a range, whose answer tells the object's size too."""

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
    """Returns the error; where a path goes on below a file, that there is no such object."""
    if BELOW_FILE in str(error):
        return FileNotFoundError(str(error))
    return error


def write(url: str, data: bytes) -> None:
    """Writes the whole object with one PUT, replacing what was there; S3 tells browsers its type, by its name."""
    store, name = locate(url)
    patiently(lambda: obstore.put(store, name, data, attributes=_about(url)), url)


def _about(url: str) -> Any:
    """Returns what S3 is to tell of an object: its type, by its name."""
    kind = None if url.startswith("file:") else guess_type(url)[0]
    return {"Content-Type": kind} if kind else None


def write_page(url: str, data: bytes) -> None:
    """Writes a file of a web page: on S3 packed by gzip, as browsers are told, who ask each time whether it changed."""
    if url.startswith("file:"):
        write(url, data)
        return
    store, name = locate(url)
    about: Any = {"Content-Encoding": "gzip", "Cache-Control": "no-cache"}
    about |= {"Content-Type": guess_type(name)[0] or "application/octet-stream"}
    packed = gzip.compress(data, mtime=0)
    patiently(lambda: obstore.put(store, name, packed, attributes=about), url)


def create(url: str, data: bytes) -> bool:
    """Writes the object unless one is there; tells whether this call wrote it."""
    store, name = locate(url)
    try:
        patiently(
            lambda: obstore.put(store, name, data, mode="create", use_multipart=False, attributes=_about(url)), url
        )
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
    store, name = locate(url)
    if url.startswith("file:"):
        return _replace_local(url, data, tag)
    mode: Any = "create" if tag is None else {"e_tag": tag}
    try:
        patiently(lambda: obstore.put(store, name, data, mode=mode, use_multipart=False, attributes=_about(url)), url)
    except (*REFUSED, FileNotFoundError):
        return _current(url)[0] == data
    return True


def _replace_local(url: str, data: bytes, tag: str | None) -> bool:
    """Replaces a file under a lock, by comparing versions and renaming, since file systems lack conditional writes."""
    with _locked(Path("/", locate(url)[1])):
        if _current(url)[1] != tag:
            return False
        write(url, data)
    return True


def _current(url: str) -> tuple[bytes | None, str | None]:
    try:
        return read_tagged(url)
    except FileNotFoundError:
        return None, None


def _locked(path: Path) -> AbstractContextManager[Any]:
    """Returns the lock of a file, to be held in a block; the system releases it when the process ends, however."""
    from filelock import FileLock  # 50 ms of imports that few processes need

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)  # a soft lock outlives its process


def modified(url: str) -> datetime:
    """Returns when the object was last written, in UTC.

    Raises:
        FileNotFoundError: There is none.
    """
    store, name = locate(url)
    return patiently(lambda: obstore.head(store, name), url)["last_modified"]


def exists(url: str) -> bool:
    """Tells whether an object exists."""
    try:
        version(url)
    except FileNotFoundError:
        return False
    return True


def version(url: str) -> str:
    """Returns a text that changes when the object does.

    Raises:
        FileNotFoundError: There is none.
    """
    if is_web(url):
        return patiently(lambda: web.version(url), url)
    store, name = locate(url)

    def head() -> Any:
        try:
            return obstore.head(store, name)
        except BaseError as error:
            raise _told_missing(error) from None

    meta = patiently(head, url)
    return f"{meta.get('e_tag')} {meta['last_modified'].isoformat()} {meta['size']}"


def names(url: str) -> list[str]:
    """Returns the names of objects and directories directly under `url`, sorted; empty where there is nothing."""
    store, name = locate(url)
    listing = patiently(lambda: obstore.list_with_delimiter(store, name or None), url)
    paths = [*listing["common_prefixes"], *(meta["path"] for meta in listing["objects"])]
    found = (path.rstrip("/") for path in paths)
    return sorted(path.rpartition("/")[2] for path in found if path != name)  # S3 servers list emptied directories


def paths(url: str) -> list[str]:
    """Returns the paths, from `url`, of every object under it; directories, which may outlive objects, are left out."""
    _, name = locate(url)
    return [meta["path"].removeprefix(name).strip("/") for meta in _list(url)]


def tagged(url: str) -> dict[str, str]:
    """Returns the paths, from `url`, of every object under it, sorted, each with what changes when the object does."""
    _, name = locate(url)
    found = {meta["path"].removeprefix(name).strip("/"): f"{meta['e_tag']} {meta['size']}" for meta in _list(url)}
    return dict(sorted(found.items()))


def shards(url: str) -> set[int]:
    """Returns the numbers of the stored shards under `url`, along the first dimension of a Zarr array."""
    return {int(path.partition("/")[0]) for path in paths(url)}


def delete(url: str) -> None:
    """Deletes the object at `url` and every object under it."""
    store, name = locate(url)
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
    """Returns the bytes of all objects under `url`."""
    return sum(meta["size"] for meta in _list(url))


def measured(url: str) -> tuple[int, datetime | None]:
    """Returns the bytes of all objects under `url`, and when one was last written; None where there are none."""
    found = _list(url)
    return sum(meta["size"] for meta in found), max((meta["last_modified"] for meta in found), default=None)


def _list(url: str) -> list[Any]:
    store, name = locate(url)
    return patiently(lambda: [meta for batch in obstore.list(store, prefix=name) for meta in batch], url)


def read_json(url: str) -> Any:
    """Returns the object parsed as JSON."""
    return json.loads(read(url))


def write_json(url: str, value: Any) -> None:
    """Writes a value as readable JSON, in a stable order of keys."""
    write(url, as_json(value))


def as_json(value: Any) -> bytes:
    """Returns a value as readable JSON, in a stable order of keys."""
    return json.dumps(value, indent=2, sort_keys=True).encode()


def presigned(url: str) -> str:
    """Returns an HTTP URL that reads the object for an hour without keys. It holds a signature: never show it.

    Raises:
        UserError: There are no keys to sign with.
    """
    store, name = locate(url)
    try:
        return obstore.sign(store, "GET", name, timedelta(hours=1))
    except BaseError:
        pass
    raise UserError(f"{url} needs keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def zarr_store(url: str, read_only: bool = False) -> Store:
    """Opens a Zarr store at `url`, for `zarr.open_group(store=…)` and `xarray.open_zarr`, with retries like `read`."""
    if is_web(url):
        return WebStore(url)
    _, path = locate(url)
    local = url.startswith("file:")
    if local:
        store = buckets.local("/" + path)
    else:
        store = buckets.s3(url.removeprefix("s3://").partition("/")[0], path)
    return BucketStore(store, url, read_only=read_only)


def check_writable(url: str, size: int = 0) -> None:
    """Refuses, before any work, a place that cannot be written, or a local one without room for `size` bytes.

    Raises:
        UserError: The bucket does not exist, access is forbidden, the disk is too full, or the service does not answer.
    """
    probe = join(url, ".rangegrid-write-check")
    write(probe, b"")
    if url.startswith("file:") and (free := shutil.disk_usage(Path("/", locate(url)[1])).free) < size:
        raise UserError(
            f"{url} has {free / 1e9:,.1f} GB free and the run stores {size / 1e9:,.1f} GB: free some, or set "
            "RANGEGRID_STORAGE_URL elsewhere"
        )
    delete(probe)


def copy(source: str, target: str) -> None:
    """Copies the object at `source`, or every object under it, to `target`."""
    store, name = locate(source)
    paths = [meta["path"] for meta in _list(source)]
    if not paths:
        write(target, read(source))
    for path in paths:
        write(join(target, path.removeprefix(name)), _get(store, path, source)[0])
