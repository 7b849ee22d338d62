"""Dumps of many items are read in parts: what a search finds is what a search of the whole file finds."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from stac_geoparquet.arrow import parse_stac_items_to_arrow

from infra.errors import CatalogUnavailable, UserError
from infra.stac import dumps
from infra.stac import files as stac_files
from infra.stac.catalogs import Catalog, collection_title, search
from tests.infra.stac.stac_server import StacServer, item

GROUP = 50  # rows of a row group
SPANNING = shapely.Polygon([(179, 10), (-179, 10), (-179, 11), (179, 11)])  # unsplit, across 180 degrees


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    monkeypatch.setattr(stac_files, "WHOLE", 1)


def world(count=1000):
    """Items of a degree each, spread over the Earth and two years, ordered by longitude; some across 180 degrees."""
    rng = np.random.default_rng(0)
    corners = np.column_stack([np.sort(rng.uniform(-180, 179, count)), rng.uniform(-60, 60, count)])
    months = rng.integers(0, 24, count)
    areas = [shapely.box(lon, lat, lon + 1, lat + 1) for lon, lat in corners]
    areas[-3:] = [SPANNING, shapely.box(179.5, 10, 180.5, 11), shapely.box(-180.5, 10, -179.5, 11)]
    return [
        item(f"i{n:04d}", f"{2021 + month // 12}-{month % 12 + 1:02d}-05T10:00:00Z", area=area)
        | {"bbox": list(shapely.bounds(area))}
        for n, (area, month) in enumerate(zip(areas, months, strict=True))
    ]


ITEMS = world()


def stored(path, items, drop=(), **options):
    """Writes stac-geoparquet without some columns."""
    table = parse_stac_items_to_arrow(items).read_all()
    pq.write_table(table.drop_columns([*drop]), path, row_group_size=GROUP, **options)


def held(lonlat, first, last):
    """Ids of the items that hold any of some points, by shapely alone."""
    turned = [lonlat + np.array([turn, 0]) for turn in (-360, 0, 360)]
    found = set()
    for one in ITEMS:
        shape = shapely.geometry.shape(one["geometry"])
        if shape.equals(SPANNING):
            shape = shapely.box(179, 10, 181, 11)
        inside = any(shapely.intersects_xy(shape, *points.T).any() for points in turned)
        if inside and first <= one["properties"]["datetime"][:10] <= last:
            found.add(one["id"])
    return found


POINTS = {
    "one": np.array([[20.3, 4.1]]),
    "many": np.random.default_rng(1).uniform([-180, -60], [180, 60], (200, 2)),
    "beside 180": np.array([[179.8, 10.5], [-179.8, 10.5]]),
}
FORMS = {
    "as it comes": {},
    "without type and collection": {"drop": ("type", "collection")},
    "without boxes": {"drop": ("bbox",)},
    "without statistics": {"write_statistics": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_search_finds_what_is_there(tmp_path, form):
    stored(tmp_path / "dump.parquet", ITEMS, **FORMS[form])
    catalog = Catalog(str(tmp_path / "dump.parquet"), "s2")
    assert collection_title(catalog) == ""
    for lonlat in POINTS.values():
        found = search(catalog, "2021-03-01/2022-02-28", lonlat, 60.0)
        assert {one.id for one in found} == held(lonlat, "2021-03-01", "2022-02-28")
        assert all(one.assets["B04"].href.endswith("B04.tif") for one in found)


def test_a_collection_that_is_not_there_is_told(tmp_path):
    stored(tmp_path / "dump.parquet", ITEMS[:120])
    with pytest.raises(UserError, match=r"no items of 'other'.* one of s2"):
        collection_title(Catalog(str(tmp_path / "dump.parquet"), "other"))


def test_row_groups_are_passed_over_by_place_and_by_time(tmp_path, monkeypatch):
    """Twenty groups by longitude; then in order of time."""
    read = []
    brief = dumps.Dump.brief
    monkeypatch.setattr(dumps.Dump, "brief", lambda dump, group: read.append(group) or brief(dump, group))
    stored(tmp_path / "place.parquet", ITEMS)
    search(Catalog(str(tmp_path / "place.parquet"), "s2"), "2021/2022", POINTS["one"], 60.0)
    by_place = sorted(read)
    wests = np.array([one["bbox"][0] for one in ITEMS]).reshape(-1, GROUP)
    near = (wests.min(1) <= 20.3) & (wests.max(1) + 1 >= 20.3)
    assert set(np.flatnonzero(near)) <= set(by_place)
    assert len(by_place) <= near.sum() + 1  # and the last one, which has boxes across 180 degrees
    read.clear()
    stored(tmp_path / "time.parquet", sorted(ITEMS, key=lambda one: one["properties"]["datetime"]))
    search(Catalog(str(tmp_path / "time.parquet"), "s2"), "2021-06", POINTS["many"], 60.0)
    times = sorted(one["properties"]["datetime"][:7] for one in ITEMS)
    assert sorted(read) == [i for i in range(20) if "2021-06" in times[i * GROUP : (i + 1) * GROUP]]


class RangeServer(StacServer):
    """Serves one file, and parts of it."""

    def __init__(self, data, parts=True):
        super().__init__([])
        self.data, self.parts = data, parts
        self.ranges = []

    def part(self, text):
        first, last = map(int, text.removeprefix("bytes=").split("-"))
        self.ranges.append(last - first + 1)
        return self.data[first : last + 1]


def serve(handler):
    """Answers of a handler of the server: a part where one is asked for."""

    def answer(self):
        server = handler.server_of
        text = self.headers.get("Range")
        data = server.part(text) if text and server.parts else server.data
        self.send_response(206 if text and server.parts else 200)
        self.send_header("ETag", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    return answer


@pytest.fixture
def served(tmp_path):
    """Serves the dump over HTTP."""
    open_servers = []

    def start(parts=True):
        stored(tmp_path / "dump.parquet", ITEMS)
        server = RangeServer((tmp_path / "dump.parquet").read_bytes(), parts).__enter__()
        handler = server.server.RequestHandlerClass
        handler.server_of = server
        handler.do_GET = handler.do_HEAD = serve(handler)
        open_servers.append(server)
        return server, Catalog(f"{server.url}/dump.parquet?sig=secret", "s2")

    yield start
    for server in open_servers:
        server.__exit__()


def test_a_dump_of_the_web_is_read_in_parts(served):
    server, catalog = served()
    found = search(catalog, "2021/2022", POINTS["one"], 60.0)
    assert {one.id for one in found} == held(POINTS["one"], "2021", "2023")
    assert 0 < sum(server.ranges) < len(server.data) / 2


def test_a_server_of_whole_files_alone_is_told(served):
    _, catalog = served(parts=False)
    with pytest.raises((UserError, CatalogUnavailable), match="serves no parts of files: download") as caught:
        search(catalog, "2021/2022", POINTS["one"], 60.0)
    assert "secret" not in str(caught.value)
