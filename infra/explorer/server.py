"""Serves the explorer's page and the grids of one directory on this machine, with parts of files as HTTP has them."""

import re
import socket
import threading
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass, field
from mimetypes import guess_type

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from infra import storage
from infra.errors import UserError
from infra.explorer.bundle import DIRECTORY, PAGE, files

HOST = "127.0.0.1"
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Shelf:
    """What is served under `grids/`."""

    places: Mapping[str, str]
    """URLs by the beginning of the path, with a slash at its end; the longest that fits counts."""
    texts: Mapping[str, bytes] = field(default_factory=dict)
    """Files that exist here alone, by path."""

    def located(self, path: str) -> tuple[Store, str] | None:
        """Returns the store that holds a path, and the key within it."""
        for begin in sorted(self.places, key=len, reverse=True):
            if path.startswith(begin):
                return storage.zarr_store(self.places[begin], read_only=True), path.removeprefix(begin)
        return None


def page_server(shelf: Shelf) -> Starlette:
    """Returns the server's application.

    Args:
        shelf: The grids.

    Raises:
        UserError: The page is not built.
    """
    page = files()

    async def start(request: Request) -> Response:
        return RedirectResponse(f"/{DIRECTORY}/{PAGE}")

    async def part_of_page(request: Request) -> Response:
        path = page.get(request.path_params["name"] or PAGE)
        return FileResponse(path) if path else Response(status_code=404)

    async def part_of_grid(request: Request) -> Response:
        return await _answer(shelf, request)

    routes = [
        Route("/", start),
        Route(f"/{DIRECTORY}/{{name:path}}", part_of_page),
        Route("/grids/{path:path}", part_of_grid),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # no page elsewhere reads by our keys
    return Starlette(routes=routes, middleware=[hosts])


async def _answer(shelf: Shelf, request: Request) -> Response:
    path = request.path_params["path"]
    kind = guess_type(path)[0] or "application/octet-stream"
    if path in shelf.texts:
        return Response(shelf.texts[path], media_type=kind)
    found = None if {"..", "."} & set(path.split("/")) else shelf.located(path)
    if found is None:
        return Response(status_code=404)
    store, key = found
    asked = request.headers.get("range")
    try:
        return await _read(store, key, kind, asked)
    except UserError as error:
        return Response(f"{error}\n", status_code=502, media_type="text/plain")


async def _read(store: Store, key: str, kind: str, asked: str | None) -> Response:
    span = _span(asked)
    body = await store.get(key, default_buffer_prototype(), span)
    if body is None:
        return Response(status_code=404)
    data, about = body.to_bytes(), {"Accept-Ranges": "bytes", "Cache-Control": "no-cache"}
    if span is None:
        return Response(data, media_type=kind, headers=about)
    size = await store.getsize(key)
    first = (
        size - len(data) if isinstance(span, SuffixByteRequest) else getattr(span, "start", getattr(span, "offset", 0))
    )
    if not data:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    about["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{size}"
    return Response(data, status_code=206, media_type=kind, headers=about)


def _span(asked: str | None) -> ByteRequest | None:
    """Translates one HTTP range to Zarr's byte request; anything else is answered by the whole, as HTTP allows."""
    match = RANGE.fullmatch(asked or "")
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return SuffixByteRequest(int(last))
    if not last:
        return OffsetByteRequest(int(first))
    if int(last) < int(first):
        return None
    return RangeByteRequest(int(first), int(last) + 1)


def serve(shelf: Shelf, opened: str, port: int, show: bool) -> None:
    """Serves until it is interrupted.

    Args:
        shelf: The grids.
        opened: What follows # in the page's address.
        port: Port of loopback; 0: a free one.
        show: Whether to open the browser.

    Raises:
        UserError: The page is not built, or the port is taken.
    """
    import uvicorn

    application = page_server(shelf)
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind((HOST, port))
        except OSError:
            raise UserError(f"port {port} of this machine is taken or not allowed: give another --port, or 0") from None
        own.listen()  # who reads the address may ask at once
        address = f"http://{HOST}:{own.getsockname()[1]}/{DIRECTORY}/{PAGE}{opened}"
        print(address, flush=True)
        if show:
            threading.Timer(1.0, webbrowser.open, [address]).start()
        config = uvicorn.Config(application, log_level="warning", lifespan="off")
        uvicorn.Server(config).run(sockets=[own])
