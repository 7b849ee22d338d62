"""`rangegrid sample-grid` as its user meets it: files in, a file out, wrong input refused before any work."""

import numpy as np
import pandas as pd
import pytest

from infra.errors import UserError
from tasks import grid_sampling, grids
from tasks.core.grid import GridSpec
from tests.flows.test_cli import run

SPEC = GridSpec(10.0, 5)


@pytest.fixture
def grid(tmp_path):
    """A grid whose first two dimensions are its cells' longitude and latitude."""
    url = (tmp_path / "grid.zarr").as_uri()
    grids.create(url, SPEC, grids.template(SPEC, grids.Content(2, 1), {}))
    for tile in SPEC.tiles():
        values = np.moveaxis(SPEC.lonlat(tile), -1, 0).astype(np.float32)
        grids.write_tile(url, tile, np.concatenate([values, np.ones_like(values[:1])]))
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
    monkeypatch.setattr(grid_sampling, "POINTS", 128)
    found = grid_sampling.sample_file(points, grid, tmp_path / "out.parquet", "bilinear")
    table, source = pd.read_parquet(found), pd.read_csv(points)
    assert table["name"].tolist() == source["name"].tolist()
    np.testing.assert_allclose(np.stack(table["embedding"])[:, :2], source[["lon", "lat"]], atol=1e-3)


def test_the_command(grid, points, tmp_path):
    ran = run("sample-grid", str(points), "--grid", grid, "--output", str(tmp_path / "out.parquet"))
    assert ran.returncode == 0, ran.stderr
    near = np.stack(pd.read_parquet(tmp_path / "out.parquet")["embedding"])[:, :2]
    assert np.abs(near - pd.read_csv(points)[["lon", "lat"]].to_numpy()).max() <= 5.001


def test_wrong_input_is_refused_before_any_work(grid, points, tmp_path):
    with pytest.raises(UserError, match=r"there is no grid at .*nothing"):
        grid_sampling.sample_file(points, (tmp_path / "nothing").as_uri(), tmp_path / "out.parquet")
    with pytest.raises(UserError, match=r"name it \.parquet"):
        grid_sampling.sample_file(points, grid, tmp_path / "out.zarr")
    points.write_text("lon,lat\n1,2\n1,95\n")
    with pytest.raises(UserError, match="no place in row 2"):
        grid_sampling.sample_file(points, grid, tmp_path / "out.parquet")
    assert not list(tmp_path.glob("*.parquet*"))
