"""Reads files from the web, whole or in part; each redirect must lead to a host that the settings allow."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import httpx

from infra.addresses import may_lead, may_read, shown
from infra.errors import Refused, RefusedHop, UserError
from infra.retries import retry_after
from infra.settings import settings

PATIENCE = 60.0  # seconds for an answer
HOPS = 10  # most redirects on the way to an object
PIECE = 1 << 20  # bytes read at a time, on the way to disk


class Busy(OSError):
    """A server that does not serve an object now, whose status tells why."""

    def __init__(self, status: int, retry_after: float) -> None:
        super().__init__(f"HTTP {status}")
        self.retry_after = retry_after


def read(url: str, span: str | None = None) -> bytes:
    """Returns the object, or a part.

    Args:
        url: Where it is.
        span: A range as HTTP has it, `0-99` or `-8`; none: the whole.

    Raises:
        FileNotFoundError: There is none.
        OSError: The server does not answer as it should; it may do so later.
        UserError: It, or a host on the way to it, may not be asked.
    """
    with _answer(url, {"Range": f"bytes={span}"} if span else {}) as answer:
        if span and answer.status_code != 206:
            raise UserError(f"{answer.url.host} serves no parts of files: download {shown(url)} first")
        return answer.read()


def version(url: str) -> str:
    """Returns what changes when the object does, empty where the server does not tell; as `read`, but no body comes."""
    told = _told(url)
    etag, modified, size = (told.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length"))
    if etag or modified:
        return f"{etag} {modified} {size}"
    return ""


def length(url: str) -> int | None:
    """Returns the bytes of the object, None where the server does not tell; as `version`."""
    told = _told(url).get("Content-Length", "")
    return int(told) if told.isdecimal() else None


def _told(url: str) -> httpx.Headers:
    """Returns the headers of an object without its body."""
    try:
        return _headers(url, "HEAD")
    except FileNotFoundError:
        raise
    except (OSError, Refused):  # a signature holds for one method, and some servers know GET alone
        return _headers(url, "GET")


def _headers(url: str, method: str) -> httpx.Headers:
    with _answer(url, {}, method) as answer:
        return answer.headers


def download(url: str, path: Path) -> None:
    """Writes the object to a file of this machine; as `read`, but in pieces."""
    with _answer(url, {}) as answer, path.open("wb") as file:
        for piece in answer.iter_bytes(PIECE):
            file.write(piece)


@contextmanager
def _answer(url: str, headers: dict[str, str], method: str = "GET") -> Iterator[httpx.Response]:
    """Yields the answer to a request, after all redirects."""
    try:
        request = _client().build_request(method, url, headers=headers)
        if not may_read(str(request.url), local=False):
            raise UserError(f"{request.url.host} may not be asked: give another")
        for _ in range(HOPS):
            answer = _client().send(request, stream=True)
            try:
                if answer.next_request is None:
                    _refuse(answer, url)
                    yield answer
                    return
                request = _redirected(request, answer.next_request)
            finally:
                answer.close()
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise UserError(f"{shown(url)} is no address that can be read ({error}): give another") from None
    except httpx.HTTPError as error:  # their texts may hold the signature
        raise OSError(type(error).__name__) from None
    raise UserError(f"{shown(url)} redirects without end: give another address")


def _refuse(answer: httpx.Response, url: str) -> None:
    if answer.status_code in (404, 410):
        raise FileNotFoundError(f"HTTP status {answer.status_code}")
    if answer.status_code in (401, 403):
        raise Refused(f"access to {shown(url)} is refused: download it, or give an address that needs no password")
    if answer.status_code not in (200, 206):
        raise Busy(answer.status_code, retry_after(answer.headers.get("Retry-After")))


def _redirected(request: httpx.Request, target: httpx.Request) -> httpx.Request:
    """Returns the request that a redirect leads to, if it may lead there."""
    if not may_lead(str(request.url), str(target.url), settings().asset_hosts):
        host = target.url.host
        raise RefusedHop(
            f"{shown(str(request.url))} leads to {host}, and {host} may not be asked: give another address, or add the "
            "host to RANGEGRID_ASSET_HOSTS if you trust it"
        )
    return target


@lru_cache(maxsize=1)
def _client() -> httpx.Client:
    return httpx.Client(timeout=PATIENCE, headers={"Accept-Encoding": "identity"})
