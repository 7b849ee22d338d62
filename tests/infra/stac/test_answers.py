"""Answers that are not what they seem: half ones that look whole, whole ones that look half; links, hosts, duplicates.

Every search is of one place and one year, over items that are known: what comes is compared with all of them.
"""

import json

import numpy as np
import pytest
from urllib3 import Retry

from infra import retries
from infra.errors import CatalogUnavailable, UserError
from infra.stac import api, catalogs
from infra.stac.catalogs import Catalog, search
from tests.infra.stac.stac_server import PLACE, StacServer, item, made

YEAR = "2021-01-01/2021-12-31"


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """What waits between attempts does so briefly."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    retry = {"backoff_factor": 0.001, "backoff_jitter": 0, "status_forcelist": [429, 503], "allowed_methods": None}
    monkeypatch.setattr(api, "RETRY", Retry(total=6, **retry))
    catalogs._rests.clear()


def found(url, window=YEAR, lonlat=PLACE):
    return [i.id for i in search(Catalog(str(url), "s2"), window, lonlat, 100.0)]


def ids(items):
    return sorted(i["id"] for i in items)


def unlinked(page, query, count):
    return page | {"links": []}


def counted(number):
    """Pages that tell a count, of `number` or as the context extension has it."""

    def edit(page, query, count):
        told = number(count, page) if callable(number) else number
        return page | ({"numberMatched": told} if query.get("limit", 0) > 60 else {"context": {"matched": told}})

    return edit


def both(*edits):
    def edit(page, query, count):
        for each in edits:
            page = each(page, query, count)
        return page

    return edit


def left(count, page):
    """What a careless server tells: how many are on this page and the next ones."""
    return len(page["features"])


WHOLE = {
    "no counts, no trouble": (250, {}),
    "GET links": (250, {"posts": False}),
    "a full page without next, 250 items": (250, {"edit": unlinked}),
    "a full page without next, and its own length for a count": (250, {"edit": both(unlinked, counted(left))}),
    "just one full page": (100, {}),
    "just two full pages": (200, {}),
    "a server's cap of 10": (64, {"cap": 10}),
    "a server's cap of 10 without next": (64, {"cap": 10, "edit": unlinked}),
    "a server's cap of 50 without next": (140, {"cap": 50, "edit": unlinked}),
    "ten items": (10, {}),
    "an estimate above the truth": (120, {"edit": counted(131)}),
    "estimates that change from page to page": (
        120,
        {"edit": counted(lambda count, page: 125 + len(page["features"]))},
    ),
    "an estimate below the truth": (250, {"edit": counted(90)}),
    "counts that fall": (250, {"edit": counted(left)}),
    "counts that are null or text": (
        120,
        {"edit": lambda p, q, c: p | {"numberMatched": None, "context": {"matched": "9"}}},
    ),
    "nothing": (0, {}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_answer_is_had(name):
    count, how = WHOLE[name]
    with StacServer(made(count), **how) as server:
        assert found(server.url) == ids(server.items)


def test_a_server_that_ignores_limit_and_time_is_believed_in_the_end():
    """All of its items at once, of which there are as many as some servers' limit."""
    with StacServer(made(20), before=lambda query, method: (200, {}, {"features": server.items})) as server:
        assert found(server.url) == ids(server.items)


def test_a_server_that_gives_no_more_is_told():
    """It knows no time, no count and no next page."""
    with StacServer(made(250)) as server:
        server.before = lambda query, method: (200, {}, {"features": server.items[: int(query["limit"])]})
        with pytest.raises(CatalogUnavailable, match="is full, and the server names no next one"):
            found(server.url)


