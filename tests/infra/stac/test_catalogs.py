"""Searches of catalogs: files, and a real STAC server over items in an archive's form, with faults put in between."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow.parquet
import pystac
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from stac_geoparquet.arrow import parse_stac_items_to_arrow
from urllib3 import Retry

from infra import retries, storage
from infra.addresses import may_read
from infra.errors import CatalogUnavailable, UserError
from infra.sandbox import servers
from infra.stac import api, catalogs
from infra.stac.catalogs import Catalog, ask, collection_title, search
from infra.stac.items import footprint
from tests.infra.stac.stac_server import item as stac_item
from tests.proxy import (
    Proxy,
    corrupted,
    dropped,
    empty_page,
    named,
    path,
    repeated_page,
    status,
    truncated,
    wrong_length,
)

PC = "sentinel-2-l2a"
COLORADO = np.array([[-105.1, 40.1], [-105.3, 40.5], [-106.5, 39.2], [-108.2, 37.3]])
YEAR = "2024-01-01/2024-12-31"


@pytest.fixture(scope="module")
def served():
    """Items of 2024 around Colorado, made up: so many that those of four places fill two pages."""
    rng, begin = np.random.default_rng(0), datetime(2024, 1, 1, tzinfo=UTC)
    corners = rng.uniform((-109.5, 36.5), (-103, 40.5), (800, 2))
    corners[0] = COLORADO[0] - 0.5
    days, clouds = rng.uniform(0, 366, 800), rng.uniform(0, 100, 800).round(2)
    return [
        stac_item(
            f"scene-{n}",
            begin + timedelta(days=day),
            PC,
            shapely.box(west, south, west + 1.2, south + 1),
            **{"eo:cloud_cover": cloud},
        )
        for n, ((west, south), day, cloud) in enumerate(zip(corners, days, clouds.tolist(), strict=True))
    ]


@pytest.fixture(scope="module")
def collection_file(served, tmp_path_factory):
    path = tmp_path_factory.mktemp("stac") / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": served}))
    return path


@pytest.fixture(scope="module")
def server(collection_file):
    """A real STAC API over them."""
    with serving(collection_of(PC), collection_file) as url:
        yield url


def collection_of(name):
    extent = pystac.Extent(pystac.SpatialExtent([[-180, -90, 180, 90]]), pystac.TemporalExtent([[None, None]]))
    return pystac.Collection(name, name, extent).to_dict()


@contextmanager
def serving(collection, items):
    """rustac over an item-collection file."""
    about = items.with_name("collection.json")
    about.write_text(json.dumps(collection | {"links": []}))
    (port,) = servers.free_ports(1)
    url, log = f"http://127.0.0.1:{port}", items.parent / "logs" / "stac.log"
    process = servers.start(servers.stac_command(port, [about, items]), log, {}, bound=True)
    try:
        servers.wait("STAC", lambda: servers.answers(url), process, log)
        yield url
    finally:
        servers.stop(process)


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy before the server; what waits between attempts does so briefly."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    brief = {"backoff_factor": 0.001, "backoff_jitter": 0, "status_forcelist": [429, 503], "allowed_methods": None}
    monkeypatch.setattr(api, "RETRY", Retry(total=6, **brief))
    catalogs._rests.clear()
    with Proxy(server) as between:
        yield between


def expected(items, interval=YEAR, lonlat=COLORADO, cloud=100.0):
    """By brute force from the raw items."""
    start, end = (interval.split("/") * 2)[:2]
    points = shapely.points(lonlat)
    return sorted(
        i["id"]
        for i in items
        if start <= i["properties"]["datetime"][:10] <= end + "~"
        and i["properties"]["eo:cloud_cover"] <= cloud
        and shapely.intersects(shapely.geometry.shape(i["geometry"]), points).any()
    )


def ids(url, lonlat=COLORADO, cloud=100.0, interval=YEAR):
    return [item.id for item in search(Catalog(str(url), PC), interval, lonlat, cloud)]


@pytest.mark.parametrize("cloud", [100.0, 20.0])
@pytest.mark.parametrize("interval", [YEAR, "2024-08-28/2024-09-15", "2024-12"])
def test_an_api_and_a_file_answer_alike(server, collection_file, served, cloud, interval):
    wanted = expected(served, interval, COLORADO, cloud)
    assert wanted
    assert ids(server, cloud=cloud, interval=interval) == wanted
    assert ids(collection_file, cloud=cloud, interval=interval) == wanted
    assert ids(collection_file.as_uri(), cloud=cloud, interval=interval) == wanted


def test_an_archives_items_are_found_by_an_api_and_in_files(colorado, tmp_path):
    """As JSON and as stac-geoparquet."""
    wanted = expected(colorado)
    assert wanted
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": colorado}))
    pyarrow.parquet.write_table(parse_stac_items_to_arrow(colorado).read_all(), tmp_path / "items.parquet")
    assert ids(tmp_path / "items.json") == ids(tmp_path / "items.parquet") == wanted
    with serving(collection_of(PC), tmp_path / "items.json") as url:
        assert ids(url) == wanted


def test_recorded_stac_geoparquet_as_it_comes(fixtures_dir, recorded_items):
    file = fixtures_dir / "stac_items/rustac/1000-sentinel-2-items.parquet"
    held = set(pyarrow.parquet.read_table(file, columns=["id"])["id"].to_pylist())
    wanted = expected(
        [i for i in {i["id"]: i for i in recorded_items["Planetary Computer"]}.values() if i["id"] in held]
    )
    assert ids(file) == wanted
    assert len(wanted) > 50


def test_a_file_on_s3_that_changes_is_read_anew(sandbox, served):
    url = "s3://rangegrid/catalog/items.json"
    for items in (served[:300], served[300:]):
        storage.write(url, json.dumps({"type": "FeatureCollection", "features": items}).encode())
        assert ids(url) == expected(items)


def test_thousands_of_points_are_asked_in_bounded_requests(proxy, served):
    sizes = []

    def measure(request, ask):
        sizes.append(len(json.loads(request.body)["intersects"]["coordinates"]))
        return ask()

    proxy.inject(named("measure", measure), when=path("/search"))
    lonlat = np.random.default_rng(0).uniform((-109, 37), (-102, 41), (1000, 2))
    assert ids(proxy.url, lonlat, interval="2024-08-01/2024-08-07") == expected(served, "2024-08-01/2024-08-07", lonlat)
    assert max(sizes) == catalogs.POINTS


# Faults


def edited(name, edit):
    """A fault that changes the JSON of the server's answer."""

    def fault(request, ask):
        reply = ask()
        return replace(reply, body=json.dumps(edit(json.loads(reply.body))).encode())

    return named(name, fault)


