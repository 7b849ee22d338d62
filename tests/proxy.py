"""A reverse HTTP proxy on loopback that injects faults, to put before the real STAC and S3 servers.

    with Proxy(sandbox.endpoint) as proxy:
        proxy.inject(status(503), when=path("B04.tif"), times=2)
        read(proxy.url + "/bucket/scene/B04.tif")
        assert proxy.faults["status 503"] == 2

It passes the client's headers on as they are (S3's signature covers Host), so the same keys work through it. It also
answers as a forward proxy (`http_proxy=proxy.url`): so a client may ask for a host that cannot be reached here.
"""

import json
import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qsl, urlencode, urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "content-length", "expect"}
SAS = "/proxy/sas"  # answers as Planetary Computer's token endpoint: PC_SDK_SAS_URL
SIGNATURE = {"st", "se", "sp", "sig"}


@dataclass(frozen=True)
class Request:
    """What the client asks."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes = b""

    def target(self) -> str:
        """Path and query without a signature, which is between the client and this proxy."""
        query = urlencode({k: v for k, v in self.query.items() if k not in SIGNATURE})
        return f"{self.path}?{query}" if query else self.path

    def identity(self) -> str:
        """What is asked for, however it was signed: the same today and tomorrow."""
        query = {k: v for k, v in self.query.items() if k not in SIGNATURE and not k.startswith("X-Amz-")}
        return f"{self.method} {self.path}?{urlencode(query)} {self.headers.get('range')}"


@dataclass(frozen=True)
class Reply:
    """What the client gets; the connection is closed after a body that is not as long as declared."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    length: int | None = None
    """The Content-Length to declare, if not the body's."""


Ask = Callable[[], Reply]
Fault = Callable[[Request, Ask], Reply | None]
"""Makes the reply, with or without asking the server; None drops the connection."""
Predicate = Callable[[Request], bool]


def named(name: str, fault: Fault) -> Fault:
    """A fault under the name by which it is counted."""
    fault.__name__ = name
    return fault


def latency(seconds: float) -> Fault:
    """The answer comes later."""
    return named("latency", lambda request, ask: time.sleep(seconds) or ask())


def status(code: int, headers: dict[str, str] | None = None) -> Fault:
    """The answer is an error, e.g. `status(429, {"Retry-After": "1"})`; the server is not asked."""
    return named(f"status {code}", lambda request, ask: Reply(code, headers or {}, b"injected"))


def dropped() -> Fault:
    """The connection ends without an answer."""
    return named("dropped", lambda request, ask: None)


def lost() -> Fault:
    """The server does as it is told, and its answer does not arrive."""
    return named("lost", lambda request, ask: ask() and None)


def truncated(keep: float = 0.5, honest: bool = False) -> Fault:
    """The body ends early; unless honest, Content-Length promises all of it and the connection is closed."""

    def fault(request: Request, ask: Ask) -> Reply:
        reply = ask()
        kept = reply.body[: int(len(reply.body) * keep)]
        return replace(reply, body=kept, length=None if honest else len(reply.body))

    return named("truncated", fault)


def wrong_length(by: int = -100) -> Fault:
    """Content-Length lies; where it is too small, the client gets a body that looks whole and is not."""
    return named("wrong length", lambda request, ask: (r := ask()) and replace(r, length=max(0, len(r.body) + by)))


def corrupted(start: float = 0.25) -> Fault:
    """Half the bytes are inverted, from `start` (a share of the body) on; the length is right."""

    def fault(request: Request, ask: Ask) -> Reply:
        body = (reply := ask()).body
        first, last = int(len(body) * start), int(len(body) * (start + 0.5))
        return replace(reply, body=body[:first] + bytes(255 - b for b in body[first:last]) + body[last:])

    return named("corrupted", fault)


def empty_page() -> Fault:
    """A page of a STAC search without items, with the links of the real one."""

    def fault(request: Request, ask: Ask) -> Reply:
        page = json.loads((reply := ask()).body)
        return replace(reply, body=json.dumps(page | {"features": []}).encode())

    return named("empty page", fault)


def repeated_page() -> Fault:
    """The items of the page before once more, with the links of the real one."""
    before: list[list] = [[]]

    def fault(request: Request, ask: Ask) -> Reply:
        page = json.loads((reply := ask()).body)
        again, before[0] = before[0] or page["features"], page["features"]
        return replace(reply, body=json.dumps(page | {"features": again}).encode())

    return named("repeated page", fault)


def path(part: str) -> Predicate:
    """Requests whose path holds `part`."""
    return lambda request: part in request.path


def whole(request: Request) -> bool:
    """Every request."""
    return True


@dataclass
class Rule:
    """A fault, and the requests that it strikes."""

    fault: Fault
    when: Predicate
    times: int | None
    skip: int
    share: float
    seed: int

    def strikes(self, request: Request, nth: int) -> bool:
        """Whether it strikes the nth request for the same bytes: by the seed, in whatever order threads ask."""
        draw = random.Random(f"{self.seed} {request.identity()} {nth}")
        if not self.when(request) or draw.random() >= self.share:
            return False
        self.skip -= 1
        if self.skip >= 0 or self.times == 0:
            return False
        self.times = self.times and self.times - 1
        return True


