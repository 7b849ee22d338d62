"""`rangegrid embed` as its user meets it: points in, points with embeddings out, and sentences for what is wrong."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import xarray as xr
from rangegeo import RANGE
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from infra.errors import UserError
from tasks.core.encoders.location import LocationEncoder
from tasks.core.methods import Head
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.database.npz import export_npz, import_npz
from tasks.database.store import open_database
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tasks.model.satclip import export_satclip
from tasks.params import EmbedParams
from tasks.points.embed import embed_file, embed_points
from tests.core.test_heads import weights
from tests.core.test_retrieval import SPECIAL, database, places
from tests.flows.test_cli import run_here

POINTS = np.concatenate([places(9000), SPECIAL])  # more than two batches


def write_products(folder):
    """A random checkpoint and a database of 50 images, both in the published formats too."""
    torch.manual_seed(0)
    save_checkpoint((folder / "checkpoint").as_uri(), LocationEncoder(6, hidden=16, dim=16, basis="analytic"))
    keys, values, where = database(50)
    np.savez(folder / "db.npz", locs=where, satclip_embeddings=keys, image_embeddings=values)
    import_npz(folder / "db.npz", (folder / "database").as_uri(), (folder / "checkpoint").as_uri())
    export_satclip((folder / "checkpoint").as_uri(), folder / "satclip.ckpt")
    export_npz((folder / "database").as_uri(), folder / "range_db.npz")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, its database, both in the published formats too, and points as CSV and Parquet."""
    folder = tmp_path_factory.mktemp("embed")
    write_products(folder)
    table = pd.DataFrame({"name": [f"p{i}" for i in range(len(POINTS))], "lon": POINTS[:, 0], "lat": POINTS[:, 1]})
    table.to_csv(folder / "points.csv", index=False)
    table.to_parquet(folder / "points.parquet", index=False)
    return folder


def run_embed(home, points, output, *options, checkpoint="checkpoint", database="database"):
    where = ["--checkpoint", str(home / checkpoint), "--database", str(home / database), "--output", str(output)]
    return run_here("embed", str(home / points), *where, *options)


def expected(home, method):
    data = open_database((home / "database").as_uri())
    encoder = load_checkpoint((home / "checkpoint").as_uri()).location
    return embed(encoder, RetrievalIndex(data.keys, data.values, data.locations), POINTS, method)


@pytest.mark.parametrize("points", ["points.csv", "points.parquet"])
def test_points_keep_their_columns_and_gain_an_embedding(home, tmp_path, points):
    ran = run_embed(home, points, tmp_path / "out.parquet", "--method", "range+", "--beta", "0.3")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(tmp_path / "out.parquet")
    assert "embed" in ran.stderr  # the progress
    out = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert out.column_names == ["name", "lon", "lat", "embedding"]
    kind = out.schema.field("embedding").type
    assert (pa.types.is_fixed_size_list(kind), kind.list_size, kind.value_type) == (True, 24, pa.float32())
    assert out["name"].to_pylist()[-1] == f"p{len(POINTS) - 1}"
    found = np.stack(out["embedding"].to_pandas())
    np.testing.assert_allclose(found, expected(home, Method(beta=0.3)), atol=1e-5)
    assert json.loads(out.schema.metadata[b"rangegrid"])["beta"] == 0.3
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("method", ["topk", *(pytest.param(m, marks=pytest.mark.further) for m in ("range", "none"))])
def test_zarr_opens_in_xarray(home, tmp_path, method):
    ran = run_embed(home, "points.csv", tmp_path / "out.zarr", "--method", method)
    assert ran.returncode == 0, ran.stderr
    grid = xr.open_zarr(tmp_path / "out.zarr")
    np.testing.assert_allclose(grid.embedding, expected(home, Method(method)), atol=1e-5)
    np.testing.assert_array_equal(grid.lon, POINTS[:, 0])
    assert grid.attrs["method"] == method


def test_the_published_formats_serve_as_they_are(home, tmp_path):
    published = {"checkpoint": "satclip.ckpt", "database": "range_db.npz"}
    ran = run_embed(home, "points.csv", tmp_path / "out.zarr", "--method", "range+", **published)
    assert ran.returncode == 0, ran.stderr
    theirs = RANGE("RANGE+", pretrained_path=str(home / "satclip.ckpt"), db_path=str(home / "range_db.npz"))
    np.testing.assert_allclose(xr.open_zarr(tmp_path / "out.zarr").embedding, theirs.encode(POINTS), atol=1e-5)


