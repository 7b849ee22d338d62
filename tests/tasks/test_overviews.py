"""Coarser levels against xarray's own coarsening, and the convention that lists them."""

import numpy as np
import pytest
import xarray as xr
import zarr_cm

from infra import clusters, storage
from tasks import grids
from tasks.params import PublishParams
from tasks.publish import publish_grid
from tests.tasks.test_publish import images, store, store_checkpoint


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """Publishes a grid with two levels: 36 x 72, 18 x 36 and 9 x 18 cells."""
    folder = tmp_path_factory.mktemp("overviews")
    checkpoint = store_checkpoint(folder.as_uri())
    database = store(folder, "database", images(np.arange(100)))
    with pytest.MonkeyPatch.context() as patch, clusters.connect("threads", 2) as client:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        params = PublishParams(step=5.0, tile_cells=10, overviews=2)
        yield lambda **options: publish_grid(client, checkpoint, database, params.model_copy(update=options))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_level_is_the_mean_of_the_one_before(publish, dtype):
    grid = publish(dtype=dtype)
    before = xr.open_zarr(grid)
    for name, rows in (("x2", 18), ("x4", 9)):
        level = xr.open_zarr(grid, group=name)
        for variable in ["embedding"] if dtype == "float32" else ["visual", "location"]:
            expected = before[variable].coarsen(lat=2, lon=2).mean()
            step = level[variable].encoding.get("scale_factor", 1e-6)
            assert level[variable].shape == (before[variable].shape[0], rows, 2 * rows)
            np.testing.assert_array_equal(np.isnan(level[variable]), np.isnan(expected))
            xr.testing.assert_allclose(level[variable], expected, rtol=1e-5, atol=0.51 * step)
            np.testing.assert_allclose(level.lat, expected.lat)
        before = level


def test_the_convention_lists_the_levels(publish):
    grid = publish()
    node = storage.read_json(f"{grid}/zarr.json")
    assert set(zarr_cm.detect_revisions(node["attributes"])) >= {"proj", "spatial", "multiscales"}
    zarr_cm.validate_all(node)
    for level in node["attributes"]["multiscales"]["layout"]:
        inside = xr.open_zarr(grid, group=None if level["asset"] == "." else level["asset"])
        assert level["spatial:shape"] == [inside.lat.size, inside.lon.size]
        width, _, left, _, height, top = level["spatial:transform"]
        np.testing.assert_allclose(inside.lon, left + width * (np.arange(inside.lon.size) + 0.5))
        np.testing.assert_allclose(inside.lat, top + height * (np.arange(inside.lat.size) + 0.5))


def test_what_is_there_is_not_made_again(publish, monkeypatch):
    grid = publish()
    shard = next((p for p in storage.names(f"{grid}/x2/embedding/c/0/0")), None)
    assert shard is not None
    before = storage.read(f"{grid}/x2/embedding/c/0/0/{shard}")
    storage.delete(f"{grid}/x2/embedding/c/0/0/{shard}")
    written, real = [], grids.write_tile
    monkeypatch.setattr(grids, "write_tile", lambda *call: (written.append(call), real(*call))[1])
    assert publish() == grid
    assert [(url, tile.row) for url, tile, _ in written] == [(f"{grid}/x2", 0)]
    assert storage.read(f"{grid}/x2/embedding/c/0/0/{shard}") == before


def test_levels_that_would_cut_cells_are_refused():
    with pytest.raises(ValueError, match="36 rows and 72 columns of cells cannot be halved 3 times"):
        PublishParams(step=5.0, overviews=3)
