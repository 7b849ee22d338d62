"""Byte ranges of assets, over HTTP and from disk: asked for again while that may help, and never short."""

import asyncio
import atexit
import os
import random
import re
import threading
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import aiohttp
from yarl import URL

from infra.addresses import unsigned
from infra.errors import Unavailable, UserError
from infra.imagery.signing import RefusedHop, forget, learn_region, redirected, signed
from infra.metrics import Cause, count_retry

T = TypeVar("T")

SCHEMES = ("", "file", "http", "https", "s3")
ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds before the second attempt, doubled before each further one: 15 s in all
LONGEST_WAIT = 60.0  # seconds, also where the server asks for more
REFUSALS = 5  # 7.5 s: a token may expire under way, and some gateways throttle by 403
HOPS = 5  # redirects on the way to an asset
REDIRECTS = (301, 302, 303, 307, 308)
CONNECTIONS = 64  # of one process
GAP = 16_384  # bytes between two ranges that are cheaper to read than a request
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)  # a total would count waits for a connection


class UnreadableAsset(UserError):
    """An asset that stays wrong however often it is read: gone, corrupt, or not what a band is."""


class UnavailableAsset(Unavailable):
    """An asset that cannot be had now: the server is down or busy. A later run may get it."""


class RefusedAsset(UnavailableAsset):
    """An asset that its server forbids: all of them are, or this one is gone where what is there may not be listed."""

    place: str = ""
    """Host or bucket."""
    neighbours: tuple[str, ...] = ()
    """Hrefs of the same scene that were served."""


@dataclass
class Traffic:
    """What reading took; counts go on where it fails."""

    requests: int = 0
    """Range requests sent, repeated ones included."""
    bytes: int = 0
    """Bytes of their bodies."""


@dataclass(frozen=True)
class Answer:
    """What one request came to."""

    body: bytes = b""
    problem: str = ""
    """Empty: the body is right and whole."""
    cause: Cause | None = None
    """What passes, where asking again may help."""
    final: type[UserError] | None = None
    """The error, where asking again does not help."""
    wait: float = 0
    """Seconds that the server asks us to wait."""


class Ranges:
    """The byte ranges of one asset.

    Attributes:
        size: Bytes of the whole asset, once some were read.
    """

    def __init__(self, href: str, traffic: Traffic) -> None:
        if urlsplit(href).scheme not in SCHEMES:
            raise UserError(f"the asset {unsigned(href)} is not one that is read: http, https, s3 and file are")
        self.href, self.traffic = href, traffic
        self.size = 0
        self._url = ""  # signed: never shown

    async def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to before `stop`; fewer only where the asset ends.

        Raises:
            UnreadableAsset: It is gone, or ends before `start`.
            RefusedAsset: Its server forbids it, after all attempts.
            UnavailableAsset: It cannot be had now, after all attempts.
        """
        causes: list[Cause] = []
        while True:
            answer = await self._ask(start, stop)
            if not answer.problem:
                _served[self._place] = self.href
                return answer.body
            if answer.cause is None:
                raise self.failure(answer.final or UnavailableAsset, answer.problem)
            causes.append(answer.cause)
            if len(causes) == ATTEMPTS or causes.count(Cause.REFUSED) == REFUSALS:
                refused = answer.cause == Cause.REFUSED
                raise self.failure(RefusedAsset if refused else UnavailableAsset, answer.problem)
            count_retry(answer.cause)
            await asyncio.sleep(max(_backoff(len(causes)), min(answer.wait, LONGEST_WAIT)))

    def failure(self, kind: type[UserError], problem: str) -> UserError:
        """The error of this asset, under a name without its query."""
        name = "/".join(PurePosixPath(urlsplit(self.href).path).parts[-2:])
        if kind is UnreadableAsset:
            return kind(
                f"the asset {name} cannot be read ({problem}): it is gone, corrupt or no band; take another scene"
            )
        error = kind(
            f"the asset {name} cannot be had now ({problem}): check that its server is up and lets us in, and run again"
        )
        if isinstance(error, RefusedAsset):
            error.place = self._place
        return error

    def lies_beside(self, ending: str) -> bool:
        """Returns whether a local asset has a file of its name and this ending beside it; servers are not asked."""
        return urlsplit(self.href).scheme in ("", "file") and Path(_path(self.href) + ending).exists()

    @property
    def _place(self) -> str:
        """The host or bucket that serves it."""
        return urlsplit(self.href).netloc

    async def _ask(self, start: int, stop: int) -> Answer:
        if urlsplit(self.href).scheme in ("", "file"):
            return self._from_disk(start, stop)
        try:
            self._url = self._url or await asyncio.to_thread(signed, self.href)
            return await self._follow(self._url, start, stop)
        except RefusedHop as error:
            return Answer(problem=str(error), final=UnreadableAsset)
        except Unavailable as error:
            return Answer(problem=str(error), final=UnavailableAsset)
        except UserError:  # a setting of this process, whatever the asset
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:  # their texts may hold the signature
            return Answer(problem=type(error).__name__, cause=Cause.LOST)

    async def _follow(self, signed_url: str, start: int, stop: int) -> Answer:
        """What a URL answers, by way of redirects to where we may go.

        Raises:
            UserError: A redirect leads where nothing may be read from.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        session, url = _session(asyncio.get_running_loop()), signed_url
        for _ in range(HOPS + 1):
            async with session.get(
                URL(sendable(url), encoded=True), headers=headers, trace_request_ctx=self.traffic, allow_redirects=False
            ) as response:
                if response.status >= 300 and learn_region(self.href, response.headers):
                    self._url = ""
                    return Answer(problem="its bucket is in another region", cause=Cause.REGION)
                if response.status in REDIRECTS and "Location" in response.headers:
                    url = redirected(url, response.headers["Location"])
                    continue
                if response.status in (401, 403):
                    return await self._refused(signed_url, _retry_after(response))
                return _refusal(response) or self._whole(response, await self._body(response), start, stop)
        return Answer(problem="it redirects without end", final=UnreadableAsset)

    def _from_disk(self, start: int, stop: int) -> Answer:
        try:
            with open(_path(self.href), "rb") as file:
                body = os.pread(file.fileno(), stop - start, start)
                self.size = os.fstat(file.fileno()).st_size
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
            return Answer(problem=type(error).__name__, final=UnreadableAsset if gone else UnavailableAsset)
        self.traffic.requests += 1
        self.traffic.bytes += len(body)
        return Answer(body)

    async def _refused(self, url: str, wait: float) -> Answer:
        """After a 403: the next attempt signs anew, where there is something to sign."""
        await asyncio.to_thread(forget, url)
        if self._url == url:
            self._url = ""
        return Answer(problem=Cause.REFUSED, cause=Cause.REFUSED, wait=wait)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        pieces = []
        async for piece in response.content.iter_any():
            self.traffic.bytes += len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _whole(self, response: aiohttp.ClientResponse, body: bytes, start: int, stop: int) -> Answer:
        """The body, if it is all of the range asked for."""
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        first, last, size = map(int, found.groups()) if found else (-1, -1, stop)
        end = min(stop, size)
        if (first, last + 1, start + len(body)) != (start, end, end):
            return Answer(problem=f"{len(body)} bytes came for {end - start}", cause=Cause.SHORT)
        self.size = size
        return Answer(body)


