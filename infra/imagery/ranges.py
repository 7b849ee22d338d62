"""Reads byte ranges of assets over HTTP and from disk, with retries, and never returns fewer bytes.

GDAL's own client is not asked: it remembers an error for each URL, so that a further attempt fails too, and tells
neither statuses nor short bodies. docs/sampling.md compares the speed with that of other readers.
"""

import asyncio
import atexit
import os
import re
import threading
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

import aiohttp
from yarl import URL

from infra import retries
from infra.addresses import shown
from infra.errors import RefusedHop, Unavailable, UserError
from infra.imagery import assets
from infra.imagery.assets import Asset
from infra.imagery.signing import forget, learn_region, redirected, signed
from infra.metrics import Cause, count_retry
from infra.retries import retry_after

T = TypeVar("T")

SCHEMES = ("", "file", "http", "https", "s3")
ATTEMPTS = 6  # attempts of a request, with waits of 15 s in all
REFUSALS = 5  # attempts after a 403, with waits of 7.5 s: a token may expire, and some gateways throttle so
HOPS = 5  # most redirects on the way to an asset
REDIRECTS = (301, 302, 303, 307, 308)
CONNECTIONS = 64  # connections of one process
GAP = 16_384  # bytes between two ranges, which are cheaper to read than a request is to send
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)  # a total would count waits for a connection


class UnreadableAsset(UserError):
    """An asset that stays unreadable: gone, corrupt, or no band."""


class MissingAsset(UnreadableAsset):
    """An asset that is not there."""


class UnavailableAsset(Unavailable):
    """An asset that cannot be read now: the server is down or busy. A later run may succeed."""


class RefusedAsset(UnavailableAsset):
    """An asset that its server forbids: all are forbidden, or this one is gone from a bucket that may not be listed."""

    place: str = ""
    """Host or bucket of the asset."""
    neighbours: tuple[Asset, ...] = ()
    """Assets of the same scene that were served."""


@dataclass
class Traffic:
    """Cost of reading, failed reads included."""

    requests: int = 0
    """Range requests sent, retries included."""
    bytes: int = 0
    """Bytes of the bodies of answers."""


class Failed(Exception):
    """A request that did not return its range.

    Attributes:
        cause: What may pass, where asking again may help.
        kind: The error that it is in the end.
        retry_after: Seconds that the server asks us to wait.
    """

    def __init__(
        self,
        problem: str,
        cause: Cause | None = None,
        kind: type[UserError] = UnavailableAsset,
        retry_after: float = 0,
    ) -> None:
        super().__init__(problem)
        self.cause, self.kind, self.retry_after = cause, kind, retry_after


