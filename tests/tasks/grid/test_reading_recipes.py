"""docs/reading.md and a grid's page, run as they stand by a process that cannot import rangegrid.

What they find is compared with the stored numbers, read by zarr alone, at cells that pyproj and the box tell.
"""

import html
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import s3fs
import shapely
import zarr
from pyproj import Transformer

from infra import clusters, storage
from tasks.core.earth.land import is_land
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.database.store import open_database
from tasks.grid.store import open_vectors
from tasks.model.checkpoint import load_checkpoint
from tasks.params import PublishParams
from tasks.points.sample_grid import sample_grid
from tasks.publish import publish_grid
from tests.core.test_retrieval import close
from tests.tasks.test_publish import VALUES, images, store, store_checkpoint
from tests.test_architecture import ROOT

ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tasks", "flows", "infra"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
DRIVER = """
import json, os, sys, traceback, warnings
warnings.simplefilter("ignore")
for folder in json.loads(sys.argv[1]):
    os.chdir(folder)
    try:
        exec(compile(open("recipes.py").read(), "recipes.py", "exec"), {})
    except Exception:
        open("error.txt", "w").write(traceback.format_exc())
"""
KEPT = "nearest bilinear mean similarity regions trusted visual features score leading whole first"
PLACES = {  # what may be read of each: a point, and a country
    "globe": ({"step": 3.0, "tile_cells": 60}, (2.35, 48.86), "France"),
    "box": (
        {"step": 2.0, "west": -24, "south": 34, "east": 44, "north": 72, "tile_cells": 20},
        (2.35, 48.86),
        "France",
    ),
    "across 180": (
        {"step": 2.0, "west": 150, "south": 50, "east": 210, "north": 76, "tile_cells": 20},
        (-155, 66),
        None,
    ),
    "Europe": (
        {"crs": "EPSG:3035", "step": 125e3, "west": 2.5e6, "south": 1.4e6, "east": 7.5e6, "north": 5.4e6}
        | {"tile_cells": 20},
        (2.35, 48.86),
        "France",
    ),
}
DTYPES = ("float32", "float16", "int8")
CASES = [(name, dtype, (i + j) % 2) for i, name in enumerate(PLACES) for j, dtype in enumerate(DTYPES)]
FURTHER = {("box", "float32"), ("across 180", "int8"), ("Europe", "float32")}  # the others are whole and compact