def test_evidence_and_compact(home, tmp_path):
    options = ["--evidence", "true", "--top-images", "2", "--compact-dims", "3"]
    ran = run_embed(home, "points.parquet", tmp_path / "out.parquet", *options)
    assert ran.returncode == 0, ran.stderr
    out = pd.read_parquet(tmp_path / "out.parquet")
    assert list(out) == [
        "name", "lon", "lat", "embedding", "effective_images", "largest_weight", "distance_km", "image_ids"
    ]  # fmt: skip
    assert len(out["embedding"][0]) == 2 * 3 + 16  # two heads
    assert out["effective_images"].between(1, 50).all()
    assert len(out["image_ids"][0]) == 2
    ran = run_embed(home, "points.parquet", tmp_path / "out.zarr", *options)
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(xr.open_zarr(tmp_path / "out.zarr").distance_km, out["distance_km"])


def test_one_call_in_python(home):
    products = str(home / "checkpoint"), str(home / "database")
    found = embed_points(POINTS[:7], *products, EmbedParams(method="range+"))
    np.testing.assert_allclose(found, expected(home, Method())[:7], atol=1e-5)
    assert embed_points(np.empty((0, 2)), *products, EmbedParams(method="range+")).shape == (0, 24)


def test_heads_of_points_are_their_formulas(home, tmp_path):
    """Too few images to choose by, so the heads are the documented ones."""
    ran = run_embed(home, "points.csv", tmp_path / "out.parquet", "--compact-dims", "4", "--location-dims", "5")
    assert ran.returncode == 0, ran.stderr
    out = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert json.loads(out.schema.metadata[b"rangegrid"])["heads"] == ["semantic:12", "geodesic:1000"]
    found, some = np.stack(out["embedding"].to_pandas()), slice(None, None, 50)
    assert found.shape == (len(POINTS), 4 + 4 + 5)
    data = open_database((home / "database").as_uri())
    queries = load_checkpoint((home / "checkpoint").as_uri()).location.embed(POINTS[some])
    scaled = StandardScaler().fit_transform(data.values.astype(np.float64))
    kept = PCA(4).fit_transform(scaled)
    for text, part in zip(("semantic:12", "geodesic:1000"), np.split(found[some, :8], 2, axis=1), strict=True):
        selected = weights(Head.parse(text), (data.keys, data.values, data.locations), queries, POINTS[some]) @ kept
        np.testing.assert_allclose(part @ part.T, selected @ selected.T, atol=1e-4)  # but for a rotation
    assert "beta 0.3 mixes the halves" in run_embed(home, "points.csv", tmp_path / "x.zarr", "--beta", "0.3").stderr


CSV = {
    "no_lat.csv": ("lon,height\n1,2\n", "has no column 'lat' among lon, height"),
    "pole.csv": ("lon,lat\n1,2\n3,95\n", "no place in row 2: lon 3, lat 95"),
    "swapped.csv": ("lon,lat\n1000,2\n", "no place in row 1: lon 1000"),
    "nan.csv": ("lon,lat\n1,\n", "no place in row 1: lon 1, lat nan"),
    "text.csv": ("lon,lat\n1,north\n", "cannot be read as a table of points"),
    "empty.csv": ("", "cannot be read as a table of points"),
    "header.csv": ("lon,lat\n", "has no points"),
    "twice.csv": ("lon,lat,lon\n1,2,3\n", "has 2 columns 'lon': rename all but one"),
    "spaces.csv": ("lon lat\n1 2\n", "has no column 'lon' among lon lat"),
    "taken.csv": ("lon,lat,embedding\n1,2,3\n", "has a column 'embedding' already"),
    "points.xlsx": ("lon,lat\n1,2\n", "is of no kind that can be read"),
    "broken.parquet": ("lon,lat\n1,2\n", "cannot be read as a table of points"),
}