def bigger_than(limit):
    return lambda request: request.path == "/search" and json.loads(request.body)["limit"] > limit


def html(request, ask):
    return replace(ask(), body=b"<html>a captive portal</html>")


def without_links(page):
    return page | {"links": []}


def lost(page):
    return page | {
        "features": page["features"][10:],
        "numberReturned": len(page["features"]) - 10,
        "numberMatched": 300,
    }


def circular(page):
    """The next page is this one."""
    links = [{**link, "body": link["body"] | {"skip": 0}} if link["rel"] == "next" else link for link in page["links"]]
    return page | {"links": links}


MENDED = {
    "rate limit": (status(429, {"Retry-After": "1"}), {"times": 1}),
    "502 on big pages": (status(502), {"when": bigger_than(25)}),
    "504 on big pages": (status(504), {"when": bigger_than(50)}),
    "500": (status(500), {"times": 2}),
    "503": (status(503), {"times": 3, "skip": 1}),
    "dropped": (dropped(), {"times": 2, "skip": 1}),
    "truncated": (truncated(), {"times": 1, "skip": 1}),
    "wrong length": (wrong_length(), {"times": 1}),
    "corrupted": (corrupted(), {"times": 1}),
    "HTML": (named("html", html), {"times": 2}),
    "empty page": (empty_page(), {"times": 1, "skip": 1}),
    "empty page twice": (empty_page(), {"times": 2, "skip": 1}),
    "empty first page": (empty_page(), {"times": 1}),
    "repeated page": (repeated_page(), {"times": 2}),
    "lost items": (edited("lost", lost), {"times": 1}),
    "circle": (edited("circle", circular), {"times": 2}),
    "next page is gone": (status(404), {"times": 1, "skip": 1}),
    "a list": (edited("list", lambda page: page["features"]), {"times": 1}),
}