@dataclass(frozen=True)
class Case:
    """A grid, and the folder in which the recipes read it."""

    name: str
    dtype: str
    compact: bool
    folder: Path
    url: str

    @property
    def params(self):
        """Box, step and CRS, in full."""
        globe = {"crs": "EPSG:4326", "west": -180, "south": -90, "east": 180, "north": 90}
        return globe | PLACES[self.name][0]

    @property
    def point(self):
        """The point of the recipes."""
        return PLACES[self.name][1]

    @cached_property
    def whole(self):
        """(embedding, y, x) in float64: the stored numbers, and how CF scales them."""
        group = zarr.open_group(self.url.removeprefix("file://"), mode="r")
        if "embedding" in group:
            return group["embedding"][:].astype(np.float64)
        parts = [group[name] for name in ("visual", "location")]
        scales = [(part.attrs["scale_factor"], part.attrs["add_offset"]) for part in parts]
        codes = [np.where(part[:] == -128, np.nan, part[:].astype(np.float64)) for part in parts]
        return np.concatenate([code * by + offset for code, (by, offset) in zip(codes, scales, strict=True)])

    @cached_property
    def found(self):
        """What the recipes found."""
        assert not (self.folder / "error.txt").exists(), (self.folder / "error.txt").read_text()
        return dict(np.load(self.folder / "found.npz"))

    def fractions(self, lon, lat):
        """Rows and columns as numbers, 0 at the northern and western edge, and which are in the box."""
        p = self.params
        across, up = Transformer.from_crs("EPSG:4326", p["crs"], always_xy=True).transform(lon, lat)
        if p["crs"] == "EPSG:4326":
            across = np.where(across < p["west"], across + 360, across)
        row, column = (p["north"] - up) / p["step"], (across - p["west"]) / p["step"]
        rows, columns = self.whole.shape[1:]
        return row, column, (row > 0) & (row < rows) & (column > 0) & (column < columns)

    def at(self, lon, lat):
        """The stored vectors of places, (n, embedding); NaN outside."""
        row, column, inside = self.fractions(np.asarray(lon, float), np.asarray(lat, float))
        vectors = np.full((len(row), len(self.whole)), np.nan)
        vectors[inside] = self.whole[:, row[inside].astype(int), column[inside].astype(int)].T
        return vectors

    def centres(self):
        """Longitude and latitude of every cell."""
        p, (rows, columns) = self.params, self.whole.shape[1:]
        across, up = (
            p["west"] + p["step"] * (np.arange(columns) + 0.5),
            p["north"] - p["step"] * (np.arange(rows) + 0.5),
        )
        lon, lat = Transformer.from_crs(p["crs"], "EPSG:4326", always_xy=True).transform(*np.meshgrid(across, up))
        return (lon + 180) % 360 - 180, lat


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The storage, a checkpoint and a database."""
    folder = tmp_path_factory.mktemp("reading")
    checkpoint = store_checkpoint(folder.as_uri(), hidden=64)
    arrays = images(np.arange(300))
    arrays["values"] += 3 * np.abs(arrays["locations"][:, 1:]) / 90  # something to find in the values
    return folder, checkpoint, store(folder, "database", arrays)


@pytest.fixture(scope="module")
def cases(request, world, tmp_path_factory):
    """Every kind of grid that is asked for, read by every recipe, all in one process, which spares imports."""
    folder, checkpoint, database = world
    ours = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked, made = {item.callspec.params.get("case") for item in ours} | {CASES[0]}, {}
    with pytest.MonkeyPatch.context() as patch, clusters.connect("threads", 2) as client:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        for name, dtype, compact in filter(asked.__contains__, CASES):
            options = {"dtype": dtype, "evidence": True, "keep_sums": True} | method_of(name, compact)
            grid = publish_grid(client, checkpoint, database, PublishParams(**PLACES[name][0], **options))
            here = tmp_path_factory.mktemp("reader")
            made[name, dtype] = prepared(Case(name, dtype, bool(compact), here, grid))
    folders = json.dumps([str(case.folder) for case in made.values()])
    command = [sys.executable, "-I", "-c", ALONE + DRIVER, folders]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return made


def method_of(name, compact):
    """RANGE+ of whole values, or compact, or in some places heads side by side."""
    if not compact:
        return {"method": "range+"}
    if name in ("box", "Europe"):
        return {"method": "multi-head", "heads": ("semantic:12", "geodesic:500"), "compact_dims": 5}
    return {"method": "range+", "compact_dims": 5}


def prepared(case):
    """The case with what the recipes read in its folder."""
    (case.folder / "demo").symlink_to(case.url.removeprefix("file://").removesuffix("/grid.zarr"))
    (case.folder / "france.geojson").write_text(shapely.to_geojson(country(case)))
    lon, lat = labelled(case).T
    rows = [f"{a},{b},{b + 5 * np.sin(a / 20)}" for a, b in zip(lon, lat, strict=True)]
    (case.folder / "labels.csv").write_text("\n".join(["lon,lat,label", *rows]))
    keep = ", ".join(f"{name}={name}" for name in KEPT.split()) + (", restored=restored" if case.compact else "")
    code = re.sub(r"lon, lat = .*", f"lon, lat = {case.point}", "\n".join(blocks()[0]))
    if (case.name, case.dtype, case.compact) == ("globe", "float32", False):  # as the demo's, of which README tells
        code, keep = f"{code}\n{block('README.md')}", f"{keep}, model=model.coef_, alpha=model.alpha_"
    (case.folder / "recipes.py").write_text(f"{code}\nnp.savez('found.npz', {keep})\n")
    return case


def block(page):
    """The first Python of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)[0]


def blocks():
    """The page's code: that on a grid, and that on how to come to it without keys."""
    page = (ROOT / "docs/reading.md").read_text()
    parts = [re.findall(r"```python\n(.*?)```", part, re.S) for part in page.split("## Without keys")]
    assert list(map(len, parts)) == [14, 3]
    return parts