class Ranges:
    """A reader of the byte ranges of one asset.

    Attributes:
        size: Bytes of the whole asset, once some were read.
    """

    def __init__(self, asset: Asset | str, traffic: Traffic) -> None:
        self.asset = assets.of(asset)
        href = self.asset.href
        if urlsplit(href).scheme not in SCHEMES:
            raise UserError(f"the asset {shown(href)} is not one that is read: http, https, s3 and file are")
        self.href, self.traffic = href, traffic
        self.size = 0
        self._url = ""  # signed: never shown

    async def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes from `start` to before `stop`; fewer only where the asset ends.

        Raises:
            UnreadableAsset: It is gone, or ends before `start`.
            RefusedAsset: Its server forbids it, after all attempts.
            UnavailableAsset: It cannot be had now, after all attempts.
        """
        refusals = 0

        def may_mend(error: BaseException) -> bool:
            nonlocal refusals
            if not isinstance(error, Failed) or error.cause is None:
                return False
            refusals += error.cause == Cause.REFUSED
            return refusals < REFUSALS

        ask = partial(self._ask, start, stop)
        try:
            body = await retries.ask_async(ask, ATTEMPTS, may_mend, tell=lambda error: count_retry(error.cause))
        except Failed as error:
            failed = error
        else:
            _served[self.asset.place] = self.asset
            return body
        raise self.failure(failed.kind, str(failed))  # not within: what it comes of may hold a signature

    def failure(self, kind: type[UserError], problem: str) -> UserError:
        """Returns an error of this asset, under a name without the URL's query."""
        name = "/".join(PurePosixPath(urlsplit(self.href).path).parts[-2:])
        if issubclass(kind, UnreadableAsset):
            return kind(
                f"the asset {name} cannot be read ({problem}): it is gone, corrupt or no band; take another scene"
            )
        error = kind(
            f"the asset {name} cannot be had now ({problem}): check that its server is up and lets us in, and run again"
        )
        if isinstance(error, RefusedAsset):
            error.place = self.asset.place
        return error

    def lies_beside(self, ending: str) -> bool:
        """Returns whether a local asset has a file of its name and this ending beside it; servers are not asked."""
        return urlsplit(self.href).scheme in ("", "file") and Path(_path(self.href) + ending).exists()

    async def _ask(self, start: int, stop: int) -> bytes:
        """Returns the bytes, of one request.

        Raises:
            Failed: They did not come.
            UserError: A setting is wrong, whatever the asset.
        """
        if urlsplit(self.href).scheme in ("", "file"):
            return self._from_disk(start, stop)
        try:
            self._url = self._url or await asyncio.to_thread(signed, self.asset)
            return await self._follow(self._url, start, stop)
        except RefusedHop as error:
            raise Failed(str(error), kind=UnreadableAsset) from None
        except Unavailable as error:
            raise Failed(str(error)) from None
        except UserError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:  # their texts may hold the signature
            raise Failed(type(error).__name__, Cause.LOST) from None

    async def _follow(self, signed_url: str, start: int, stop: int) -> bytes:
        """Yields the answer of a URL, after redirects that are allowed.

        Raises:
            Failed: It answers something else.
            UserError: A redirect leads where nothing may be read from.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        session, url = _session(asyncio.get_running_loop()), signed_url
        for _ in range(HOPS + 1):
            async with session.get(
                URL(sendable(url), encoded=True), headers=headers, trace_request_ctx=self.traffic, allow_redirects=False
            ) as response:
                if response.status >= 300 and learn_region(self.asset, response.headers):
                    self._url = ""
                    raise Failed("its bucket is in another region", Cause.REGION)
                if response.status in REDIRECTS and "Location" in response.headers:
                    url = redirected(url, response.headers["Location"])
                    continue
                if response.status in (401, 403):
                    await self._forget(signed_url)
                _check_status(response)
                return self._whole(response, await self._body(response), start, stop)
        raise Failed("it redirects without end", kind=UnreadableAsset)

    def _from_disk(self, start: int, stop: int) -> bytes:
        try:
            with open(_path(self.href), "rb") as file:
                body = os.pread(file.fileno(), stop - start, start)
                self.size = os.fstat(file.fileno()).st_size
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
            raise Failed(type(error).__name__, kind=MissingAsset if gone else UnavailableAsset) from None
        self.traffic.requests += 1
        self.traffic.bytes += len(body)
        return body

    async def _forget(self, url: str) -> None:
        """Makes the next attempt sign anew, where there is something to sign."""
        await asyncio.to_thread(forget, url)
        if self._url == url:
            self._url = ""

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        pieces = []
        async for piece in response.content.iter_any():
            self.traffic.bytes += len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _whole(self, response: aiohttp.ClientResponse, body: bytes, start: int, stop: int) -> bytes:
        """Returns the body, if it is the whole range asked for."""
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        first, last, size = map(int, found.groups()) if found else (-1, -1, stop)
        end = min(stop, size)
        if (first, last + 1, start + len(body)) != (start, end, end):
            raise Failed(f"{len(body)} bytes came for {end - start}", Cause.SHORT)
        self.size = size
        return body


def _check_status(response: aiohttp.ClientResponse) -> None:
    """Raises `Failed` for a status that brings no range."""
    status = response.status
    if status == 206:
        return
    wait = retry_after(response.headers.get("Retry-After"))
    if status in (401, 403):
        raise Failed(Cause.REFUSED, Cause.REFUSED, RefusedAsset, wait)
    if status in (404, 410):
        raise Failed(f"HTTP {status}", kind=MissingAsset)
    if status == 416:  # the asset ends before what its own header promises
        raise Failed(f"HTTP {status}", kind=UnreadableAsset)
    if status == 200:  # the whole asset would come
        raise Failed("its server knows no byte ranges")
    raise Failed(f"HTTP {status}", Cause.of_status(status), retry_after=wait)


def sendable(url: str) -> str:
    """Escapes spaces and letters beyond ASCII in a URL; what is escaped already stays."""
    return quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", url), safe="%:/?#[]@!$&'()*+,;=~")


def _path(href: str) -> str:
    """Returns the file of a local href, with a URL's escapes undone, unless a file has the name as written."""
    path = unquote(urlsplit(href).path)
    literal = href.removeprefix("file://")
    if not Path(path).exists() and Path(literal).exists():
        return literal
    return path


_served: dict[str, Asset] = {}  # by host or bucket what was served last


def is_gone(error: RefusedAsset) -> bool:
    """Returns whether a refused asset is gone: a neighbour, asked for now, is served all the same.

    Neighbours are the other assets of its scene, and whatever its host or bucket served last.
    """
    known = _served.get(error.place)
    return run(_is_any_served((known,) if known else error.neighbours))


async def _is_any_served(neighbours: tuple[Asset, ...]) -> bool:
    for asset in neighbours:
        with suppress(UserError):
            return bool(await Ranges(asset, Traffic()).read(0, 1))
    return False


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns ranges in order, with those within `GAP` of each other merged."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start - found[-1][1] <= GAP:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


async def every(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns results of concurrent work; raises the first error once all has ended, so that nothing runs on."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            raise error
    return cast("list[T]", results)


def run(reading: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on this process's reading loop, whose connections outlive the call, and waits for it."""
    future = asyncio.run_coroutine_threadsafe(reading, _loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


_starting = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork has none of its parent's threads


def _loop(process: int) -> asyncio.AbstractEventLoop:
    with _starting:
        if process not in _loops:
            _loops[process] = asyncio.new_event_loop()
            threading.Thread(target=_loops[process].run_forever, name="ranges", daemon=True).start()
        return _loops[process]


async def _count(session: aiohttp.ClientSession, context: Any, sent: aiohttp.TraceRequestHeadersSentParams) -> None:
    """Counts what really goes out: aiohttp follows redirects, and asks again where a kept connection was closed."""
    context.trace_request_ctx.requests += 1


@lru_cache(maxsize=1)
def _session(loop: asyncio.AbstractEventLoop) -> aiohttp.ClientSession:
    """Returns the event loop's session, which keeps connections open between scenes."""
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_count)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS), timeout=TIMEOUT, trust_env=True, trace_configs=[trace]
    )
    atexit.register(lambda: asyncio.run_coroutine_threadsafe(session.close(), loop).result(5))
    return session