@pytest.mark.parametrize("name", MENDED)
def test_a_search_survives(proxy, served, name):
    fault, rule = MENDED[name]
    collection_title(Catalog(proxy.url, PC))
    proxy.inject(fault, **{"when": path("/search")} | rule)
    assert ids(proxy.url) == expected(served)
    assert proxy.faults[fault.__name__] == rule.get("times", proxy.faults[fault.__name__]) > 0


REFUSED = {
    "unauthorised": (status(401), {}, "HTTP status 401"),
    "forbidden": (status(403), {}, "HTTP status 403"),
    "502 for ever": (status(502), {}, "HTTP status 502"),
    "503 for ever": (status(503), {}, "RetryError"),
    "nobody there": (dropped(), {}, "ConnectionError"),
    "HTML for ever": (named("html", html), {}, "JSONDecodeError"),
    "repeated for ever": (edited("circle", circular), {}, "of more items came"),
    "items lost for ever": (edited("lost", lost), {"times": None}, "of 300 items came"),
    "the next page is gone": (status(404), {"when": lambda r: b"skip" in r.body}, "the next page answers 404"),
    "too few on a page": (edited("few", lambda p: p | {"features": p["features"][1:]}), {}, "of its 100 items"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_answer_is_one_sentence(proxy, name):
    fault, rule, reason = REFUSED[name]
    collection_title(Catalog(proxy.url, PC))
    proxy.inject(fault, **{"when": path("/search")} | rule)
    with pytest.raises(CatalogUnavailable, match="no STAC API answers at http") as caught:
        ids(proxy.url)
    assert reason in str(caught.value) or name == "too few on a page"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"[]", b"3", b'{"type": "Catalog"}', b'{"conformsTo": 4, "links": [{}]}']
)
def test_a_strange_landing_page_is_one_sentence(proxy, content):
    proxy.inject(named("strange", lambda request, ask: replace(ask(), body=content)))
    with pytest.raises(UserError, match=r"no STAC API answers|cannot be searched"):
        collection_title(Catalog(proxy.url, PC))


def test_an_unknown_collection_lists_the_known(proxy, collection_file):
    for url in (proxy.url, str(collection_file)):
        with pytest.raises(UserError, match=f"set RANGEGRID_COLLECTION to one of {PC}") as caught:
            collection_title(Catalog(url, "sentinel-3"))
        assert not isinstance(caught.value, CatalogUnavailable)


def test_a_filter_that_the_server_cannot_answer_is_not_an_empty_answer(proxy, served):
    """rustac answers CQL2 with nothing; here it is made to claim that it knows it."""
    claims = [f"http://www.opengis.net/spec/cql2/1.0/conf/{part}" for part in ("cql2-json", "basic-cql2")]
    claims += ["https://api.stacspec.org/v1.0.0/item-search#filter"]
    landing = edited("claim", lambda page: page | {"conformsTo": page["conformsTo"] + claims})
    proxy.inject(landing, when=lambda request: request.path == "/")
    filters = []

    def note(request, ask):
        filters.append("filter" in json.loads(request.body))
        return ask()

    proxy.inject(named("note", note), when=path("/search"))
    assert ids(proxy.url, cloud=30.0) == expected(served, cloud=30.0)
    assert {True, False} == set(filters)
    proxy.inject(status(400), when=lambda request: b"cql2" in request.body)
    assert ids(proxy.url, cloud=30.0) == expected(served, cloud=30.0)