def country(case):
    """A country of the grid."""
    if not PLACES[case.name][2]:
        return shapely.box(-170, 60, -155, 70)
    names = "tests/fixtures/naturalearth_lowres/naturalearth_lowres.shp"
    package = next(iter(__import__("pyogrio").__path__))
    countries = gpd.read_file(f"{package}/{names}").set_index("name")
    return max(countries.geometry[PLACES[case.name][2]].geoms, key=lambda part: part.centroid.y)


def labelled(case):
    """Places with a label, of which some are outside of the grid."""
    rng = np.random.default_rng(3)
    p = case.params
    plane = rng.uniform((p["west"], p["south"]), (p["east"], p["north"]), (900, 2))
    inside = np.column_stack(Transformer.from_crs(p["crs"], "EPSG:4326", always_xy=True).transform(*plane.T))
    inside[:, 0] = (inside[:, 0] + 180) % 360 - 180
    return np.concatenate([inside, rng.uniform((-180, -80), (180, 80), (100, 2))])


def marked(case):
    """The case as a parameter, further or not."""
    marks = pytest.mark.further if case[:2] in FURTHER else ()
    return pytest.param(case, marks=marks, id=f"{case[0]} {case[1]}{' compact' * case[2]}")


@pytest.fixture(params=map(marked, CASES))
def case(request, cases):
    return cases[request.param[:2]]


def test_one_point(case):
    np.testing.assert_allclose(
        case.found["nearest"], case.at([case.point[0]], [case.point[1]])[0], rtol=1e-5, atol=1e-5
    )
    row, column, _ = case.fractions(*np.array([case.point]).T)
    total, weight = np.zeros(len(case.whole)), 0.0
    for i in range(case.whole.shape[1]):  # every cell of the grid: those a cell away or more weigh nothing
        for j in range(case.whole.shape[2]):
            share = max(0, 1 - abs(row[0] - i - 0.5)) * max(0, 1 - abs(column[0] - j - 0.5))
            if share and np.isfinite(case.whole[0, i, j]):
                total, weight = total + share * case.whole[:, i, j], weight + share
    assert weight > 0.2
    np.testing.assert_allclose(case.found["bilinear"], total / weight, rtol=1e-5, atol=1e-5)


def test_the_first_page_predicts_from_the_demo(cases):
    """The coefficients solve ridge regression's equations on the stored vectors of the labels' places."""
    case = cases["globe", "float32"]
    lon, lat, label = np.loadtxt(case.folder / "labels.csv", delimiter=",", skiprows=1).T
    vectors = case.at(lon, lat)
    land = np.isfinite(vectors).all(1)
    x, y = (part - part.mean(0) for part in (vectors[land], label[land]))
    wanted = np.linalg.solve(x.T @ x + case.found["alpha"] * np.eye(x.shape[1]), x.T @ y)
    np.testing.assert_allclose(case.found["model"], wanted, rtol=1e-3, atol=1e-4)


