"""The catalog as a stranger finds it: years, versions and lines by pystac alone, every link there, nothing private."""

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
import s3fs

from infra import clusters, storage
from infra.explorer.bundle import rules
from infra.sandbox import PRODUCTS
from tasks.cards import home_of, name_of, read_card, write_card
from tasks.params import PublishParams, SampleParams
from tasks.products import CheckpointCard, PatchesCard
from tasks.publish import publish_grid
from tasks.release import versions
from tasks.release.stac import write_item
from tests.tasks.release.test_stac import check, schemas
from tests.tasks.test_publish import images, store, store_checkpoint
from tests.test_architecture import ROOT

BASE = {"step": 30.0, "tile_cells": 3, "method": "range+"}
ELSEWHERE = "https://elsewhere.example"
PUBLIC = ("/grids/", "/explorer/")
TERMS = ("https://doi.org/",)  # links that lead out of the storage
TELL = """
import json
relatives = lambda item, rel: [link.get_absolute_href() for link in item.links if link.rel == rel]
told = {
    "order": [item.id for item in versions],
    "years": {item.id: [str(item.common_metadata.start_datetime.year), item.properties["title"]] for item in versions},
    "deprecated": [item.id for item in versions if item.properties.get("deprecated")],
    "lines": {item.id: item.properties["rangegrid:line"] for item in versions},
    "latest": latest.id,
    "of": {item.id: relatives(item, "latest-version") for item in versions},
    "before": {item.id: relatives(item, "predecessor-version") for item in versions},
    "after": {item.id: relatives(item, "successor-version") for item in versions},
    "intervals": [[moment.year for moment in span] for span in catalog.extent.temporal.intervals],
    "types": catalog.summaries.get_list("data_type"),
    "assets": {key: asset.media_type for key, asset in catalog.item_assets.items()},
    "grid": url,
    "publications": latest.properties["sci:publications"],
}
print(json.dumps(told))
"""


class Bucket(http.server.SimpleHTTPRequestHandler):
    """Serves as a bucket does whose grids and explorer everybody may read: all else is forbidden."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Says nothing."""

    def list_directory(self, path):
        self.send_error(403)

    def do_GET(self):
        super().do_GET() if self.path.startswith(PUBLIC) else self.send_error(403)

    do_HEAD = do_GET


def published(client, checkpoint, databases, year, **params):
    return publish_grid(client, checkpoint, databases[year], PublishParams(**BASE, **params))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """The storage, and the names of its grids: of 2021, of 2022, one rolled back, one of another line."""
    folder = tmp_path_factory.mktemp("catalog")
    with pytest.MonkeyPatch.context() as patch, clusters.connect("threads", 2) as client:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        checkpoint = store_checkpoint(folder.as_uri())
        space = read_card(checkpoint, CheckpointCard).fingerprint
        databases = {}
        for year, rows in (("2021", range(100)), ("2022", range(50, 200))):
            made_of = {"datetime": SampleParams(datetime=year).datetime}
            write_card(f"{folder.as_uri()}/patches/{year}", PatchesCard(fingerprint=year, made_of=made_of))
            databases[year] = store(
                folder, f"databases/{year}", images(list(rows)), checkpoint=space, patches=year, shard=200
            )
        publish = partial(published, client, checkpoint, databases)
        grids = {"first": publish("2021")}
        storage.write_json(storage.join(home_of(grids["first"]), "scorecard.json"), {"kind": "scorecard"})
        write_item(home_of(grids["first"]))
        grids |= {"second": publish("2022"), "withdrawn": publish("2022", beta=0.7)}
        versions.rollback()
        grids["other"] = publish("2022", dtype="int8", evidence=True, overviews=1)
        yield folder, {name: name_of(grid) for name, grid in grids.items()}


