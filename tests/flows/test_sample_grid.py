"""`rangegrid sample-grid` as its user meets it: files in, a file out, wrong input refused before any work."""

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from infra import storage
from infra.errors import UserError
from tasks.core.earth.grid import GridSpec
from tasks.grid import store
from tasks.grid.store import Vectors
from tasks.points import sample_grid
from tests.flows.test_cli import run
from tests.tasks.test_artifacts import readable

SPEC = GridSpec(10.0, 5)


@pytest.fixture
def grid(tmp_path):
    """A grid whose first two dimensions are its cells' longitude and latitude."""
    url = (tmp_path / "grid.zarr").as_uri()
    store.create(url, SPEC, store.template(SPEC, store.Content(2, 1), {}))
    for tile in SPEC.tiles():
        values = np.moveaxis(SPEC.lonlat(tile), -1, 0).astype(np.float32)
        store.write_tile(url, tile, np.concatenate([values, np.ones_like(values[:1])]))
    return url


@pytest.fixture
def points(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"name": [f"p{i}" for i in range(300)]})
    table["lon"], table["lat"] = rng.uniform(-174, 174, 300), rng.uniform(-84, 84, 300)
    table.to_csv(tmp_path / "points.csv", index=False)
    return tmp_path / "points.csv"


def test_rows_stay_in_order_and_get_their_vectors(grid, points, tmp_path, monkeypatch):
    """Bilinear sampling of a linear field gives the places back; in several batches."""
    monkeypatch.setattr(sample_grid, "POINTS", 128)
    found = sample_grid.sample_file(points, grid, tmp_path / "out.parquet", "bilinear")
    table, source = pd.read_parquet(found), pd.read_csv(points)
    assert table["name"].tolist() == source["name"].tolist()
    np.testing.assert_allclose(np.stack(table["embedding"])[:, :2], source[["lon", "lat"]], atol=1e-3)


def test_the_command(grid, points, tmp_path):
    ran = run("sample-grid", str(points), "--grid", grid, "--output", str(tmp_path / "out.parquet"))
    assert ran.returncode == 0, ran.stderr
    near = np.stack(pd.read_parquet(tmp_path / "out.parquet")["embedding"])[:, :2]
    assert np.abs(near - pd.read_csv(points)[["lon", "lat"]].to_numpy()).max() <= 5.001


def test_centres_of_cells_are_what_the_nearest_cells_hold(grid, points):
    """The gate embeds the places of labels there; beyond 180 degrees too."""
    places = pd.read_csv(points)[["lon", "lat"]].to_numpy()
    np.testing.assert_allclose(sample_grid.cells_at(grid, places), sample_grid.sample_grid(grid, places)[:, :2])
    np.testing.assert_allclose(sample_grid.cells_at(grid, [[183, 12]]), [[-175, 15]])


def hole(url, *cells):
    """Takes the vectors of some cells away."""
    array = zarr.open_array(f"{url}/embedding".removeprefix("file://"), mode="r+")
    for row, column in cells:
        array[:, row, column] = np.nan


def test_corners_without_data_count_for_nothing(grid, tmp_path):
    """Lima's case: of four cells around it one is at sea. The oracle weighs by hand."""
    hole(grid, (8, 18), (9, 18))  # at lon 5, lat 5 and -5
    (tmp_path / "p.csv").write_text("lon,lat\n7,3\n13,1\n5,5\n5,0\n")
    sample_grid.sample_file(tmp_path / "p.csv", grid, tmp_path / "out.parquet", "bilinear")
    found = np.stack(pd.read_parquet(tmp_path / "out.parquet")["embedding"])[:, :2]
    np.testing.assert_allclose(found[0], [15, 0.8 * 5 + 0.2 * -5], atol=1e-5)
    np.testing.assert_allclose(found[1], [15, 1], atol=1e-5)
    assert np.isnan(found[2:]).all()


def test_each_point_tells_why_it_has_no_vector(grid, tmp_path, caplog):
    """Paris, the Pacific, a hole in the Sahara, a tile of Siberia that was never published."""
    hole(grid, (6, 19))
    (Path(grid.removeprefix("file://")) / "embedding" / "c" / "0" / "0" / "5").unlink()
    hole(grid, (9, 3))
    table = pd.DataFrame({"name": ["Paris", "Pacific", "Sahara", "Siberia"], "lon": [2.3, -145, 15, 95.0]})
    table["lat"] = [48.9, -5, 25, 65.0]
    table.to_csv(tmp_path / "p.csv", index=False)
    for method in "nearest", "bilinear":
        sample_grid.sample_file(tmp_path / "p.csv", grid, tmp_path / "out.parquet", method, overwrite=True)
        out = pd.read_parquet(tmp_path / "out.parquet")
        if method == "nearest":
            assert out["status"].tolist() == ["vector", "sea", "no data", "never published"]
            assert "3 of 4 points have no vector: 1 sea, 1 no data, 1 never published" in caplog.text
        assert [bool(np.isfinite(v).all()) for v in out["embedding"]] == (out["status"] == "vector").tolist()


