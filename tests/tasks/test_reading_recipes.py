"""docs/reading.md, run as it stands by a process that cannot import rangegrid, against numpy on the whole grid."""

import json
import re
import subprocess
import sys

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely

from infra import clusters
from tasks.checkpoint import load_checkpoint
from tasks.core.land import is_land
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.database import open_database
from tasks.grid_sampling import sample_grid
from tasks.grids import open_vectors
from tasks.labels import demo_labels
from tasks.params import PublishParams
from tasks.publish import publish_grid
from tests.core.test_retrieval import close
from tests.tasks.test_publish import VALUES, images, store, store_checkpoint
from tests.test_architecture import ROOT

STEP = 2.0
ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tasks", "flows", "infra"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
KEPT = "nearest anywhere bilinear mean similarity regions score trusted visual"
PARAMS = {"float32": {"keep_sums": True}, "int8": {"dtype": "int8"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint and a database, and what publishes them."""
    folder = tmp_path_factory.mktemp("reading")
    checkpoint = store_checkpoint(folder.as_uri(), hidden=64)
    arrays = images(np.arange(300))
    arrays["values"] += 3 * np.abs(arrays["locations"][:, 1:]) / 90  # something to find in the values
    return folder, checkpoint, store(folder, "database", arrays)


@pytest.fixture(scope="module", params=PARAMS)
def read(request, world, tmp_path_factory):
    """The directory in which the recipes were run, and what they found."""
    folder, checkpoint, database = world
    with pytest.MonkeyPatch.context() as patch, clusters.connect("threads", 2) as client:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        params = PublishParams(step=STEP, tile_cells=60, evidence=True, **PARAMS[request.param])
        grid = publish_grid(client, checkpoint, database, params)
    here = tmp_path_factory.mktemp("reader")
    (here / "demo").symlink_to(grid.removeprefix("file://").removesuffix("/grid.zarr"))
    (here / "france.geojson").write_text(shapely.to_geojson(france()))
    labels = next(each for each in demo_labels(1500, 0) if each.name == "temperature")
    rows = [f"{lon},{lat},{label}" for (lon, lat), label in zip(labels.lonlat, labels.labels, strict=True)]
    (here / "labels.csv").write_text("\n".join(["lon,lat,label", *rows]))
    (here / "recipes.py").write_text(program(request.param))
    ran = subprocess.run([sys.executable, "-I", "recipes.py"], cwd=here, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return here, dict(np.load(here / "found.npz")), grid


def france():
    names = "tests/fixtures/naturalearth_lowres/naturalearth_lowres.shp"
    package = next(iter(__import__("pyogrio").__path__))
    countries = gpd.read_file(f"{package}/{names}").set_index("name")
    return max(countries.geometry["France"].geoms, key=lambda part: part.centroid.y)


def program(dtype):
    """The page's code, and what it found; kept sums are those of the float grid."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reading.md").read_text(), re.S)
    assert len(blocks) == 11
    blocks, kept = (blocks, KEPT) if dtype == "float32" else (blocks[:-1], KEPT.removesuffix(" visual"))
    keep = ", ".join(f"{name}={name}" for name in kept.split())
    return ALONE + "\n".join(blocks) + f"\nnp.savez('found.npz', {keep})\n"


@pytest.fixture
def whole(read):
    return open_vectors(read[2])[:]


def cell(lon, lat):
    return int((90 - lat) / STEP), int((lon + 180) / STEP)


def test_one_point(read, whole):
    found = read[1]
    row, column = cell(2.35, 48.86)
    for name in ("nearest", "anywhere"):
        np.testing.assert_allclose(found[name], whole[:, row, column], atol=1e-6)
    across, down = (2.35 + 180) / STEP - 0.5, (90 - 48.86) / STEP - 0.5
    left, top = int(across), int(down)
    corners = whole[:, top : top + 2, left : left + 2]
    x, y = across - left, down - top
    expected = np.einsum("dyx,y,x->d", corners, [1 - y, y], [1 - x, x])
    np.testing.assert_allclose(found["bilinear"], expected, rtol=1e-5, atol=1e-6)


def test_a_table_of_points(read, whole):
    table = pq.read_table(read[0] / "points.parquet")
    assert len(set(table["point"].to_pylist())) == 100_000
    embedding = np.stack(table["embedding"].combine_chunks().to_numpy(zero_copy_only=False))
    rows, columns = np.array([cell(*p) for p in zip(table["lon"].to_numpy(), table["lat"].to_numpy(), strict=True)]).T
    np.testing.assert_allclose(embedding, whole[:, rows, columns].T, atol=1e-6)


def test_a_country(read, whole):
    total, weight, country = 0, 0, france()
    for row, lat in enumerate(90 - STEP * (np.arange(90) + 0.5)):
        for column, lon in enumerate(-180 + STEP * (np.arange(180) + 0.5)):
            if np.isfinite(whole[0, row, column]) and country.contains(shapely.Point(lon, lat)):
                total = total + whole[:, row, column] * np.cos(np.radians(lat))
                weight += np.cos(np.radians(lat))
    np.testing.assert_allclose(read[1]["mean"], total / weight, rtol=1e-5)


def test_similarity_and_regions(read, whole):
    found, known = read[1], np.isfinite(whole[0])
    data = whole[:, known].T.astype(np.float64)
    centred = data - data.mean(0)
    place = centred[np.flatnonzero(np.flatnonzero(known) == np.ravel_multi_index(cell(2.35, 48.86), known.shape))[0]]
    expected = centred @ place / np.linalg.norm(centred, axis=1) / np.linalg.norm(place)
    np.testing.assert_allclose(found["similarity"][known], expected, atol=1e-4)
    assert np.isnan(found["similarity"][~known]).all()
    assert np.nanmax(found["similarity"]) == pytest.approx(1, abs=1e-4)
    assert set(found["regions"][~known]) == {-1}
    assert set(found["regions"][known]) == set(range(8))
    scaled, regions = (data - data.mean(0)) / data.std(0), found["regions"][known]
    within = sum(((scaled[regions == k] - scaled[regions == k].mean(0)) ** 2).sum() for k in range(8))
    assert within < 0.8 * (scaled**2).sum()


def test_a_probe_learns_from_the_grid(read):
    assert read[1]["score"] > 0.5


def test_evidence_tells_where_to_trust(read, whole):
    known, trusted = np.isfinite(whole[0]), read[1]["trusted"]
    assert 0 < trusted.sum() < known.sum()
    assert not (trusted & ~known).any()


@pytest.mark.parametrize("read", ["float32"], indirect=True)  # beside which sums were kept
def test_another_beta(read, world):
    _, checkpoint, database = world
    data = open_database(database)
    index = RetrievalIndex(data.keys, data.values, data.locations)
    row, column = cell(2.35, 48.86)
    place = np.array([[-180 + STEP * (column + 0.5), 90 - STEP * (row + 0.5)]])
    expected = embed(load_checkpoint(checkpoint).location, index, place, Method("range+", 0.2))[0, :VALUES]
    close(read[1]["visual"], expected, 1e-5)


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_sample_grid_is_numpy_on_the_whole_grid(read, whole, method):
    """Poles and both sides of 180 degrees included."""
    rng = np.random.default_rng(1)
    lonlat = np.column_stack([rng.uniform(-200, 380, 500), rng.uniform(-90, 90, 500)])
    lonlat = np.concatenate([lonlat, [[180, 70], [-180, 70], [179.9, -85], [10, 90], [10, -90]]])
    found = sample_grid(read[2], lonlat, method)
    column, row = (lonlat[:, 0] + 180) / STEP - 0.5, np.clip((90 - lonlat[:, 1]) / STEP - 0.5, 0, 89)
    expected = np.zeros_like(found)
    if method == "nearest":
        expected = whole[:, np.rint(row).astype(int), np.rint(column).astype(int) % 180].T
    else:
        for dy in (0, 1):
            for dx in (0, 1):
                r, c = np.floor(row).astype(int) + dy, np.floor(column).astype(int) + dx
                weight = (1 - np.abs(row - r)) * (1 - np.abs(column - c))
                values = whole[:, np.minimum(r, 89), c % 180].T
                expected += np.where(weight[:, None] > 0, weight[:, None] * values, 0)
    assert 50 < np.isfinite(found[:, 0]).sum() < 450
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_each_chunk_is_read_once(read, monkeypatch):
    reads = []
    real = type(open_vectors(read[2])).__getitem__
    monkeypatch.setattr(
        "tasks.grids.Vectors.__getitem__", lambda self, index: (reads.append(index), real(self, index))[1]
    )
    lonlat = np.random.default_rng(0).uniform([-180, -90], [180, 90], (5000, 2))
    sample_grid(read[2], lonlat[is_land(lonlat)])
    assert len({json.dumps([str(part) for part in index]) for index in reads}) == len(reads) <= 5 * 9