class Proxy:
    """The proxy, for the length of a `with` block.

    Attributes:
        url: Where it listens; use it in the place of `upstream`.
        requests: Requests by method and path.
        sent: Bytes of the bodies sent to clients.
        faults: Faults injected, by name.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.rstrip("/")
        self.port = 0
        self.requests: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.sent = 0
        self.tokens: dict[str, datetime] | None = None
        self.lifetime = timedelta()
        self._rules: list[Rule] = []
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def sas_url(self) -> str:
        """Token endpoint in the manner of Planetary Computer's: `{sas_url}/{account}/{container}`."""
        return self.url + SAS

    def start(self) -> None:
        """Listens, at the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Ends all connections and refuses new ones, until `start`."""
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    def inject(
        self,
        fault: Fault,
        when: Predicate = whole,
        times: int | None = None,
        skip: int = 0,
        share: float = 1,
        seed: int = 0,
    ) -> None:
        """Adds a fault to a share of the matching requests, after the first `skip`, at most `times` (None: always)."""
        self._rules.append(Rule(fault, when, times, skip, share, seed))

    def heal(self) -> None:
        """Takes all faults away."""
        self._rules.clear()

    def require_tokens(self, seconds: float = 2700) -> None:
        """From now on a read needs a token of `issue` or of `sas_url` in its query, else 403."""
        self.tokens, self.lifetime = {}, timedelta(seconds=seconds)

    def issue(self) -> dict[str, str]:
        """A new token, as the token endpoint gives it."""
        expiry = datetime.now(UTC) + self.lifetime
        written, signature = f"{expiry:%Y-%m-%dT%H:%M:%SZ}", secrets.token_hex(16)
        if self.tokens is not None:
            self.tokens[signature] = expiry
        return {"msft:expiry": written, "token": urlencode({"se": written, "sp": "rl", "sig": signature})}

    def expire_tokens(self) -> None:
        """All tokens issued so far end now, whatever their expiry says."""
        self.tokens = self.tokens and {}

    def answer(self, request: Request, ask: Ask) -> Reply | None:
        """The reply to one request, with the faults that strike it; None drops the connection."""
        with self._lock:
            self.requests[request.method, request.path] += 1
            self._seen[request.identity()] += 1
            striking = [rule.fault for rule in self._rules if rule.strikes(request, self._seen[request.identity()])]
            self.faults.update(fault.__name__ for fault in striking)
        reply = _through(striking, request, lambda: self._origin(request, ask))
        with self._lock:
            self.sent += len(reply.body) if reply else 0
        return reply

    def _origin(self, request: Request, ask: Ask) -> Reply:
        if request.path.startswith(SAS):
            return Reply(200, {"Content-Type": "application/json"}, json.dumps(self.issue()).encode())
        if self.tokens is not None and not self._valid(request.query.get("sig", "")):
            self.faults["token refused"] += 1
            return Reply(403, {}, b"AuthenticationFailed")
        reply = ask()
        if "json" in reply.headers.get("content-type", ""):
            return replace(reply, body=reply.body.replace(self.upstream.encode(), self.url.encode()))
        return reply

    def _valid(self, signature: str) -> bool:
        return (self.tokens or {}).get(signature, datetime.min.replace(tzinfo=UTC)) > datetime.now(UTC)


def _through(faults: list[Fault], request: Request, ask: Ask) -> Reply | None:
    for fault in faults:
        ask = lambda fault=fault, ask=ask: fault(request, ask)  # noqa: E731
    return ask()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, *arguments: object) -> None:
        self.clients: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.clients.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.clients.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends the connections that are open."""
        for client in list(self.clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1
        connection_upstream: HTTPConnection | None = None

        def handle_one_request(self) -> None:
            with suppress(OSError):  # the client went away
                super().handle_one_request()
                return
            self.close_connection = True

        def finish(self) -> None:
            with suppress(OSError):
                super().finish()
            if self.connection_upstream:
                self.connection_upstream.close()

        def handle_expect_100(self) -> bool:
            going_on = super().handle_expect_100()
            self.wfile.flush()
            return going_on

        def log_message(self, *_: object) -> None:
            pass

        def serve(self) -> None:
            parts = urlsplit(self.path)
            request = Request(
                self.command,
                parts.path,
                dict(parse_qsl(parts.query, keep_blank_values=True)),
                {name.lower(): value for name, value in self.headers.items()},
                self.rfile.read(int(self.headers.get("Content-Length", 0))),
            )
            reply = proxy.answer(request, lambda: self.ask(request, parts.query))
            if reply is None:
                self.close_connection = True
            else:
                self.send(reply)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

        def ask(self, request: Request, query: str) -> Reply:
            """The server's own answer, on this client's own connection to it."""
            signed = SIGNATURE & request.query.keys()
            target = request.target() if signed else request.path + (query and "?" + query)
            for _ in range(2):  # the server may have closed an idle connection
                with suppress(OSError, HTTPException):
                    return self.forward(request, target)
                self.connection_upstream = None
            return Reply(502, {}, b"the server behind the proxy does not answer")

        def forward(self, request: Request, target: str) -> Reply:
            if self.connection_upstream is None:
                self.connection_upstream = HTTPConnection(urlsplit(proxy.upstream).netloc, timeout=60)
            line = self.connection_upstream
            line.putrequest(request.method, target, skip_host=True, skip_accept_encoding=True)
            plain = "authorization" not in request.headers  # compressed JSON could not be rewritten
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP and not (plain and name.lower() == "accept-encoding"):
                    line.putheader(name, value)
            line.putheader("Content-Length", str(len(request.body)))
            line.endheaders(request.body)
            got = line.getresponse()
            headers = {name.lower(): value for name, value in got.getheaders()}
            length = int(headers.get("content-length", 0)) if request.method == "HEAD" else None
            return Reply(got.status, headers, got.read(), length)

        def send(self, reply: Reply) -> None:
            """Writes a reply as it is told, and closes the connection after one that lies about its length."""
            length = len(reply.body) if reply.length is None else reply.length
            self.close_connection |= self.command != "HEAD" and length != len(reply.body)
            self.send_response_only(reply.status)
            for name, value in reply.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            if reply.status != 204:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else reply.body)
            self.wfile.flush()

    return Handler