def test_points_outside_of_a_box_are_told(tmp_path):
    url, spec = (tmp_path / "box.zarr").as_uri(), GridSpec(10.0, 5, (0.0, 0.0, 50.0, 50.0))
    store.create(url, spec, store.template(spec, store.Content(2, 1), {}))
    for tile in spec.tiles():
        store.write_tile(url, tile, np.ones((3, tile.rows, tile.columns), np.float32))
    (tmp_path / "p.csv").write_text("lon,lat\n10,10\n-10,10\n60,10\n10,60\n")
    for method in "nearest", "bilinear":
        sample_grid.sample_file(tmp_path / "p.csv", url, tmp_path / "out.parquet", method, overwrite=True)
        assert pd.read_parquet(tmp_path / "out.parquet")["status"].tolist() == ["vector", *["outside"] * 3]


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_each_chunk_is_read_once_and_several_at_a_time(grid, points, tmp_path, monkeypatch, method):
    """Whatever the points' order, in however many batches they are written."""
    monkeypatch.setattr(sample_grid, "POINTS", 32)
    asked, at_work, most, lock = Counter(), [0], [0], threading.Lock()
    read = Vectors.__getitem__

    def counting(self, index):
        with lock:
            asked[str(index[1:])] += 1
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        values = read(self, index)
        with lock:
            at_work[0] -= 1
        return values

    monkeypatch.setattr(Vectors, "__getitem__", counting)
    sample_grid.sample_file(points, grid, tmp_path / "out.parquet", method)
    assert set(asked.values()) == {1}
    assert 1 < most[0] <= sample_grid.READERS


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_the_same_as_xarray_in_several_windows(grid, points, tmp_path, monkeypatch, method):
    monkeypatch.setattr(sample_grid, "POINTS", 64)
    monkeypatch.setattr(sample_grid, "TOGETHER", 130)
    sample_grid.sample_file(points, grid, tmp_path / "out.parquet", method)
    found, table = np.stack(pd.read_parquet(tmp_path / "out.parquet")["embedding"]), pd.read_csv(points)
    at = {name: xr.DataArray(table[name], dims="point") for name in ("lon", "lat")}
    field = xr.open_zarr(grid.removeprefix("file://")).embedding
    expected = field.sel(at, method="nearest") if method == "nearest" else field.load().interp(at)
    np.testing.assert_allclose(found, expected.T, atol=1e-3)


def test_a_grid_is_read_from_the_web_and_from_a_public_bucket_without_keys(
    sandbox, grid, points, tmp_path, monkeypatch
):
    """A bucket that may not be listed answers 403 for a tile that is not there: that is no refusal of the grid."""
    home = Path(grid.removeprefix("file://"))
    (home / "embedding" / "c" / "0" / "0" / "5").unlink()
    expected = sample_grid.sample_grid(grid, pd.read_csv(points)[["lon", "lat"]])
    storage.upload(home, "s3://rangegrid/public/grid.zarr")
    with readable(sandbox, "public"), monkeypatch.context() as context:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            context.delenv(name)
        for url in ("s3://rangegrid/public/grid.zarr", f"{sandbox.endpoint}/rangegrid/public/grid.zarr"):
            sample_grid.sample_file(points, url, tmp_path / "out.parquet", overwrite=True)
            out = pd.read_parquet(tmp_path / "out.parquet")
            np.testing.assert_array_equal(np.stack(out["embedding"]), expected)
            assert set(out["status"]) <= {"vector", "sea", "never published"}
        with pytest.raises(UserError, match=r"forbidden|refused"):
            sample_grid.open_grid("s3://rangegrid/private/grid.zarr")


def test_an_output_goes_to_a_bucket(sandbox, grid, points):
    url = "s3://rangegrid/outputs/a space/out.parquet"
    assert sample_grid.sample_file(points, grid, url) == url
    with storage.as_file(url) as file:
        assert len(pd.read_parquet(file)) == 300
    with pytest.raises(UserError, match="is there already"):
        sample_grid.sample_file(points, grid, url)


def test_an_output_outlives_what_goes_wrong_while_it_is_replaced(grid, points, tmp_path, monkeypatch):
    output = tmp_path / "out.parquet"
    sample_grid.sample_file(points, grid, output)
    before = output.read_bytes()
    with monkeypatch.context() as context:
        context.setattr(sample_grid, "_with_vectors", None)
        with pytest.raises(TypeError):
            sample_grid.sample_file(points, grid, output, overwrite=True)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.zarr", "out.parquet", "points.csv"]


def test_wrong_input_is_refused_before_any_work(grid, points, tmp_path):
    with pytest.raises(UserError, match=r"there is no grid at .*nothing"):
        sample_grid.sample_file(points, (tmp_path / "nothing").as_uri(), tmp_path / "out.parquet")
    with pytest.raises(UserError, match=r"name it \.parquet"):
        sample_grid.sample_file(points, grid, tmp_path / "out.zarr")
    points.write_text("lon,lat\n1,2\n1,95\n")
    with pytest.raises(UserError, match="no place in row 2"):
        sample_grid.sample_file(points, grid, tmp_path / "out.parquet")
    assert not list(tmp_path.glob("*.parquet*"))
