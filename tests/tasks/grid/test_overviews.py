"""Coarser levels against xarray's own coarsening, and the convention that lists them."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
import zarr_cm

from infra import storage
from tasks.grid import store as grids
from tasks.grid.updates import home_of
from tasks.params import PublishParams
from tests.tasks.test_publish import publishing


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """Publishes a grid with two levels: 36 x 72, 18 x 36 and 9 x 18 cells."""
    with publishing(tmp_path_factory.mktemp("overviews"), 100) as publish_params:
        params = PublishParams(step=5.0, tile_cells=20, overviews=2, method="range+")
        yield lambda **options: publish_params(params.model_copy(update=options))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_level_is_the_mean_of_the_one_before(publish, dtype):
    grid = publish(dtype=dtype)
    before = xr.open_zarr(grid)
    for name, rows in (("x2", 18), ("x4", 9)):
        level = xr.open_zarr(f"{home_of(grid)}/{name}.zarr")
        for variable in ["embedding"] if dtype == "float32" else ["visual", "location"]:
            expected = before[variable].coarsen(lat=2, lon=2).mean()
            step = level[variable].encoding.get("scale_factor", 1e-6)
            assert level[variable].shape == (before[variable].shape[0], rows, 2 * rows)
            np.testing.assert_array_equal(np.isnan(level[variable]), np.isnan(expected))
            xr.testing.assert_allclose(level[variable], expected, rtol=1e-5, atol=0.51 * step)
            np.testing.assert_allclose(level.lat, expected.lat)
        before = level


def test_a_tree_opens_and_the_convention_lists_its_levels(publish):
    """The grid by itself, and with its levels beside it; side by side, for a child has its parent's dimensions."""
    grid = publish()
    assert [node.path for node in xr.open_datatree(grid, engine="zarr").subtree] == ["/"]
    home = home_of(grid)
    tree, node = xr.open_datatree(home, engine="zarr"), storage.read_json(f"{home}/zarr.json")
    assert set(tree.children) == {"grid.zarr", "x2.zarr", "x4.zarr"}
    xr.testing.assert_equal(tree["grid.zarr"].to_dataset(), xr.open_zarr(grid))
    assert set(zarr_cm.detect_revisions(node["attributes"])) >= {"proj", "spatial", "multiscales"}
    zarr_cm.validate_all(node)
    layout = node["attributes"]["multiscales"]["layout"]
    assert [level.get("derived_from") for level in layout] == [None, "grid.zarr", "x2.zarr"]
    for level in layout:
        inside = tree[level["asset"]]
        assert level["spatial:shape"] == [inside.lat.size, inside.lon.size]
        width, _, left, _, height, top = level["spatial:transform"]
        np.testing.assert_allclose(inside.lon, left + width * (np.arange(inside.lon.size) + 0.5))
        np.testing.assert_allclose(inside.lat, top + height * (np.arange(inside.lat.size) + 0.5))


def test_levels_of_before_lie_within_the_grid_and_are_made_and_checked_there(publish):
    grid = publish(beta=0.3)
    home = Path(home_of(grid).removeprefix("file://"))
    for name in ("x2", "x4"):
        (home / f"{name}.zarr").rename(home / "grid.zarr" / name)
    zarr.consolidate_metadata(str(home / "grid.zarr"))
    for left in ("zarr.json", "card.json"):
        (home / left).unlink()
    tile = max((home / "grid.zarr/x2/embedding/c/0/0").iterdir(), key=lambda path: path.stat().st_size)
    before = tile.read_bytes()
    tile.unlink()
    assert publish(beta=0.3) == grid
    assert tile.read_bytes() == before
    assert not {"x2.zarr", "x4.zarr", "zarr.json"} & {path.name for path in home.iterdir()}
    assert xr.open_zarr(grid, group="x4").embedding.shape[1:] == (9, 18)


def test_what_is_there_is_not_made_again(publish, monkeypatch):
    grid = publish()
    shard = next((p for p in storage.names(f"{home_of(grid)}/x2.zarr/embedding/c/0/0")), None)
    assert shard is not None
    before = storage.read(f"{home_of(grid)}/x2.zarr/embedding/c/0/0/{shard}")
    storage.delete(f"{home_of(grid)}/x2.zarr/embedding/c/0/0/{shard}")
    written, real = [], grids.write_tile
    monkeypatch.setattr(grids, "write_tile", lambda *call: (written.append(call), real(*call))[1])
    assert publish() == grid
    assert [(url, tile.row) for url, tile, _ in written] == [(f"{home_of(grid)}/x2.zarr", 0)]
    assert storage.read(f"{home_of(grid)}/x2.zarr/embedding/c/0/0/{shard}") == before


def test_levels_that_would_cut_cells_are_refused():
    with pytest.raises(ValueError, match="36 rows and 72 columns of cells cannot be halved 3 times"):
        PublishParams(step=5.0, overviews=3)