def test_a_table_of_points(case):
    """No point of another place is given a vector, and none outside of the grid."""
    assert case.found
    table = pq.read_table(case.folder / "points.parquet")
    lon, lat = (table[name].to_numpy() for name in ("lon", "lat"))
    embedding = np.stack(table["embedding"].combine_chunks().to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(embedding, case.at(lon, lat), rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(0)
    every = rng.uniform(-180, 180, 100_000), np.degrees(np.arcsin(rng.uniform(-0.8, 1, 100_000)))
    inside = case.fractions(*every)[2]
    assert set(table["point"].to_pylist()) == set(np.flatnonzero(inside))
    assert np.isfinite(embedding[:, 0]).sum() > 50


def test_a_country(case):
    """By the area of the cells: EPSG:3035 has cells of one area."""
    lon, lat = case.centres()
    shape = country(case)
    inside = np.array(
        [[shape.contains(shapely.Point(*p)) for p in zip(*row, strict=True)] for row in zip(lon, lat, strict=True)]
    )
    inside &= np.isfinite(case.whole[0])
    assert inside.sum() > 5
    area = np.ones(lat.shape) if case.name == "Europe" else np.cos(np.radians(lat))
    expected = case.whole[:, inside] @ area[inside] / area[inside].sum()
    np.testing.assert_allclose(case.found["mean"], expected, rtol=1e-4, atol=1e-5)


def test_rasters_lie_where_the_cells_do(case):
    p = case.params
    assert case.found
    with rasterio.open(case.folder / "layers.tif") as raster:
        assert raster.crs == rasterio.CRS.from_user_input(p["crs"])
        np.testing.assert_allclose(raster.bounds, [p[edge] for edge in ("west", "south", "east", "north")])
        np.testing.assert_allclose(raster.read(), case.whole[:3], rtol=1e-5, atol=1e-5)
    with rasterio.open(case.folder / "equal-area.tif") as raster:
        warped, crs = raster.read(), raster.crs.to_wkt()
        rows, columns = np.nonzero(np.isfinite(warped[0]))
        centres = np.array(raster.transform * (columns + 0.5, rows + 0.5))
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(*centres)
    expected = case.at(lon, lat)[:, :3]
    assert len(rows) > 50
    same = np.isclose(warped[:, rows, columns].T, expected, rtol=1e-5, atol=1e-5).all(1)
    assert same.mean() > 0.95  # GDAL's transform is approximate, by an eighth of a pixel


def test_similarity_and_regions(case):
    found, known = case.found, np.isfinite(case.whole[0])
    data = case.whole[:, known].T
    centred, place = data - data.mean(0), case.at([case.point[0]], [case.point[1]])[0] - data.mean(0)
    expected = centred @ place / np.linalg.norm(centred, axis=1) / np.linalg.norm(place)
    np.testing.assert_allclose(found["similarity"][known], expected, atol=1e-3)
    assert np.isnan(found["similarity"][~known]).all()
    assert set(found["regions"][~known]) == {-1}
    assert set(found["regions"][known]) == set(range(8))
    scaled, regions = (data - data.mean(0)) / data.std(0), found["regions"][known]
    within = sum(((scaled[regions == k] - scaled[regions == k].mean(0)) ** 2).sum() for k in range(8))
    assert within < 0.8 * (scaled**2).sum()


def test_a_probe_learns_from_the_grid(case):
    expected = case.at(*labelled(case).T)
    known = np.isfinite(expected[:, 0])
    np.testing.assert_allclose(case.found["features"], expected[known], rtol=1e-5, atol=1e-5)
    assert case.found["score"] > 0.5 or case.name != "globe"


def test_evidence_tells_where_to_trust(case):
    group = zarr.open_group(case.url.removeprefix("file://"), mode="r")
    np.testing.assert_array_equal(case.found["trusted"], group["distance_km"][:] < 500)


def test_the_compact_product_nearly_gives_the_vector_back(case):
    """To half a code of each component, and what of the vectors more components would tell; GDAL reads the same."""
    group = zarr.open_group(case.url.replace("grid.zarr", "compact.zarr").removeprefix("file://"), zarr_format=3)
    scale, axes, mean = (group[name][:].astype(np.float64) for name in ("scale", "axes", "mean"))
    exact = case.at([case.point[0]], [case.point[1]])[0]
    assert (np.abs(case.found["leading"] - (exact - mean) @ axes) < 0.502 * scale).all()
    np.testing.assert_allclose(
        (case.found["whole"] - mean) @ axes, case.found["leading"], atol=1e-3 * np.abs(scale).max()
    )
    codes = group["embedding"][:3].astype(np.float64)
    expected = np.where(codes == -128, np.nan, codes * scale[:3, None, None])
    np.testing.assert_allclose(case.found["first"], expected, rtol=1e-6)


def test_a_compact_grid_gives_its_values_back(case):
    if not case.compact:
        pytest.skip("whole values")
    group = zarr.open_group(case.url.removeprefix("file://"), mode="r")
    stored = case.at([case.point[0]], [case.point[1]])[0][:5]
    projected = (case.found["restored"] - group["mean"][:].astype(np.float64)) @ group["components"][:]
    np.testing.assert_allclose(projected, stored, rtol=1e-3, atol=1e-4)
    assert ("deviation" in group) == (case.name in ("box", "Europe"))


def test_another_beta(case, world):
    if case.compact:
        pytest.skip("sums of components")
    _, checkpoint, database = world
    data = open_database(database)
    index = RetrievalIndex(data.keys, data.values, data.locations)
    row, column, _ = case.fractions(*np.array([case.point]).T)
    lon, lat = (axis[int(row[0]), int(column[0])] for axis in case.centres())
    expected = embed(load_checkpoint(checkpoint).location, index, np.array([[lon, lat]]), Method("range+", 0.2))
    close(case.found["visual"], expected[0, :VALUES], 1e-4)


def test_the_page_reads_the_grid_from_where_it_lies(cases, tmp_path):
    """The lines of every page, from the folder of the page, at its own place and at places outside of the grid."""
    program = [ALONE, "import json, os, warnings", "warnings.simplefilter('ignore')", "found = {}"]
    for (name, dtype), case in cases.items():
        home = case.url.removeprefix("file://").removesuffix("/grid.zarr")
        page = Path(home, "index.html").read_text()
        code = html.unescape(page.split("<pre>")[1].split("</pre>")[0])
        told = json.loads(Path(home, "item.json").read_text())["assets"]["embeddings"]
        opened = re.search(r"xarray\.(open_zarr\(.*)\)", told["title"])[1].replace("URL", repr(told["href"]))
        assert home not in code, "a copied bucket's page would open the publisher's"
        away = code.replace(re.search(r"lon, lat = (.*)", code)[1], "-40.5, -41.3")
        read = "[float(v) for n in ('embedding', 'visual', 'location') if n in vectors for v in vectors[n].values]"
        program += [f"os.chdir({home!r})", code, f"found[{name + dtype!r}] = [lon, lat], {read}"]
        program += [f"assert xr.{opened}).identical(grid)", "try:"]
        program += [f"    {line}" for line in away.splitlines()]
        program += ["except KeyError:", "    pass", "else:", f"    assert {name!r} == 'globe'"]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join([*program, "print(json.dumps(found))"])], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for key, case in cases.items():
        (lon, lat), vector = json.loads(ran.stdout)["".join(key)]
        np.testing.assert_allclose(vector, case.at([lon], [lat])[0], rtol=1e-5, atol=1e-5)


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves files and ranges of them to anybody; what is not there is forbidden, as in a bucket without listing."""

    protocol_version = "HTTP/1.1"
    denied: list[str]

    def log_message(self, *_):
        """Says nothing."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            self.server.denied.append(self.path)
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, asked = Path(path).read_bytes(), self.headers.get("Range")
        start, stop = (asked or "bytes=0-").removeprefix("bytes=").split("-")
        first = int(start) if start else max(0, len(data) - int(stop))
        last = min(int(stop), len(data) - 1) if start and stop else len(data) - 1
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])