def test_an_api_that_takes_no_post_is_asked_by_get(proxy):
    def only_get(page):
        return page | {"links": [link for link in page["links"] if link.get("method") != "POST"]}

    proxy.inject(edited("get", only_get), when=lambda request: request.path == "/")
    proxy.inject(status(418), when=path("/search"))
    with pytest.raises(CatalogUnavailable, match="418"):
        ids(proxy.url)
    assert proxy.requests["GET", "/search"] == 1
    assert proxy.requests["POST", "/search"] == 0


@pytest.mark.parametrize("where", ["server", "file"])
def test_broken_items_are_passed_over_and_counted(proxy, served, tmp_path, caplog, where):
    broken = [
        {"geometry": None},
        {"geometry": {"type": "Polygon", "coordinates": [[[0, 0]]]}},
        {"geometry": {"type": "Circle"}},
        {"properties": {"datetime": None}},
        {"properties": {"datetime": None, "start_datetime": None, "end_datetime": None}},
        {"properties": None},
        {"assets": {}},
        {"assets": None},
    ]

    def spoil(page):
        spoiled = [page["features"][0] | change | {"id": f"broken {n}"} for n, change in enumerate(broken)]
        return page | {"features": [*spoiled, *page["features"], 7, {"id": "no item"}]}

    if where == "server":
        collection_title(Catalog(proxy.url, PC))
        proxy.inject(edited("spoiled", spoil), when=path("/search"), times=1)
        url = proxy.url
    else:
        url = tmp_path / "items.json"
        url.write_text(json.dumps(spoil({"type": "FeatureCollection", "features": served})))
    assert ids(url) == expected(served)
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(told) == 1
    assert "passed over 10 items" in told[0]


# A second provider


@pytest.fixture
def two(proxy, collection_file, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STAC_URL", proxy.url)
    monkeypatch.setenv("RANGEGRID_COLLECTION", PC)
    monkeypatch.setenv("RANGEGRID_FALLBACK_STAC_URL", str(collection_file))
    return proxy


def answer(catalog):
    return search(catalog, YEAR, COLORADO, 100.0)


def test_the_second_provider_is_asked_only_where_the_first_refuses(two, collection_file, caplog):
    assert {item.extra_fields["catalog"] for item in ask(answer)} == {two.url}
    two.inject(status(403), when=path("/search"))
    found = ask(answer)
    assert {item.extra_fields["catalog"] for item in found} == {str(collection_file)}
    assert f"{collection_file} stands in" in caplog.text
    asked = two.requests["POST", "/search"]
    assert [item.id for item in ask(answer)] == [item.id for item in found]
    assert two.requests["POST", "/search"] == asked, "a catalog that refused rests for a while"


def test_a_mistake_is_no_reason_to_ask_the_second(two, monkeypatch):
    monkeypatch.setenv("RANGEGRID_COLLECTION", "sentinel-3")
    with pytest.raises(UserError, match="has no collection 'sentinel-3'"):
        ask(answer)


def test_both_refuse(two, monkeypatch, tmp_path):
    monkeypatch.setenv("RANGEGRID_FALLBACK_STAC_URL", str(tmp_path / "nothing.parquet"))
    two.inject(status(403))
    with pytest.raises(CatalogUnavailable, match=r"no catalog can be read at .*nothing\.parquet"):
        ask(answer)


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", b"{"), ("a.json", b"[1]"), ("a.json", b'{"features": 3}'), ("a.parquet", b"PAR1"), ("a.tif", b"x")],
)
def test_what_is_no_catalog_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is no catalog"):
        ids(tmp_path / name)


def test_a_table_of_something_else_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="is no catalog"):
        ids(tmp_path / "a.parquet")


