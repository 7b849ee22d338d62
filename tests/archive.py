"""A small archive of Sentinel-2-like scenes on disk, their items, and a server of both that can misbehave.

A band's pixel holds 1000 + the column of its left edge in 10 m pixels: bands that register hold the same columns.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import rasterio
from pyproj import Transformer
from rasterio.transform import from_origin

from tasks.core.sentinel2.items import NAMES

BANDS = ("B02", "B05", "B01")
PIXEL = {"B01": 60, "B05": 20, "SCL": 20}
SIDE, LEFT, TOP = 10_800, 399_960.0, 5_000_040.0
CLEAR, CLOUD = 4, 9


def columns(band):
    size = PIXEL.get(band, 10)
    side = SIDE // size
    return np.broadcast_to((1000 + np.arange(side) * (size // 10)).astype(np.uint16), (side, side)).copy()


def write(path, data, size, epsg=32631, left=LEFT, top=TOP, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "dtype": data.dtype, "count": 1, "height": data.shape[0], "width": data.shape[1]}
    profile |= {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate", "nodata": 0}
    grid = from_origin(left, top, size, size)
    with rasterio.open(path, "w", crs=f"EPSG:{epsg}", transform=grid, **profile | options) as target:
        target.write(data, 1)
    return str(path)


def scene(folder, values=columns, classes=CLEAR, bands=BANDS, **options):
    """Writes a scene; hrefs by band."""
    side = SIDE // 20
    classes = np.broadcast_to(np.asarray(classes, np.uint8), (side, side)).copy()
    made = {band: write(folder / f"{band}.tif", values(band), PIXEL.get(band, 10), **options) for band in bands}
    return made | {"SCL": write(folder / "SCL.tif", classes, 20)}


def item(name, hrefs, day="2021-06-15", cloud=5.0, geometry=None, tile="31TCJ", made="20240101T000000"):
    taken = day.replace("-", "") + "T105621"
    raster = {"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": "s2",
        "geometry": geometry or outline(),
        "properties": {
            "datetime": f"{day}T10:56:21Z",
            "platform": "sentinel-2a",
            "eo:cloud_cover": cloud,
            "grid:code": f"MGRS-{tile}",
            "s2:processing_baseline": "05.10",
            "s2:product_uri": f"S2A_MSIL2A_{taken}_N0510_R094_T{tile}_{made}.SAFE",
        },
        "assets": {NAMES[band]: {"href": href} | (raster if band != "SCL" else {}) for band, href in hrefs.items()},
        "links": [],
    }


def outline(side=SIDE):
    to = Transformer.from_crs(32631, 4326, always_xy=True)
    lon, lat = to.transform([LEFT, LEFT + side, LEFT + side, LEFT, LEFT], [TOP, TOP, TOP - side, TOP - side, TOP])
    return {"type": "Polygon", "coordinates": [list(zip(lon, lat, strict=True))]}


def points(rows_columns):
    """(n, 2) longitude and latitude of (row, column) in 10 m pixels."""
    at = np.asarray(rows_columns, float)
    to = Transformer.from_crs(32631, 4326, always_xy=True)
    return np.column_stack(to.transform(LEFT + at[:, 1] * 10, TOP - at[:, 0] * 10))


def catalog(folder, items):
    """Writes an item collection, and returns its path."""
    (folder / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return str(folder / "items.json")


def listed(folder, rows_columns):
    """Writes a list of places, and returns its path."""
    lon, lat = points(rows_columns).T
    pd.DataFrame({"lon": lon, "lat": lat}).to_csv(folder / "places.csv", index=False)
    return str(folder / "places.csv")


class Server:
    """Files on loopback by ranges; `answer(path)` may give a status and headers instead. `asked` and `sent` came."""

    def __init__(self, root, answer=lambda path: None):
        self.root, self.answer, self.asked, self.sent = Path(root), answer, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.asked.append(self.path)
                outer.sent.append(f"{self.path} {dict(self.headers)}")
                status, headers, body = outer.reply(self)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, request):
        if (found := self.answer(request.path)) is not None:
            status, headers = found
            return status, headers, b""
        path = self.root / unquote(urlsplit(request.path).path).lstrip("/")
        if not path.is_file():
            return 404, {}, b""
        data = path.read_bytes()
        first, last = (int(text) for text in request.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        return 206, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}, part


@contextmanager
def served(root, answer=lambda path: None):
    """A server while it is needed."""
    server = Server(root, answer)
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
