"""The stored grid: what plain xarray finds in it."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import rioxarray  # noqa: F401 (its accessor)
import shapely
import xarray as xr
import zarr_cm

from infra import storage
from infra.errors import UserError
from tasks.core.compact import Compact, Projection
from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.quantize import Scale
from tasks.grid import conventions, store
from tests.core.test_retrieval import close
from tests.test_architecture import ROOT

SPEC = GridSpec(10.0, 5)
SCALES = {"visual": Scale(0.02, 1.0), "location": Scale(0.01, 0.0)}
CONTENTS = {
    "float32": store.Content(16, 8),
    "float16": store.Content(16, 8, "float16"),
    "int8": store.Content(16, 8, "int8", SCALES),
}
STEPS = {"float32": 0, "float16": 1e-3, "int8": 0.0101}  # the largest error of a value near 1


def made(folder, content):
    url = (folder / "grid.zarr").as_uri()
    made_of = conventions.provenance("nobody")
    store.create(url, SPEC, store.template(SPEC, content, made_of))
    return url


@pytest.fixture
def url(tmp_path):
    return made(tmp_path, CONTENTS["float32"])


def embedding(stored):
    """As a reader without rangegrid puts it together."""
    if "embedding" in stored:
        return stored.embedding.values
    return np.concatenate([stored.visual.values, stored.location.values])


@pytest.mark.parametrize("dtype", CONTENTS)
def test_plain_xarray_reads_what_was_written(tmp_path, dtype):
    url = made(tmp_path, CONTENTS[dtype])
    values = np.random.default_rng(0).uniform(-1, 1, size=(24, *SPEC.shape)).astype(np.float32)
    values[:16] += 1
    values[:, 3:7, 2:9] = np.nan
    tiles = list(SPEC.tiles())
    for tile in tiles[:-3]:
        store.write_tile(url, tile, values[:, *tile.window])
    for tile in tiles[-3:]:
        values[:, *tile.window] = np.nan
    found = embedding(xr.open_zarr(url))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
    np.testing.assert_allclose(found, values, atol=STEPS[dtype])
    for ours, theirs in [
        (store.open_vectors(url)[:], found),
        (store.open_vectors(url)[0], found[0]),
        (store.open_vectors(url)[20], found[20]),
        (store.read_tile(url, tiles[7]), found[:, *tiles[7].window]),
    ]:
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_coordinates_and_attributes(url):
    stored = xr.open_zarr(url)
    assert stored.embedding.dims == ("embedding_dim", "lat", "lon")
    assert stored.embedding.dtype == np.float32
    assert stored.attrs["attribution"] == "nobody"
    assert stored.attrs["geoemb:blocks"] == {"visual": [0, 16], "location": [16, 24]}
    np.testing.assert_array_equal(stored.lat, SPEC.y)
    np.testing.assert_array_equal(stored.embedding_dim, np.arange(24))
    assert stored.embedding[(stored.block == "location").values].embedding_dim.values.tolist() == list(range(16, 24))


@pytest.mark.parametrize("dtype", CONTENTS)
def test_the_attributes_keep_the_conventions(tmp_path, dtype):
    node = storage.read_json(storage.join(made(tmp_path, CONTENTS[dtype]), "zarr.json"))
    assert set(zarr_cm.detect_revisions(node["attributes"])) >= {"proj", "spatial"}
    zarr_cm.validate_all(node)
    schema = json.loads((ROOT / "tests/schemas/geoemb.json").read_text())
    jsonschema.validate(node, schema)
    del node["attributes"]["geoemb:model"]
    with pytest.raises(jsonschema.ValidationError, match="geoemb:model"):
        jsonschema.validate(node, schema)


def test_where_no_shard_is_there_is_no_data(tmp_path):
    stored = xr.open_zarr(made(tmp_path, CONTENTS["int8"]), mask_and_scale=False)
    assert stored.visual.dtype == np.int8
    assert (stored.visual == -128).all()


def test_a_value_beyond_float16_is_refused_before_it_is_written(tmp_path):
    url = made(tmp_path, CONTENTS["float16"])
    tile = next(SPEC.tiles())
    with pytest.raises(UserError, match=r"tile r00000-c00000: a value of 1e\+06 is beyond float16"):
        store.write_tile(url, tile, np.full((24, 5, 5), 1e6, np.float32))
    assert store.written(url, SPEC, [tile]) == set()


@pytest.mark.parametrize("dtype", CONTENTS)
def test_the_presence_of_a_shard_is_the_record_of_work(tmp_path, dtype):
    url = made(tmp_path, CONTENTS[dtype])
    tiles = list(SPEC.tiles())
    assert store.written(url, SPEC, tiles) == set()
    full = np.ones((24, 5, 5), np.float32)
    store.write_tile(url, tiles[9], full)
    store.write_tile(url, tiles[0], np.full_like(full, np.nan))
    assert store.written(url, SPEC, tiles) == {tiles[9]}


def test_layers_of_evidence_stand_beside_the_embedding(tmp_path):
    url = made(tmp_path, store.Content(16, 8, evidence=True))
    tile = list(SPEC.tiles())[9]
    layer = np.arange(25, dtype=np.float32).reshape(5, 5)
    store.write_tile(url, tile, layer, "distance_km")
    stored = xr.open_zarr(url)
    assert stored.distance_km.attrs["units"] == "km"
    np.testing.assert_array_equal(stored.distance_km[tile.window], layer)
    assert set(store.EVIDENCE) < set(stored.data_vars)
    assert store.written(url, SPEC, [tile]) == set()


@pytest.mark.parametrize("dtype", CONTENTS)
def test_tools_of_rasters_take_a_compact_grid_whole(tmp_path, dtype):
    """What leads back to the values is no variable: rioxarray would look for cells in it, and raise."""
    url, back = (tmp_path / "grid.zarr").as_uri(), Compact(Projection(np.ones(30), np.eye(30, 16), 0.9))
    content = replace(CONTENTS[dtype], evidence=True)
    store.create(url, SPEC, store.template(SPEC, content, {}, back))
    tile = list(SPEC.tiles())[3]
    store.write_tile(url, tile, np.full((24, 5, 5), 0.5, np.float32))
    grid = xr.open_zarr(url)
    for name, values in (("components", back.values.components), ("mean", back.values.mean)):
        np.testing.assert_array_equal(grid[name], values)
    clipped = grid.rio.clip([shapely.box(-30, 40, 20, 90)])
    assert (clipped.lat.size, clipped.lon.size) == (5, 5)
    close(embedding(clipped), np.full((24, 5, 5), 0.5), STEPS[dtype] + 1e-7)
    cylinder = grid.astype("float32").rio.reproject("EPSG:6933")
    assert np.nanmax(abs(embedding(cylinder) - 0.5)) <= STEPS[dtype] + 1e-7
    assert np.isfinite(embedding(cylinder)).any()


@pytest.mark.parametrize("tile", [Tile(0, 2, 5, 5), Tile(0, 0, 5, 4), Tile(3, 5, 5, 5)])
def test_half_a_shard_is_refused(url, tile):
    with pytest.raises(UserError, match="not one whole shard"):
        store.write_tile(url, tile, np.ones((24, tile.rows, tile.columns), np.float32))


@pytest.mark.parametrize("dtype", CONTENTS)
@pytest.mark.parametrize(("dims", "least"), [(1280, True), (1025, True), (320, True), (24, False)])
def test_the_shard_of_a_tile_is_of_50_to_500_megabytes(dims, dtype, least):
    """But for short vectors, whose tiles would be too few."""
    side = store.tile_cells(dims, dtype)
    size = dims * side**2 * np.dtype(dtype).itemsize
    assert side % 60 == 0
    assert size < 500e6
    assert (size >= 50e6) == least or side == 480
    assert side == 60 or size * ((side - 60) / side) ** 2 < 50e6


def test_a_tile_size_that_splits_chunks_is_refused(tmp_path):
    spec = GridSpec(1.0, 30)
    with pytest.raises(UserError, match=r"tile size 30 is not a multiple .* Use 20 or 40"):
        store.create((tmp_path / "g").as_uri(), spec, store.template(spec, store.Content(2, 1), {}))