def test_hrefs_of_a_local_catalog_are_beside_it(tmp_path):
    assets = {
        "B04": {"href": "./scene 1/B04.tif"},
        "B03": {"href": "s3://bucket/B03.tif"},
        "B02": {"href": "/a/B02.tif"},
    }
    write(tmp_path / "items.json", assets)
    (item,) = search(Catalog(str(tmp_path / "items.json"), "c"), "2021", np.zeros((1, 2)), 100)
    assert item.assets["B04"].href.startswith(tmp_path.as_uri() + "/scene")
    assert item.assets["B03"].href == "s3://bucket/B03.tif"
    assert item.assets["B02"].href == "file:///a/B02.tif"


def test_a_catalog_from_elsewhere_reaches_no_file_here(sandbox, caplog):
    url = "s3://rangegrid/catalog/elsewhere.json"
    assets = {
        "B04": {"href": "B04.tif"},
        "B03": {"href": "file:///etc/passwd"},
        "B02": {"href": "http://169.254.169.254/x"},
        "B08": {"href": "../../../../etc/passwd"},
        "../../B05": {"href": "file:../../../../etc/passwd"},
    }
    storage.write(url, json.dumps({"type": "FeatureCollection", "features": [item_of(assets)]}).encode())
    (item,) = search(Catalog(url, "c"), "2021", np.zeros((1, 2)), 100)
    hrefs = {key: asset.href for key, asset in item.assets.items()}
    assert hrefs == {"B04": "s3://rangegrid/catalog/B04.tif", "B08": "s3://rangegrid/etc/passwd"}  # in its own bucket
    assert "3 assets at refused addresses" in caplog.text


def item_of(assets, name="a", area=None):
    geometry = shapely.geometry.mapping(area or shapely.box(-1, -1, 1, 1))
    item = pystac.Item(name, geometry, [-1, -1, 1, 1], datetime(2021, 6, 1), {}, collection="c")
    return item.to_dict(transform_hrefs=False) | {"assets": assets}


def write(path, assets):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [item_of(assets)]}))


@pytest.mark.parametrize(
    ("href", "anywhere", "local"),
    [
        ("https://sentinel-cogs.s3.us-west-2.amazonaws.com/B04.tif", True, True),
        ("http://127.0.0.1:9000/bucket/B04.tif", True, True),
        ("http://[::1]:9000/B04.tif", True, True),
        ("s3://bucket/B04.tif", True, True),
        ("file:///data/B04.tif", False, True),
        ("file://host/data/B04.tif", False, False),
        ("file:///vsicurl/http://169.254.169.254/", False, False),
        ("/data/B04.tif", False, False),
        ("/vsicurl/http://169.254.169.254/", False, False),
        ("ftp://host/B04.tif", False, False),
        ("gs://bucket/B04.tif", False, False),
        ("javascript:alert(1)", False, False),
        ("s3:///B04.tif", False, False),
        ("http:///B04.tif", False, False),
        ("http://169.254.169.254/latest/meta-data", False, False),
        ("https://user@169.254.169.254:80/", False, False),
        ("http://0xA9FEA9FE/", False, False),
        ("http://2852039166/", False, False),
        ("http://169.254.43518/", False, False),
        ("http://169.254.169.254./", False, False),
        ("http://[fe80::1%25eth0]/", False, False),
        ("http://[::ffff:169.254.169.254]/", False, False),
        ("http://[fd00:ec2::254]/", False, False),
        ("http://metadata.google.internal/", False, False),
        ("http://METADATA.google.internal/", False, False),
        ("http://good\\@169.254.169.254/", False, False),
        ("http://169.254.169.254\\@good/", False, False),
        ("http://good\n.example/", False, False),
        ("http://[bad", False, False),
        ("", False, False),
    ],
)
def test_where_an_item_may_send_us(href, anywhere, local):
    assert may_read(href, local=False) == anywhere
    assert may_read(href, local=True) == local


# The antimeridian

lons, lats = st.floats(-180, 179.99), st.floats(-80, 80)