@contextmanager
def served(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Bucket, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module", params=["server", "sandbox"])
def address(request, catalog):
    """Where the storage is on the web: behind a server, and in the sandbox's bucket under the documented rules."""
    folder, _ = catalog
    if request.param == "server":
        with served(folder) as found:
            yield found
        return
    box = request.getfixturevalue("sandbox")
    with as_documented(box), copied(folder, f"s3://{PRODUCTS}"):
        yield f"{box.endpoint}/{PRODUCTS}"


@contextmanager
def as_documented(box):
    """The bucket's rules as `infra/explorer` has them, whatever other tests made of them."""
    keys = dict(zip(("key", "secret"), box.keys, strict=True))
    client = s3fs.S3FileSystem(**keys, endpoint_url=box.endpoint, skip_instance_cache=True)
    cors, public = rules(PRODUCTS)
    client.call_s3("put_bucket_cors", Bucket=PRODUCTS, CORSConfiguration=cors)
    client.call_s3("put_bucket_policy", Bucket=PRODUCTS, Policy=public)
    yield


@contextmanager
def copied(folder, target):
    """A copy of the storage, which is gone after the block; what other tests left at its places comes back."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    former = {path: storage.read(f"{target}/{path}") for path in paths if storage.exists(f"{target}/{path}")}
    for path in paths:
        storage.write(f"{target}/{path}", (folder / path).read_bytes())
    try:
        yield
    finally:
        for path in paths:
            if path in former:
                storage.write(f"{target}/{path}", former[path])
            else:
                storage.delete(f"{target}/{path}")


def test_a_reader_lists_years_versions_and_lines_by_pystac_alone(catalog, address):
    _, names = catalog
    page = (ROOT / "docs/publication.md").read_text().partition("## The catalog")[2]
    lines = page.partition("```python\n")[2].partition("```")[0].replace("https://host/bucket/prefix", address)
    ran = subprocess.run([sys.executable, "-I", "-c", lines + TELL], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *printed, told = ran.stdout.splitlines()
    assert [line.endswith("rolled back") for line in printed] == [False, False, True, False]
    told = json.loads(told)
    first, second, withdrawn, other = (names[name] for name in ("first", "second", "withdrawn", "other"))
    assert told["order"] == [first, second, withdrawn, other]
    assert {name: year for name, (year, _) in told["years"].items()} == {
        first: "2021",
        second: "2022",
        withdrawn: "2022",
        other: "2022",
    }
    assert told["years"][first][1] == "RANGE embeddings, 30 degree, 2021"
    assert told["deprecated"] == [withdrawn]
    assert told["latest"] == second
    at = {name: [f"{address}/grids/{name}/item.json"] for name in names.values()}
    assert told["of"] == {first: at[second], second: at[second], withdrawn: at[second], other: at[other]}
    assert told["before"] == {first: [], second: at[first], withdrawn: [], other: []}
    assert told["after"] == {first: at[second], second: [], withdrawn: [], other: []}
    assert len({told["lines"][name] for name in (first, second, withdrawn)}) == 1
    assert told["lines"][other] not in (told["lines"][first], "")
    assert told["intervals"] == [[2021, 2022], [2021, 2021], [2022, 2022]]
    assert told["types"] == ["float32", "int8"]
    assert told["assets"]["embeddings"] == "application/vnd.zarr; version=3"
    assert told["assets"]["embeddings-qgis"] == "application/vnd+zarr"
    assert told["grid"] == f"{address}/grids/{second}/grid.zarr"
    assert told["publications"][0]["doi"] == "10.48550/arXiv.2502.19781"


class Named(HTMLParser):
    """What a page leads to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, _, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src")]


def leads_to(url, body, kind):
    """Addresses that a document names."""
    if kind == "html":
        page = Named()
        page.feed(body)
        return [urljoin(url, href) for href in page.found]
    told = json.loads(body)
    if "zarr_format" in told:
        named = [told["attributes"].get("geoemb:model"), *told["attributes"].get("geoemb:source_data", [])]
        return [urljoin(url.removesuffix("zarr.json"), href) for href in named if href]
    named = [*told.get("links", []), *(told.get("assets") or {}).values()] if "stac_version" in told else []
    return [urljoin(url, thing["href"]) for thing in named]


def crawled(web, start):
    """Every document of a storage that a reader comes to from one, by its address; and the addresses elsewhere."""
    found, outside, left = {}, set(), [start]
    while left:
        url = left.pop()
        if url.endswith(".zarr"):
            url += "/zarr.json"
        if not url.startswith(start.split("/grids/")[0]):
            outside.add(url)
        elif url not in found:
            answer = web.get(url)
            assert answer.status_code == 200, f"{url}: {answer.status_code}"
            found[url] = answer.content
            kind = urlsplit(url).path.rsplit(".", 1)[-1]
            left += leads_to(url, answer.text, kind) if kind in ("json", "html") else []
    return found, outside


def test_every_link_is_there_for_everybody_and_nothing_names_the_producers_storage(catalog, address):
    folder, names = catalog
    with httpx.Client() as web:
        found, outside = crawled(web, f"{address}/grids/collection.json")
    assert all(url.startswith(TERMS) for url in outside), outside
    ends = {url.removeprefix(f"{address}/grids/") for url in found}
    for name in names.values():
        wanted = {"item.json", "model.json", "model-card.json", "source.json", "grid.zarr/zarr.json", "world.png"}
        assert {f"{name}/{end}" for end in wanted | {"world.tif", "index.html", "compact.zarr/zarr.json"}} <= ends
    assert f"{names['first']}/scorecard.json" in ends
    assert f"{names['other']}/evidence.png" in ends
    for url, content in found.items():
        for private in (re.escape(str(folder)), "checkpoints/", "s3://[a-z]", "file://"):
            assert not re.search(private.encode(), content), f"{url} tells {private}"


def test_all_of_it_is_valid_and_says_in_words_what_it_is(catalog):
    folder, names = catalog
    validator = schemas()
    paths = [folder / "grids/collection.json"]
    paths += [
        folder / "grids" / name / f"{kind}.json" for name in names.values() for kind in ("item", "model", "source")
    ]
    for path in paths:
        told = json.loads(path.read_text())
        check(told, validator)
        words = told.get("properties", told)
        assert len(words["title"]) > 10
        assert len(words["description"]) > 40
    model = json.loads((folder / "grids" / names["first"] / "model.json").read_text())
    assert model["stac_version"] == "1.1.0"
    del model["properties"]["mlm:architecture"]
    with pytest.raises(Exception, match="mlm:architecture"):
        check(model, validator)


def test_sizes_and_checksums_are_those_of_the_files(catalog):
    folder, names = catalog
    checked = set()
    for name in names.values():
        for key, asset in json.loads((folder / "grids" / name / "item.json").read_text())["assets"].items():
            path = folder / "grids" / name / asset["href"]
            if path.is_dir():
                node = json.loads((path / "zarr.json").read_text())
                assert (asset["zarr:zarr_format"], asset["zarr:node_type"]) == (3, node["node_type"])
                assert asset["zarr:consolidated"] == ("consolidated_metadata" in node)
            else:
                assert asset["file:size"] == path.stat().st_size
                assert asset["file:checksum"] == "1220" + hashlib.sha256(path.read_bytes()).hexdigest()
                checked.add(key)
    assert checked >= {"thumbnail", "colours", "page", "evidence", "model-card", "score-card"}


def test_the_model_is_that_of_the_checkpoint(catalog):
    folder, names = catalog
    stored = json.loads((folder / "checkpoint/card.json").read_text())
    for name in names.values():
        node = json.loads((folder / "grids" / name / "grid.zarr/zarr.json").read_text())
        assert node["attributes"]["geoemb:model"] == "../model.json"
        told = json.loads((folder / "grids" / name / "model.json").read_text())["properties"]
        assert told["mlm:output"][0]["result"]["shape"] == [-1, stored["architecture"]["dim"]]
        assert told["mlm:hyperparameters"]["degree"] == stored["architecture"]["degree"]
        card = json.loads((folder / "grids" / name / "model-card.json").read_text())
        assert card["architecture"] == stored["architecture"]
        assert "made_of" not in card


def test_an_item_made_again_keeps_its_place_among_the_versions(catalog):
    folder, names = catalog
    for name in names.values():
        path = folder / "grids" / name / "item.json"
        before = json.loads(path.read_text())
        write_item(path.parent.as_uri())
        again = json.loads(path.read_text())
        assert {json.dumps(link) for link in again["links"]} == {json.dumps(link) for link in before["links"]}
        assert again["properties"] == before["properties"]


def test_others_pages_read_grids_and_explorer_in_parts_and_nothing_else(sandbox):
    """What everybody may do in the sandbox's bucket, and what nobody."""
    bucket = f"{sandbox.endpoint}/{PRODUCTS}"
    public = {"grids/public/item.json": b'{"some": "item"}', "grids/public/grid.zarr/c/0": bytes(range(100))}
    public |= {"explorer/public.js": b"a page"}
    kinds = ("checkpoints", "databases", "patches", "features", "reports", "ablations", "labels")
    private = {f"{kind}/public/card.json": b"{}" for kind in kinds} | {"grids.json": b"{}", "explorers/x": b"{}"}
    for path, data in (public | private).items():
        storage.write(f"s3://{PRODUCTS}/{path}", data)
    with as_documented(sandbox), httpx.Client(headers={"Origin": ELSEWHERE}) as web:
        for path, data in public.items():
            answer = web.get(f"{bucket}/{path}", headers={"Range": "bytes=2-5"})
            assert (answer.status_code, answer.content) == (206, data[2:6])
            assert answer.headers["Access-Control-Allow-Origin"] in ("*", ELSEWHERE)
            exposed = {name.strip().lower() for name in answer.headers["Access-Control-Expose-Headers"].split(",")}
            assert exposed >= {"content-range", "content-length", "etag", "accept-ranges"}
            asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "range"}
            allowed = web.options(f"{bucket}/{path}", headers=asked)
            assert allowed.status_code == 200
            assert "range" in allowed.headers["Access-Control-Allow-Headers"].lower()
            assert web.put(f"{bucket}/{path}", content=b"mine").status_code == 403
            assert web.delete(f"{bucket}/{path}").status_code == 403
            assert storage.read(f"s3://{PRODUCTS}/{path}") == data
        for path in private:
            assert web.get(f"{bucket}/{path}").status_code == 403, path
        for listing in ("", "?list-type=2&prefix=grids/", "?list-type=2&prefix=checkpoints/"):
            assert web.get(f"{bucket}/{listing}").status_code == 403
    for path in public | private:
        storage.delete(f"s3://{PRODUCTS}/{path}")