@pytest.fixture
def guarded(world):
    """URL of a server of the storage that answers 403 for what is not there, and what it denied."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Guarded(*arguments, directory=str(world[0]))
    )
    server.denied = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", server.denied
    server.shutdown()
    server.server_close()


READ_WHOLE = """
for each in (public, found, quick):
    for name, variable in each.variables.items():
        variable.values
    assert each.embedding.isnull().any() and each.embedding.notnull().any()
"""
WITHOUT_KEYS = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")


@pytest.fixture(scope="module")
def sparse(world):
    """A grid with tiles of sea alone, in every layer, in its levels and in the sums beside it."""
    folder, checkpoint, database = world
    with pytest.MonkeyPatch.context() as patch, clusters.connect("threads", 2) as client:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        box = {"west": -140, "south": -60, "east": -60, "north": 0}
        params = PublishParams(step=2, tile_cells=5, **box, evidence=True, keep_sums=True, line="sparse")
        return publish_grid(client, checkpoint, database, params)


def test_nothing_is_asked_for_that_is_not_there(sparse, guarded):
    """Plain xarray by fsspec and by obstore, of a server that answers 403 for what is not there, in a process alone."""
    url, denied = guarded
    program = "\n".join(
        [*blocks()[1][:2], READ_WHOLE, "xr.open_zarr(f\"{grids}/{item['id']}/sums.zarr\", zarr_format=3).load()"]
    )
    program = program.replace("https://host/bucket/prefix/grids", f"{url}/grids").replace(
        "latest.json", "latest.sparse.json"
    )
    program = program.replace("from_url(", "from_url(client_options={'allow_http': True}, url=")
    code = f"{ALONE}\nimport xarray as xr\n{program}"
    ran = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert denied == []
    stored = zarr.open_group(sparse.removeprefix("file://"), mode="r")["embedding"]
    shards = [path for path in Path(sparse.removeprefix("file://"), "embedding/c/0").rglob("*") if path.is_file()]
    empty = 16 * int(np.prod([a // b for a, b in zip(stored.shards, stored.chunks, strict=True)])) + 4
    sizes = [path.stat().st_size for path in shards]
    tiles = np.isfinite(stored[0]).reshape(6, 5, 8, 5).any(axis=(1, 3))
    assert len(sizes) == tiles.size
    assert sizes.count(empty) == (~tiles).sum() > 10
    assert min(sizes) == empty


def test_a_bucket_that_anybody_may_read_needs_no_keys(sparse, sandbox, monkeypatch):
    """On a real S3 server, which refuses the same request of the bucket beside it."""
    policy = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject"], "Resource": ["arn:aws:s3:::open/*"]}
    owner = s3fs.S3FileSystem(endpoint_url=sandbox.endpoint, skip_instance_cache=True)
    for bucket in ("open", "shut"):
        owner.mkdir(bucket)
    owner.call_s3(
        "put_bucket_policy", Bucket="open", Policy=json.dumps({"Version": "2012-10-17", "Statement": [policy]})
    )
    grids = Path(sparse.removeprefix("file://")).parents[1]
    for bucket in ("open", "shut"):
        storage.copy(
            Path(sparse.removeprefix("file://")).parent.as_uri(),
            f"s3://{bucket}/prefix/grids/{Path(sparse).parent.name}",
        )
        storage.copy((grids / "latest.sparse.json").as_uri(), f"s3://{bucket}/prefix/grids/latest.json")
    for bucket, status in (("open", 0), ("shut", 1)):
        code = (
            blocks()[1][2]
            .replace("https://s3.example.org", sandbox.endpoint)
            .replace("s3://bucket/", f"s3://{bucket}/")
        )
        program = f"import json, fsspec, xarray as xr\n{code}\nassert keyless.embedding.notnull().any()"
        ran = subprocess.run(
            [sys.executable, "-I", "-c", ALONE + program], capture_output=True, text=True, env=os.environ | WITHOUT_KEYS
        )
        assert ran.returncode == status, ran.stderr[-3000:]
    program = block("docs/publication.md").replace("s3://bucket/", "s3://shut/")
    with_keys = os.environ | {"AWS_ENDPOINT_URL": sandbox.endpoint}
    subprocess.run(
        [sys.executable, "-I", "-c", f"{program}\nassert grid.embedding.notnull().any()"], env=with_keys, check=True
    )


@pytest.fixture
def globe(cases):
    return cases["globe", "float32"]


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_sample_grid_is_the_recipe(case, method):
    """At the places of the probe, and all around the globe."""
    places = labelled(case)
    found = sample_grid(case.url, places, method)
    nearest = case.at(*places.T)
    if method == "nearest":
        np.testing.assert_allclose(found, nearest, rtol=1e-5, atol=1e-5)
    else:
        assert np.isnan(found[~case.fractions(*places.T)[2]]).all()


def test_each_chunk_is_read_once(globe, monkeypatch):
    reads = []
    real = type(open_vectors(globe.url)).__getitem__
    monkeypatch.setattr(
        "tasks.grid.store.Vectors.__getitem__", lambda self, index: (reads.append(index), real(self, index))[1]
    )
    lonlat = np.random.default_rng(0).uniform([-180, -90], [180, 90], (5000, 2))
    sample_grid(globe.url, lonlat[is_land(lonlat)])
    assert len({json.dumps([str(part) for part in index]) for index in reads}) == len(reads) <= 5 * 9
