"""A small STAC API on loopback that pages, filters and fails as it is told, over items that are made up."""

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import shapely

from infra.intervals import Interval

CORE = "https://api.stacspec.org/v1.0.0"
PLACE = np.array([[2.0, 44.5]])  # held by every item of `made`


def made(count, collection="s2", year=2021, **more):
    """Items of one place, spread evenly over a year."""
    begin, step = datetime(year, 1, 1, 10, tzinfo=UTC), timedelta(days=360) / max(count, 1)
    return [item(f"{collection}-{n:04d}", begin + n * step, collection, **more) for n in range(count)]


def item(name, when, collection="s2", area=None, **properties):
    told = when if isinstance(when, str | None) else when.isoformat().replace("+00:00", "Z")
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": collection,
        "geometry": shapely.geometry.mapping(area or shapely.box(1.5, 44, 2.5, 45)),
        "properties": {"datetime": told, "eo:cloud_cover": 5.0} | properties,
        "assets": {"B04": {"href": f"https://archive.example/{name}/B04.tif"}},
        "links": [],
    }


class StacServer:
    """The API, for the length of a `with` block.

    Attributes:
        items: What it holds.
        cap: Most items of a page, whatever is asked for.
        asked: Parameters of each search, in order.
        paths: Method and path of each request.
        edit: Changes a page before it is sent; gets it, the parameters, and the number of items that fit in all.
        before: Answers in the place of the search where it returns (status, headers, body).
        posts: Whether next links are for POST.
    """

    def __init__(self, items, *, cap=10_000, edit=None, before=None, posts=True, conforms=()):
        self.items, self.cap, self.posts, self.conforms = items, cap, posts, conforms
        self.edit, self.before = edit or (lambda page, query, count: page), before or (lambda query, method: None)
        self.asked, self.paths = [], []

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def page(self, query):
        """A page as a server should give it: of the window, without a count."""
        window = Interval.parse(query["datetime"]) if query.get("datetime") else Interval(None, None)
        fitting = [i for i in self.items if window.meets(*[Interval.parse(begins(i)).start] * 2)]
        limit, start = min(int(query.get("limit", 10)), self.cap), int(query.get("token", 0))
        page = {"type": "FeatureCollection", "features": fitting[start : start + limit], "links": []}
        if start + limit < len(fitting):
            after = query | {"token": start + limit}
            link = {"rel": "next", "method": "POST", "href": f"{self.url}/search", "body": after}
            href = f"{self.url}/search?{urlencode(after)}"
            page["links"] = [link if self.posts else {"rel": "next", "href": href}]
        return self.edit(page, query, len(fitting))

    def answer(self, method, path, query):
        """Status, headers and body."""
        self.paths.append((method, path))
        if path == "/search":
            self.asked.append(query)
            return self.before(query, method) or (200, {}, self.page(query))
        if path == "/":
            links = [{"rel": rel, "href": self.url} for rel in ("self", "root")]
            links += [{"rel": "search", "href": f"{self.url}/search", "type": "application/geo+json", "method": "POST"}]
            classes = [f"{CORE}/{name}" for name in ("core", "item-search", "collections")] + [*self.conforms]
            return 200, {}, about("Catalog", "small") | {"links": links, "conformsTo": classes}
        if path == "/collections/s2":
            extent = {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}}
            return 200, {}, about("Collection", "s2") | {"license": "other", "extent": extent, "links": []}
        return 404, {}, {"code": "NotFound"}


def about(kind, name):
    return {"type": kind, "stac_version": "1.0.0", "id": name, "description": name}


def begins(feature):
    told = feature["properties"]
    return told.get("datetime") or told["start_datetime"]


def handler(stac):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def serve(self):
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            query = json.loads(body) if self.command == "POST" and body else dict(parse_qsl(parts.query))
            status, headers, content = stac.answer(self.command, parts.path, query)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = serve

    return Handler
