"""The stored grid: what plain xarray finds in it."""

import numpy as np
import pytest
import xarray as xr

from infra.errors import UserError
from tasks import grids
from tasks.core.grid import GridSpec, Tile

SPEC = GridSpec(10.0, 5)


@pytest.fixture
def url(tmp_path):
    url = (tmp_path / "grid.zarr").as_uri()
    grids.create(url, SPEC, grids.template(SPEC, 16, 8, {"attribution": "nobody"}))
    return url


def test_plain_xarray_reads_what_was_written(url):
    values = np.random.default_rng(0).normal(size=(24, *SPEC.shape)).astype(np.float32)
    tiles = list(SPEC.tiles())
    for tile in tiles[:-3]:
        grids.write_tile(url, tile, values[:, *tile.window])
    stored = xr.open_zarr(url)
    assert stored.embedding.dims == ("embedding_dim", "lat", "lon")
    assert stored.embedding.dtype == np.float32
    assert stored.attrs["attribution"] == "nobody"
    assert stored.attrs["geoemb:blocks"] == {"visual": [0, 16], "location": [16, 24]}
    np.testing.assert_array_equal(stored.lat, SPEC.lat)
    for tile in tiles[-3:]:
        values[:, *tile.window] = np.nan
    np.testing.assert_array_equal(stored.embedding, values)


def test_the_presence_of_a_shard_is_the_record_of_work(url):
    tiles = list(SPEC.tiles())
    assert grids.written(url, SPEC, tiles) == set()
    full = np.ones((24, 5, 5), np.float32)
    grids.write_tile(url, tiles[9], full)
    grids.write_tile(url, tiles[0], np.full_like(full, np.nan))
    assert grids.written(url, SPEC, tiles) == {tiles[9]}


@pytest.mark.parametrize("tile", [Tile(0, 2, 5, 5), Tile(0, 0, 5, 4), Tile(3, 5, 5, 5)])
def test_half_a_shard_is_refused(url, tile):
    with pytest.raises(UserError, match="not one whole shard"):
        grids.write_tile(url, tile, np.ones((24, tile.rows, tile.columns), np.float32))


def test_a_tile_size_that_splits_chunks_is_refused(tmp_path):
    spec = GridSpec(1.0, 30)
    with pytest.raises(UserError, match=r"tile size 30 is not a multiple .* Use 20 or 40"):
        grids.create((tmp_path / "g").as_uri(), spec, grids.template(spec, 2, 1, {}))