@given(st.floats(150, 179.9), st.floats(0.2, 60), lats, st.floats(0.1, 5), st.lists(st.tuples(lons, lats), max_size=20))
def test_a_footprint_holds_places_on_both_sides_of_180(west, width, south, height, points):
    """Against arithmetic modulo 360, however the box is written."""
    east, north = west + width, south + height
    points += [(west + width * t, south + height * t) for t in (0.01, 0.37, 0.99)]
    if east > 180:
        points += [(179.99, south + 0.05), (-179.99, south + 0.05)]
    lon, lat = np.array(points).T
    lon = (lon + 180) % 360 - 180
    inside = ((lon - west) % 360 < width) & (south < lat) & (lat < north)
    clear = np.minimum(np.abs((lon - west + 180) % 360 - 180), np.abs((lon - east + 180) % 360 - 180)) > 1e-6
    for written in ways(west, south, east, north):
        shape = footprint(written)
        assert -180 <= shape.bounds[0] <= shape.bounds[2] <= 180
        held = shapely.intersects_xy(shape, lon, lat)
        sure = clear & (np.abs(lat - south) > 1e-6) & (np.abs(lat - north) > 1e-6)
        np.testing.assert_array_equal(held[sure], inside[sure])


def ways(west, south, east, north):
    """Split at 180, beyond 180 on either side, and as one ring that spans the globe."""
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    yield {"type": "Polygon", "coordinates": [ring]}
    yield {"type": "Polygon", "coordinates": [[[x - 360, y] for x, y in ring]]}
    if east > 180:
        yield {"type": "Polygon", "coordinates": [[[x - 360 if x > 180 else x, y] for x, y in ring]]}
        halves = shapely.box(west, south, 180, north), shapely.box(-180, south, east - 360, north)
        yield shapely.geometry.mapping(shapely.MultiPolygon(halves))


@pytest.mark.parametrize("kind", ["server", "file"])
def test_items_across_180_are_found_from_both_sides(tmp_path, kind):
    """However their footprint is written; not by a place on the other side of the Earth, where it lies in the plane."""
    unsplit = shapely.Polygon([(179, -17), (-179.5, -17), (-179.5, -16), (179, -16)])
    split = shapely.MultiPolygon([shapely.box(179, -17, 180, -16), shapely.box(-180, -17, -179.5, -16)])
    items = [item_of({"B04": {"href": "s3://b/B04.tif"}}, *made) for made in (("split", split), ("unsplit", unsplit))]
    file = tmp_path / "items.json"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    collection = pystac.Collection("c", "c", pystac.Extent.from_items([pystac.Item.from_dict(i) for i in items]))
    with serving(collection.to_dict(), file) if kind == "server" else nullcontext(str(file)) as url:
        for lon, found in [(179.5, 2), (-179.7, 2), (178.9, 0), (-179.4, 0), (0.0, 0)]:
            assert len(search(Catalog(url, "c"), "2021", np.array([[lon, -16.5]]), 100)) == found, lon


@pytest.mark.parametrize(
    ("href", "allowed"),
    [
        ("https://archive.s3.us-west-2.amazonaws.com/B04.tif", True),
        ("https://ARCHIVE.s3.us-west-2.amazonaws.com/B04.tif", True),
        ("s3://ours/B04.tif", True),
        ("s3://theirs/B04.tif", False),
        ("https://amazonaws.com.evil.example/B04.tif", False),
        ("https://archive.s3.us-west-2.amazonaws.com@evil.example/B04.tif", False),
        ("file:///data/B04.tif", True),
    ],
)
def test_a_list_of_hosts_is_all_that_may_be_read(href, allowed):
    assert may_read(href, local=True, hosts=("*.amazonaws.com", "ours")) == allowed


def test_the_settings_tell_the_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["ours"]')
    write(tmp_path / "items.json", {"B04": {"href": "s3://ours/a.tif"}, "B03": {"href": "https://other.example/a.tif"}})
    (item,) = search(Catalog(str(tmp_path / "items.json"), "c"), "2021", np.zeros((1, 2)), 100)
    assert list(item.assets) == ["B04"]