def _refusal(response: aiohttp.ClientResponse) -> Answer | None:
    """What to do about a status that brings no range; None where it brings one."""
    status = response.status
    if status == 206:
        return None
    if status in (404, 410, 416):  # 416: the asset ends before what its own header promises
        return Answer(problem=f"HTTP {status}", final=UnreadableAsset)
    if status == 200:  # the whole asset would come
        return Answer(problem="its server knows no byte ranges", final=UnavailableAsset)
    return Answer(problem=f"HTTP {status}", cause=Cause.of_status(status), wait=_retry_after(response))


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Seconds that the server asks us to wait, given as a number or as a date."""
    text = response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0


def sendable(url: str) -> str:
    """A URL with what may not stand in one (spaces, letters beyond ASCII) escaped; what is escaped stays as it is."""
    return quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", url), safe="%:/?#[]@!$&'()*+,;=~")


def _path(href: str) -> str:
    """The file of a local href: a URL's escapes are undone, but for a name that is written as it is."""
    path = unquote(urlsplit(href).path)
    literal = href.removeprefix("file://")
    return literal if not Path(path).exists() and Path(literal).exists() else path


def _backoff(attempt: int) -> float:
    return FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)


_served: dict[str, str] = {}  # by host or bucket the href that was served last


def is_gone(error: RefusedAsset) -> bool:
    """Returns whether a refused asset is gone: a neighbour, asked for now, is served all the same.

    Neighbours are the other assets of its scene, and whatever its host or bucket served last.
    """
    known = _served.get(error.place)
    return run(_is_any_served((known,) if known else error.neighbours))


async def _is_any_served(hrefs: tuple[str, ...]) -> bool:
    for href in hrefs:
        with suppress(UserError):
            return bool(await Ranges(href, Traffic()).read(0, 1))
    return False


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those within `GAP` of each other as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start - found[-1][1] <= GAP:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


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
    """The session of a loop, made on it; keeps connections open between scenes."""
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_count)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS), timeout=TIMEOUT, trust_env=True, trace_configs=[trace]
    )
    atexit.register(lambda: asyncio.run_coroutine_threadsafe(session.close(), loop).result(5))
    return session