@pytest.mark.parametrize("name", CSV)
def test_bad_points_are_refused(home, tmp_path, name):
    text, message = CSV[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        embed_file(tmp_path / name, str(home / "checkpoint"), str(home / "database"), tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_points_are_one_sentence(home, tmp_path):
    (tmp_path / "pole.csv").write_text(CSV["pole.csv"][0])
    refused(run_embed(home, tmp_path / "pole.csv", tmp_path / "out.parquet"), CSV["pole.csv"][1])


def refused(ran, message):
    assert ran.returncode == 2, ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out.csv", {}, "name it .parquet or .zarr"),
        ("nowhere/out.zarr", {}, "there is no directory"),
        ("out.zarr", {"compact_dims": 99}, "values have 8 components"),
        ("out.zarr", {"method": "none", "evidence": True}, "rests on no image"),
        ("out.zarr", {"device": "cuda:99"}, "there is no cuda:99 here"),
    ],
)
def test_bad_options_are_refused(home, tmp_path, output, options, message):
    with pytest.raises(UserError, match=message):
        embed_file(
            home / "points.csv",
            str(home / "checkpoint"),
            str(home / "database"),
            tmp_path / output,
            EmbedParams(**options),
        )
    assert not list(tmp_path.iterdir())


def test_bad_options_are_one_sentence(home, tmp_path):
    refused(run_embed(home, "points.csv", tmp_path / "out.zarr", "--method", "best"), "--method 'best'")
    refused(run_embed(home, "points.csv", tmp_path / "out.zarr", "--bogus"), "No such option")


@pytest.mark.parametrize(
    ("points", "checkpoint", "database", "message"),
    [
        ("points.csv", "gone", "database", "there is no finished checkpoint"),
        ("points.csv", "checkpoint", "gone.npz", "there is no file"),
        ("gone.csv", "checkpoint", "database", "there is no file"),
        ("points.csv", "other", "database", "was encoded with checkpoint"),
    ],
)
def test_products_that_are_not_there_or_do_not_fit(home, tmp_path, points, checkpoint, database, message):
    save_checkpoint((home / "other").as_uri(), LocationEncoder(6, hidden=16, dim=16))
    with pytest.raises(UserError, match=message):
        embed_file(home / points, str(home / checkpoint), str(home / database), tmp_path / "out.zarr")


def test_an_output_is_not_lost_unasked(home, tmp_path):
    output = tmp_path / "out.parquet"
    output.write_text("precious")
    refused(run_embed(home, "points.csv", output), "is there already")
    assert output.read_text() == "precious"
    assert run_embed(home, "points.csv", output, "--overwrite").returncode == 0
    assert len(pyarrow.parquet.read_table(output)) == len(POINTS)


@pytest.mark.parametrize("name", ["out.parquet", "out.zarr"])
@pytest.mark.parametrize("broken", [(RetrievalIndex, "retrieve"), (Path, "replace"), (Path, "rename")])
def test_an_overwrite_that_is_broken_off_leaves_what_was_there(home, tmp_path, monkeypatch, name, broken):
    """In the middle of the writing, and when the new file or directory is to take the former's place."""
    (tmp_path / "points.csv").write_text("lon,lat\n1,2\n3,4\n")
    output = tmp_path / "out" / name
    output.parent.mkdir()
    real = getattr(*broken)

    def interrupted(self, target, *rest):
        if isinstance(self, RetrievalIndex) or (self.name, target) == (name, output):
            raise KeyboardInterrupt
        return real(self, target, *rest)

    def overwrite():
        embed_file(tmp_path / "points.csv", str(home / "checkpoint"), str(home / "database"), output, overwrite=True)

    def stored():
        return {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}

    overwrite()
    before = stored()
    moves_otherwise = broken == (Path, "rename" if name == "out.parquet" else "replace")
    monkeypatch.setattr(*broken, interrupted)
    with nullcontext() if moves_otherwise else pytest.raises(KeyboardInterrupt):
        overwrite()
    assert before
    assert stored() == before


@pytest.mark.parametrize("named", [{"lon": " "}, {"lat": "é"}, {"lon": "x", "lat": "lat"}, {"lon": "lon", "lat": "\0"}])
def test_a_column_that_is_named_and_not_there(home, tmp_path, named):
    """One of the two named as both: the remedy is another name, and not another file."""
    where = (home / "points.csv", str(home / "checkpoint"), str(home / "database"), tmp_path / "out.parquet")
    with pytest.raises(UserError, match=r"has no column '.*' among name, lon, lat: name one of them"):
        embed_file(*where, **named)