def test_pages_that_end_too_early_are_told_where_their_count_says_more():
    """The second page is short and the last; its own count agrees, the first one's does not."""

    def cut(page, query, count):
        late = {"features": page["features"][: len(page["features"]) // 2], "links": []} if query.get("token") else {}
        return page | {"numberMatched": 150 if late else 250} | late

    with StacServer(made(250), edit=cut) as server, pytest.raises(CatalogUnavailable, match=r"of 250 items came"):
        found(server.url)


def test_a_window_without_an_end_is_split_too():
    with StacServer(made(250), edit=unlinked) as server:
        assert found(server.url, "2021-01-01/..") == ids(server.items)
        assert found(server.url, "../2021-12-31") == ids(server.items)


# Statuses


@pytest.mark.parametrize("status", [500, 502, 504, 413])
def test_a_page_that_is_too_big_is_asked_for_smaller(status):
    with StacServer(made(150)) as server:
        server.before = lambda q, method: (status, {}, {}) if q["limit"] > 50 and q.get("token") else None
        assert found(server.url) == ids(server.items)
        assert {query["limit"] for query in server.asked} == {100, 50}


def test_a_gateway_that_throttles_by_403_is_waited_for():
    with StacServer(made(150)) as server:
        server.before = lambda query, method: (
            (403, {}, {"message": "Forbidden"}) if len(server.asked) in (1, 3) else None
        )
        assert found(server.url) == ids(server.items)
        assert {query["limit"] for query in server.asked} == {100}, "smaller pages would be more requests"


@pytest.mark.parametrize("header", [{}, {"Retry-After": "0"}, {"Retry-After": "1.5"}, {"Retry-After": "soon"}])
def test_429_is_waited_for(header):
    with StacServer(made(3)) as server:
        server.before = lambda query, method: (429, header, {}) if len(server.asked) < 3 else None
        assert found(server.url) == ids(server.items)


def test_tokens_that_expire_begin_anew_with_the_same_pages():
    with StacServer(made(150)) as server:
        server.before = lambda q, method: (410, {}, {}) if q.get("token") and len(server.asked) < 5 else None
        assert found(server.url) == ids(server.items)
        assert {query["limit"] for query in server.asked} == {100}


@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_who_knows_no_multipoint_is_asked_by_boxes(status):
    """And from then on at once; a place outside the boxes' items is not held by them."""
    near, far = item("near", "2021-06-01T10:00:00Z"), item("far", "2021-06-01T10:00:00Z")
    far["geometry"]["coordinates"] = [[[x + 60, y] for x, y in far["geometry"]["coordinates"][0]]]
    with StacServer([near, far]) as server:
        server.before = lambda query, method: (status, {}, {}) if "intersects" in query else None
        assert found(server.url) == ["near"]
        server.asked.clear()
        assert found(server.url, lonlat=np.array([[2, 44.5], [62, 44.5]])) == ["far", "near"]
        boxes = [query["bbox"] for query in server.asked]
        assert len(boxes) == 2
        assert all(
            west < lon < east and south < 44.5 < north
            for (west, south, east, north), lon in zip(boxes, (2, 62), strict=True)
        )


@pytest.mark.parametrize("status", [404, 405])
def test_who_takes_no_post_is_asked_by_get(status):
    with StacServer(made(150), posts=False) as server:
        server.before = lambda query, method: (status, {}, {}) if method == "POST" else None
        assert found(server.url) == ids(server.items)
        assert server.paths.count(("POST", "/search")) == 1


def test_a_refusal_of_every_form_is_one_sentence():
    with StacServer([], before=lambda query, method: (400, {}, {})) as server:
        with pytest.raises(CatalogUnavailable, match="HTTP status 400"):
            found(server.url)
        assert len(server.asked) == 4


# Links


def linked(**changes):
    def edit(page, query, count):
        return page | {"links": [{"href": "x"}, None, *({**link, **changes} for link in page["links"])]}

    return edit


LINKS = {
    "method null": ({"method": None}, False),
    "method in lower case": ({"method": "post"}, True),
    "body null": ({"body": None}, False),
    "merge null, headers null": ({"merge": None, "headers": None, "title": None}, True),
    "a header": ({"headers": {"X-Page": "next", "X-None": None}}, True),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_as_servers_write_them(name):
    changes, posts = LINKS[name]
    with StacServer(made(150), posts=posts, edit=linked(**changes)) as server:
        assert found(server.url) == ids(server.items)


def test_a_body_that_is_merged_keeps_what_it_leaves_null():
    def edit(page, query, count):
        links = [
            link | {"merge": True, "body": {"token": link["body"]["token"], "datetime": None}} for link in page["links"]
        ]
        return page | {"links": links}

    with StacServer(made(150), edit=edit) as server:
        assert found(server.url, "2021-01-01/2021-11") == ids(
            i for i in server.items if i["properties"]["datetime"] < "2021-12"
        )
        assert len({query["datetime"] for query in server.asked}) == 1


def test_a_next_link_without_address_is_no_end():
    server = StacServer(made(150), edit=linked(href=None, body=None))
    with server, pytest.raises(CatalogUnavailable, match="a next one without address"):
        found(server.url)


@pytest.mark.parametrize("links", [None, {}, "x"])
def test_links_that_are_no_list_are_none(links):
    with StacServer(made(3), edit=lambda page, query, count: page | {"links": links}) as server:
        assert found(server.url) == ids(server.items)


# Hosts


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirected_search_stays_what_it_is(status):
    """As clients follow it, a POST becomes a GET without body: an answer to another question."""
    with StacServer(made(150)) as server, StacServer([]) as gate:
        gate.before = lambda query, method: (status, {"Location": f"{server.url}/search"}, b"")
        assert found(gate.url) == ids(server.items)
        assert {method for method, path in server.paths if path == "/search"} == {"POST"}


def test_who_answers_a_search_elsewhere_is_asked_by_get():
    with StacServer(made(150), posts=False) as server:
        other = 303, {"Location": f"{server.url}/search"}, b""
        server.before = lambda query, method: other if method == "POST" else None
        assert found(server.url) == ids(server.items)


@pytest.mark.parametrize("way", ["redirect", "next", "landing page"])
def test_no_hop_leads_to_a_host_that_is_not_allowed(monkeypatch, way):
    with StacServer(made(150)) as theirs, StacServer(made(150)) as server:
        elsewhere = theirs.url.replace("127.0.0.1", "localhost")
        if way == "redirect":
            server.before = lambda query, method: (307, {"Location": f"{elsewhere}/search"}, b"")
        elif way == "next":
            server.edit = lambda p, q, c: p | {"links": [link | {"href": f"{elsewhere}/search"} for link in p["links"]]}
        else:
            real = server.answer
            server.answer = lambda m, path, q: (302, {"Location": elsewhere}, b"") if path == "/" else real(m, path, q)
        monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["archive.example"]')
        with pytest.raises(UserError, match=r"leads to localhost.*RANGEGRID_ASSET_HOSTS"):
            found(server.url)
        assert theirs.paths == []
        monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["archive.example", "localhost"]')
        assert found(server.url) == ids(server.items)
        assert theirs.paths


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest", "file:///etc/passwd", "http://metadata/", "s3://b/k"]
)
def test_no_catalog_leads_to_a_machines_credentials(target):
    server = StacServer([], before=lambda query, method: (302, {"Location": target}, b""))
    with server, pytest.raises(UserError, match="may not be asked"):
        found(server.url)


# Items


def test_one_id_in_two_collections_hides_nobody():
    """Of a server that does not filter by collection, whatever comes first."""
    ours, theirs = item("a", "2021-06-01T10:00:00Z"), item("a", "2021-06-01T10:00:00Z", "other")
    for items in ([ours, theirs], [theirs, ours]):
        with StacServer(items) as server:
            (only,) = search(Catalog(server.url, "s2"), YEAR, PLACE, 100.0)
            assert only.collection_id == "s2"


def test_of_one_id_twice_the_same_is_taken_in_every_order(tmp_path):
    one, other = item("a", "2021-06-01T10:00:00Z", updated="2021-07-01T00:00:00Z"), item("a", "2021-06-01T10:00:00Z")
    other["assets"]["B04"]["href"] = "https://archive.example/other/B04.tif"
    hrefs = set()
    for number, items in enumerate(([one, other, one], [other, one])):
        (path := tmp_path / f"{number}.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
        with StacServer(items) as server:
            for url in (server.url, str(path)):
                (only,) = search(Catalog(url, "s2"), YEAR, PLACE, 100.0)
                hrefs.add(only.assets["B04"].href)
    assert hrefs == {one["assets"]["B04"]["href"]}


TIMES = {
    "fraction before the end": ({"datetime": "2021-12-31T23:59:59.999Z"}, True),
    "just after": ({"datetime": "2022-01-01T00:00:00.001Z"}, False),
    "lower case": ({"datetime": "2021-06-01t10:00:00.123456789z"}, True),
    "an offset": ({"datetime": "2022-01-01T00:30:00+01:00"}, True),
    "begins at the end": ({"start_datetime": "2021-12-31T23:59:59Z", "end_datetime": "2022-01-02T00:00:00Z"}, True),
    "ends at the beginning": ({"start_datetime": "2020-12-30T00:00:00Z", "end_datetime": "2021-01-01T00:00:00Z"}, True),
    "ends before": ({"start_datetime": "2020-12-30T00:00:00Z", "end_datetime": "2020-12-31T23:59:59.9Z"}, False),
    "around it": ({"start_datetime": "2020-01-01T00:00:00Z", "end_datetime": "2023-01-01T00:00:00Z"}, True),
}


@pytest.mark.parametrize("name", TIMES)
def test_the_edges_of_the_window(tmp_path, name):
    told, held = TIMES[name]
    made_up = item("a", told.get("datetime"), **{k: v for k, v in told.items() if k != "datetime"})
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [made_up]}))
    items = search(Catalog(str(tmp_path / "items.json"), "s2"), YEAR, PLACE, 100.0)
    assert len(items) == held
    assert all(i.properties["datetime"] == begins_as_told(told) for i in items), "the manifest's column"


def begins_as_told(told):
    return told.get("datetime") or told["start_datetime"]


def test_a_wrong_setting_is_told_as_such(tmp_path, monkeypatch):
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": made(3)}))
    monkeypatch.setenv("RANGEGRID_WORKERS", "many")
    with pytest.raises(UserError, match="RANGEGRID_WORKERS"):
        found(tmp_path / "items.json")
