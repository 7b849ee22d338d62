"""Grids as the publish step stores them: compact ones, kept sums, and updates against grids made anew."""

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import xarray as xr
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from flows.cli import app
from infra import clusters, storage
from infra.errors import UserError
from tasks.cards import home_of, read_card
from tasks.core import retrieval
from tasks.core.bandwidths import curves
from tasks.core.compact import Compact
from tasks.core.earth.land import is_land
from tasks.core.encoders.location import LocationEncoder
from tasks.core.evidence import evidence
from tasks.core.field import DISTANCES_KM, PROBES
from tasks.core.methods import Head
from tasks.core.retrieval import Method, RetrievalIndex
from tasks.database.store import create_database, finish_database, write_rows
from tasks.grid import previews, updates
from tasks.grid import tiles as tiles_module
from tasks.grid.companion import companion_url
from tasks.grid.store import read_compact, read_tile, write_tile
from tasks.grid.survey import survey
from tasks.grid.tiles import Job, land_tiles
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tasks.model.geoclip import embed_geoclip
from tasks.params import PublishParams
from tasks.points.sample_grid import sample_grid
from tasks.products import CheckpointCard, GridCard
from tasks.publish import publish_grid
from tasks.release.validation import validate_grid
from tests.core.earth.test_land import cities
from tests.core.test_heads import weights
from tests.core.test_retrieval import close, database

STEP = {"step": 10.0, "tile_cells": 8, "method": "range+"}
SIDE_BY_SIDE = {"method": "multi-head", "heads": ("semantic:12", "geodesic:40", "geodesic:2000"), "location_dims": 10}
KEEPS = PublishParams(**STEP, keep_sums=True)
IMAGES, VALUES, DIM = 400, 8, 16
PROBED = PROBES * (2 + len(DISTANCES_KM))  # places that the survey embeds: those, and their neighbours


def store_checkpoint(home, hidden=16):
    """A random encoder in storage, the same whenever asked; its URL."""
    torch.manual_seed(0)
    url = f"{home}/checkpoint"
    save_checkpoint(url, LocationEncoder(6, hidden=hidden, dim=DIM))
    return url


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The storage, with a checkpoint in it."""
    folder = tmp_path_factory.mktemp("publish")
    store_checkpoint(folder.as_uri())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        yield folder


@pytest.fixture(scope="module")
def publish(home, client):
    return lambda database, params: publish_grid(client, f"{home.as_uri()}/checkpoint", database, params)


@pytest.fixture
def products(monkeypatch):
    """The (place, image) pairs that were computed."""
    counted = []
    real = RetrievalIndex.select

    def select(index, queries, lonlat, method):
        counted.append(len(queries) * len(index))
        return real(index, queries, lonlat, method)

    monkeypatch.setattr(RetrievalIndex, "select", select)
    return counted


def images(rows, changed=()):
    """Chosen rows of a database of 1000 images, some with another value."""
    keys, values, where = database(1000, DIM, VALUES)
    values[list(changed)] += 1
    return {"keys": keys[rows], "values": values[rows], "locations": where[rows], "row_ids": np.asarray(rows)}


def store(home, name, arrays, checkpoint=None, shard=150, **card):
    """A database in storage."""
    url, count = f"{home.as_uri()}/{name}", len(arrays["keys"])
    weighted = "weights" in arrays
    create_database(url, count, arrays["keys"].shape[1], arrays["values"].shape[1], shard, weighted=weighted)
    for start in range(0, count, shard):
        write_rows(url, start, {n: a[start : start + shard] for n, a in arrays.items()})
    space = checkpoint or read_card(f"{home.as_uri()}/checkpoint", CheckpointCard).fingerprint
    told = {"weighted": True} if weighted else {}
    finish_database(url, checkpoint=space, fingerprint=name, attribution="nobody", **told, **card)
    return url


@contextmanager
def inputs(folder, count=300):
    """URLs of a checkpoint and of a database of so many images, in the folder that is the storage meanwhile."""
    checkpoint = store_checkpoint(folder.as_uri())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        yield checkpoint, store(folder, "database", images(np.arange(count)))


@contextmanager
def publishing(folder, count=300, workers=2):
    """A function that publishes a grid of them."""
    with inputs(folder, count) as paths, clusters.connect("threads", workers) as client:
        yield partial(publish_grid, client, *paths)


@pytest.fixture(scope="module")
def before(home):
    return store(home, "before", images(np.arange(IMAGES)))


@pytest.fixture(scope="module")
def parent(publish, before):
    return publish(before, KEEPS)


@pytest.fixture(scope="module")
def after(home):
    """In another order, as an extended sample is: 12 images gone, 20 new ones, 3 with another value."""
    rows = np.random.default_rng(5).permutation(np.r_[12:IMAGES, 500:520])
    return store(home, "after", images(rows, changed=(20, 21, 22)))


def embeddings(grid):
    return xr.open_zarr(grid).embedding.values


def same(grid, other, tolerance=1e-5):
    found, expected = embeddings(grid), embeddings(other)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    close(found[np.isfinite(found)], expected[np.isfinite(expected)], tolerance)


def contents(grid):
    """The objects of a version, but for the item, which tells its successor."""
    paths = [path for path in storage_path(grid).parent.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths if path.name != "item.json"}


def storage_path(url):
    return Path(url.removeprefix("file://"))


def weights_of(text, index, encoder, lonlat):
    return weights(Head.parse(text), index, encoder.embed(lonlat), lonlat)


@pytest.mark.parametrize("heads", [(), ("nearest:4", "semantic:9")])
def test_heads_are_published_side_by_side(publish, home, before, heads):
    """By their formulas, from the projections that the grid has with it; left out, the heads are the database's."""
    grid = publish(before, PublishParams(step=10.0, tile_cells=8, heads=heads, compact_dims=5, location_dims=10))
    opened, arrays = xr.open_zarr(grid), images(np.arange(IMAGES))
    encoder, index = load_checkpoint(f"{home.as_uri()}/checkpoint").location, database(1000, DIM, VALUES)
    index = tuple(array[:IMAGES] for array in index)
    told = read_card(home_of(grid), GridCard).recipe.heads
    if not heads:
        found = {curve.kind: str(curve.chosen) for curve in curves(encoder.embed(index[2]), *index)}
        assert told == (found["semantic"], found["geodesic"])
    land = np.isfinite(opened.embedding.values[0])
    rows, columns = np.nonzero(land)
    lonlat = np.column_stack([opened.lon.values[columns], opened.lat.values[rows]])
    parts = {name: slice(*edges) for name, edges in opened.attrs["geoemb:blocks"].items()}
    scaled = (arrays["values"] - opened["mean"].values) @ opened.components.values
    for text in told:
        kind = text.partition(":")[0]
        found = opened.embedding.values[parts[kind]][:, land].T
        close(found, weights_of(text, index, encoder, lonlat) @ scaled, 1e-5, scale=np.abs(scaled).max())
        np.testing.assert_array_equal(opened.block.values[parts[kind]], kind)
    location = (encoder.embed(lonlat) - opened.location_mean.values) @ opened.location_components.values
    close(opened.embedding.values[parts["location"]][:, land].T, location, 1e-5)
    restored = (scaled @ opened.components.values.T) * opened.deviation.values**2 + opened["mean"].values
    assert np.corrcoef(restored.ravel(), arrays["values"].ravel())[0, 1] > 0.7  # 5 of 8 components


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"dtype": "float16", "evidence": True, "overviews": 1}, marks=pytest.mark.further)],
)
def test_a_grid_carries_a_block_of_another_encoder(publish, client, before, options):
    """After the grid's own blocks, which stay what they are; by the encoder itself at the cells' centres."""
    alone, grid = (publish(before, PublishParams(**STEP, **options, with_=names)) for names in ((), ("geoclip",)))
    opened, own = xr.open_zarr(grid), VALUES + DIM
    blocks = {"visual": [0, VALUES], "location": [VALUES, own], "geoclip": [own, own + 512]}
    assert opened.attrs["geoemb:blocks"] == blocks
    np.testing.assert_array_equal(opened.block.values[own:], "geoclip")
    found = embeddings(grid)
    np.testing.assert_array_equal(found[:own], embeddings(alone))
    rows, columns = np.nonzero(np.isfinite(found[0]))
    lonlat = np.column_stack([opened.lon.values[columns], opened.lat.values[rows]])
    close(found[own:, rows, columns].T, embed_geoclip(lonlat), 1e-5 if found.dtype == np.float32 else 1e-3)
    assert np.isnan(found[own:, np.isnan(found[0])]).all()
    card = read_card(home_of(grid), GridCard)
    assert (card.dims, card.made_of["with_"]) == (own + 512, ["geoclip"])
    assert "with_" not in read_card(home_of(alone), GridCard).made_of  # so that grids of before are found again
    assert sample_grid(grid, lonlat[:5], "nearest").shape == (5, own + 512)
    assert {f.check: f.passed for f in validate_grid(client, grid, card)}["other encoders"] is True
    page = (storage_path(grid).parent / "index.html").read_text()
    assert f"{own + 512}: visual {VALUES}, then location, geoclip" in page


def test_a_wrong_block_of_another_encoder_is_refused(publish, client, before):
    grid = publish(before, PublishParams(**STEP, with_=("geoclip",), north=0.0))
    card = read_card(home_of(grid), GridCard)
    for tile in land_tiles(card.recipe.params.spec):
        values = read_tile(grid, tile)
        values[VALUES + DIM :] = np.roll(values[VALUES + DIM :], 1, axis=0)
        write_tile(grid, tile, values)
    assert {f.check for f in validate_grid(client, grid, card) if f.passed is False} == {"other encoders"}


@pytest.mark.further
def test_an_update_carries_the_blocks_of_its_parent(publish, before, after):
    parent = publish(before, PublishParams(**STEP, keep_sums=True, with_=("geoclip",), north=0.0))
    child = publish(after, PublishParams(**STEP, parent=parent, north=0.0))
    same(child, publish(after, PublishParams(**STEP, with_=("geoclip",), north=0.0)))


def test_blocks_that_cannot_be_are_refused_before_work(publish, before, monkeypatch):
    for options, message in (
        (["--with", "satclip"], "--with 'satclip': Input should be 'geoclip'"),
        (["--with", "geoclip", "--with", "geoclip"], "give each block once"),
        (["--with", "geoclip", "--dtype", "int8"], "stored in float32 or float16: give no int8, or no with"),
    ):
        ran = CliRunner().invoke(app, ["publish", "checkpoint", before, *options])
        assert ran.exit_code
        assert message in str(ran.exception or ran.output)
    monkeypatch.setattr("tasks.grid.beside.WEIGHTS", "geoclip/gone")
    with pytest.raises(UserError, match="package geoclip, which has geoclip/gone, is not installed"):
        publish(before, PublishParams(**STEP, with_=("geoclip",), south=0.0))


FURTHER = [pytest.param(options, marks=pytest.mark.further) for options in ({"method": "range"}, {"beta": 1.0})]


@pytest.mark.parametrize("options", [{}, {"compact_dims": 3}, SIDE_BY_SIDE, *FURTHER])
def test_an_update_is_a_grid_made_anew(publish, before, after, products, options):
    params = PublishParams(**STEP | options, keep_sums=True)
    parent = publish(before, params)
    stored = contents(parent)
    cells = int(np.isfinite(embeddings(parent)[0]).sum())
    products.clear()
    child = publish(after, params.model_copy(update={"parent": parent}))
    assert sum(products) < cells * (2 * (12 + 3) + 20 + 3 + 0.02 * IMAGES)
    assert contents(parent) == stored
    assert child != parent
    products.clear()
    if "heads" in options:  # projections are of a database, so a child is in those of its parent
        found, whole = (embeddings(grid) for grid in (child, publish(after, params)))
        assert read_card(home_of(child), GridCard).recipe.heads == options["heads"]
        assert np.isfinite(found).sum() == np.isfinite(whole).sum()
    elif "compact_dims" in options:
        expected = publish(after, PublishParams(**STEP))
        projection = read_compact(parent).values
        visual = projection.apply(np.moveaxis(embeddings(expected)[:VALUES], 0, -1))
        found = np.moveaxis(embeddings(child)[:3], 0, -1)
        close(found[np.isfinite(found)], visual[np.isfinite(visual)], 1e-5)
        np.testing.assert_array_equal(read_compact(child).values.components, projection.components)
    else:
        same(child, publish(after, params))
        assert sum(products) == (cells + PROBED) * 408


def test_sums_serve_any_beta(publish, before, parent, products):
    child = publish(before, PublishParams(**STEP, beta=0.2, parent=parent))
    assert products == []
    same(child, publish(before, PublishParams(**STEP, beta=0.2)), 1e-6)


@pytest.mark.further
def test_an_update_has_the_components_of_its_parent(publish, parent, after):
    """So that a model that was fitted on the one holds for the other; their codes are of their own vectors."""
    grid = publish(after, KEEPS.model_copy(update={"parent": parent}))
    new, old = (xr.open_zarr(companion_url(url), zarr_format=3) for url in (grid, parent))
    for name in ("axes", "mean", "scale"):
        np.testing.assert_array_equal(new[name], old[name])
    exact = np.einsum("dyx,dc->cyx", embeddings(grid) - new["mean"].values[:, None, None], new.axes.values)
    away = np.abs((new.embedding * new.scale).values - exact) / new.scale.values[:, None, None]
    assert np.nanquantile(away, 0.99) < 0.501
    assert not np.array_equal(new.embedding, old.embedding, equal_nan=True)


@pytest.mark.further
def test_updates_of_updates_stay_exact(home, publish, parent):
    """Images go until, for many cells, nearly all the weight has gone; then they come back."""
    grid = parent
    for i, rows in enumerate([np.arange(100, IMAGES), np.arange(210, IMAGES), np.arange(300, IMAGES)]):
        url = store(home, f"fewer{i}", images(rows))
        grid = publish(url, KEEPS.model_copy(update={"parent": grid}))
    same(grid, publish(url, PublishParams(**STEP)))
    for i, rows in enumerate([np.arange(240, IMAGES), np.arange(IMAGES)]):
        url = store(home, f"more{i}", images(rows))
        if i == 0:
            grid = publish(url, KEEPS.model_copy(update={"parent": grid}))
    same(grid, publish(f"{home.as_uri()}/more0", PublishParams(**STEP)))


def test_an_interrupted_update_goes_on(publish, parent, after, monkeypatch):
    """Sums of a tile are there before its mark, and what is there already is not made again."""
    whole = publish(after, KEEPS.model_copy(update={"parent": parent}))
    expected = contents(whole)
    (storage_path(whole).parent / "card.json").unlink()
    shard = sorted((storage_path(whole) / "embedding/c/0/1").iterdir())[0]
    shard.unlink()
    calls = []
    real = updates.deliver
    monkeypatch.setattr(updates, "deliver", lambda *a: (calls.append(a[1]), real(*a))[1])
    assert publish(after, KEEPS.model_copy(update={"parent": parent})) == whole
    assert len(calls) == 1
    assert contents(whole).keys() == expected.keys()
    same(whole, publish(after, PublishParams(**STEP)))


def test_kept_sums_leave_the_grid_as_it_is(publish, before, parent):
    same(parent, publish(before, PublishParams(**STEP)), 1e-6)
    sums = xr.open_zarr(parent.replace("grid.zarr", "sums.zarr")).sums
    assert sums.shape == (2 * (VALUES + 2), 18, 36)
    assert read_card(parent.removesuffix("/grid.zarr"), GridCard).sums["geodesic_temperature"] == 40


def test_a_compact_grid_leads_back_to_the_values(publish, before):
    compact = xr.open_zarr(publish(before, PublishParams(**STEP, compact_dims=5)))
    whole = xr.open_zarr(publish(before, PublishParams(**STEP)))
    assert compact.attrs["geoemb:blocks"] == {"visual": [0, 5], "location": [5, 5 + DIM]}
    pca = PCA(5).fit(images(np.arange(IMAGES))["values"].astype(np.float64))
    assert compact.attrs["rangegrid:explained_variance"] == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-5)
    visual = whole.embedding[:VALUES].transpose("lat", "lon", "embedding_dim").values
    land = np.isfinite(visual[..., 0])
    expected = pca.inverse_transform(pca.transform(visual[land]))
    found = compact.embedding[:5].values[:, land].T @ compact.components.values.T + compact["mean"].values
    close(found, expected, 1e-5)


def test_the_database_is_loaded_once_per_process(publish, home, monkeypatch):
    """Two threads make 20 tiles and more from one copy."""
    url = store(home, "counted", images(np.arange(50)))
    loads = []
    real = tiles_module.open_database
    monkeypatch.setattr(tiles_module, "open_database", lambda url: (loads.append(url), real(url))[1])
    publish(url, PublishParams(**STEP))
    assert loads == [url]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "range"}, "semantic_temperature 12.0 and not 15.0"),
        ({"beta": 1.0}, "geodesic_temperature 40.0 and not None"),
        ({"tile_cells": 6}, "tile_cells 8 and not 6"),
        ({"compact_dims": 2}, "compact_dims None and not 2"),
        ({"crs": "OGC:CRS84"}, "crs EPSG:4326 and not OGC:CRS84"),
    ],
)
def test_a_parent_of_another_kind_is_refused(publish, parent, before, params, message):
    with pytest.raises(UserError, match=message):
        publish(before, PublishParams(**STEP | params, parent=parent))


def test_a_child_takes_the_tiles_of_its_parent(publish, parent, after):
    child = publish(after, PublishParams(step=10.0, method="range+", keep_sums=True, parent=parent))
    assert read_card(home_of(child), GridCard).made_of["tile_cells"] == STEP["tile_cells"]


def test_parents_that_cannot_be_are_refused(publish, home, parent, before):
    with pytest.raises(UserError, match="there is no finished grid at"):
        publish(before, PublishParams(**STEP, parent=f"{home.as_uri()}/nothing/grid.zarr"))
    with pytest.raises(UserError, match="kept no sums: publish it with --keep-sums true"):
        publish(before, PublishParams(**STEP, parent=publish(before, PublishParams(**STEP))))
    with pytest.raises(UserError, match=r"of the 300 images .* 300 came and 400 went .* Publish without --parent"):
        publish(store(home, "other", images(np.arange(500, 800))), PublishParams(**STEP, parent=parent))
    with pytest.raises(ValueError, match="without a tolerance"):
        PublishParams(tolerance=0.1, keep_sums=True)
    there = set(storage.paths(f"{home.as_uri()}/grids"))
    with pytest.raises(UserError, match="values have 8 components"):
        publish(before, PublishParams(**STEP, compact_dims=9))
    assert set(storage.paths(f"{home.as_uri()}/grids")) == there, "refused after work had begun"


def test_a_parent_whose_database_has_changed_is_refused(publish, home):
    url = store(home, "rewritten", images(np.arange(40)))
    parent = publish(url, KEEPS)
    storage.delete(url)
    with pytest.raises(UserError, match="there is no finished database"):
        publish(store(home, "next", images(np.arange(41))), PublishParams(**STEP, parent=parent))


def test_images_are_known_by_row_place_and_content(home):
    rows = np.arange(60)
    old = store(home, "old", images(rows))
    arrays = images(rows[::-1], changed=(7,))
    arrays["keys"] *= 1 + 1e-7 * np.random.default_rng(0).normal(size=arrays["keys"].shape).astype("f4")
    arrays["locations"][59 - 8] += 1
    arrays["row_ids"][59 - 9] = 999
    new = store(home, "new", arrays)
    found = updates.changes(old, new)
    assert found.removed == [7, 8, 9]
    assert found.added == [59 - 9, 59 - 8, 59 - 7]


def test_the_same_image_many_times_is_counted(home):
    """Imported databases have no row ids; a place may have many images."""
    arrays = images(np.zeros(5, int))
    arrays["row_ids"][:] = -1
    old = store(home, "five", arrays)
    new = store(home, "three", {name: array[:3] for name, array in arrays.items()})
    assert (updates.changes(old, new).added, updates.changes(old, new).removed) == ([], [3, 4])
    assert (updates.changes(new, old).added, updates.changes(new, old).removed) == ([3, 4], [])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_fewer_bits_tell_what_they_lost(publish, before, parent, dtype):
    """Every cell of the grid, not the sample alone, is as near to float32 as the attributes say."""
    grid = xr.open_zarr(publish(before, PublishParams(**STEP, dtype=dtype)))
    names = ["embedding"] if dtype == "float16" else ["visual", "location"]
    found = np.concatenate([grid[name].values for name in names])
    exact = embeddings(parent)
    land = np.isfinite(exact[0])
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(exact))
    a, b = found[:, land], exact[:, land]
    cosines = (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
    told = grid.attrs["rangegrid:loss"]
    assert told["dtype"] == grid.attrs["geoemb:data_type"] == dtype
    assert cosines.min() > told["cosine_min"] - 2e-3
    assert told["location"]["cosine_min"] > 0.99
    assert told["latitude_probe_r2"].keys() == {"float32", "stored"}


def test_evidence_is_that_of_the_cells(publish, home, before):
    grid = xr.open_zarr(publish(before, PublishParams(**STEP, evidence=True)))
    lat, lon = (int(i[0]) for i in np.nonzero(np.isfinite(grid.distance_km.values)))
    place = np.array([[float(grid.lon[lon]), float(grid.lat[lat])]])
    encoder, index = tiles_module.load(f"{home.as_uri()}/checkpoint", before)
    expected = evidence(index, encoder.embed(place), place, Method("range+", 0.5))
    cell = grid.isel(lat=lat, lon=lon)
    np.testing.assert_allclose(cell.distance_km, expected.distance_km[0], rtol=1e-6)
    np.testing.assert_allclose(cell.effective_images, expected.images[0], rtol=1e-4)
    np.testing.assert_allclose(cell.largest_weight, expected.largest[0], rtol=1e-4)
    np.testing.assert_array_equal(np.isfinite(grid.distance_km), np.isfinite(grid.embedding[0]))


def test_a_grid_finer_than_its_field_says_so(publish, home, before):
    told = xr.open_zarr(publish(before, PublishParams(**STEP))).attrs["rangegrid:field"]
    assert told["cell_km"] in told["distances_km"]
    assert "warning" not in told
    assert 0 < told["location_change"][0] < told["location_change"][-1]
    job = Job(
        home="",
        checkpoint=f"{home.as_uri()}/checkpoint",
        database=before,
        params=PublishParams(step=0.01, method="range+"),
    )
    fine = survey(job, "float32", Compact()).attrs["rangegrid:field"]
    assert fine["warning"].startswith("finer than the field: over one cell (1.1 km)")


@pytest.mark.parametrize(
    ("method", "parts"),
    [({}, ["visual", "location"]), (SIDE_BY_SIDE, ["semantic", "geodesic:40", "geodesic:2000", "location"])],
)
def test_a_grid_tells_its_effective_resolution_wherever_it_is_looked_for(publish, before, method, parts):
    """Read off the curve of the whole, in which each part counts alike: in card, item, page and list."""
    grid = publish(before, PublishParams(**STEP | method))
    told = xr.open_zarr(grid).attrs["rangegrid:field"]
    curves = np.array([told[f"{part}_change"] for part in parts])
    np.testing.assert_allclose(told["whole_change"], curves.mean(0), atol=2e-5)
    expected = np.exp(np.interp(0.5, told["whole_change"], np.log(told["distances_km"])))
    assert told["whole_half_km"] == pytest.approx(expected, abs=0.1)
    low, high = told["whole_interval_km"]
    assert low < told["whole_half_km"] < high
    assert read_card(home_of(grid), GridCard).resolution_km == told["whole_half_km"]
    assert (
        storage.read_json(f"{home_of(grid)}/item.json")["properties"]["rangegrid:resolution_km"]
        == told["whole_half_km"]
    )
    assert f"{told['whole_half_km']} km ({low} to {high})" in storage.read(f"{home_of(grid)}/index.html").decode()
    listed = json.loads(CliRunner().invoke(app, ["grid", "list", "--json"], catch_exceptions=False).stdout)
    assert {row["grid"]: row["resolution_km"] for row in listed}[grid] == told["whole_half_km"]


def test_grids_of_before_keep_their_rule_of_land(client, publish, before, after):
    """Their cards tell of none: cells whose centre is on land; so they are found, validated and updated."""
    grid = publish(before, KEEPS.model_copy(update={"land": "centre"}))
    card = read_card(home_of(grid), GridCard)
    assert "land" not in card.made_of | card.sums
    stored = xr.open_zarr(grid)
    centres = is_land(np.stack(np.meshgrid(stored.lon, stored.lat), axis=-1))
    np.testing.assert_array_equal(np.isfinite(embeddings(grid)[0]), centres)
    assert all(finding.passed is not False for finding in validate_grid(client, grid, card))
    child = publish(after, KEEPS.model_copy(update={"parent": grid}))
    np.testing.assert_array_equal(np.isfinite(embeddings(child)[0]), centres)
    with pytest.raises(UserError, match="land None and not any"):
        publish(after, KEEPS.model_copy(update={"parent": grid, "land": "any"}))


def test_no_town_by_the_sea_is_without_a_vector(publish, before):
    """Of the cities of the Caribbean by GeoNames, half a degree: by the centres of cells 20 % had none."""
    box = {"step": 0.5, "west": -90, "south": 8, "east": -58, "north": 28, "tile_cells": 20}
    lonlat, country = cities()
    west, south, east, north = (box[edge] for edge in ("west", "south", "east", "north"))
    inside = (lonlat > (west, south)).all(1) & (lonlat < (east, north)).all(1)
    found = sample_grid(publish(before, PublishParams(**box)), lonlat[inside])
    assert inside.sum() > 800
    assert np.isfinite(found).all()
    assert len({*country[inside]}) > 30


def test_what_a_dimension_lost_is_told_and_warned_of(client, publish, home, caplog):
    """Compact int8 has one scale for components of unlike deviations: the least is lost, whatever the cosine says."""
    arrays = images(np.arange(200))
    arrays["values"] = arrays["values"] * np.array([10, 8, 5, 2, 1, 0.3, 0.05, 0.01], np.float32)
    url = store(home, "unlike", arrays)
    grid = publish(url, PublishParams(**STEP, dtype="int8", compact_dims=8))
    exact = np.moveaxis(embeddings(publish(url, PublishParams(**STEP, compact_dims=8))), 0, -1)
    card = read_card(home_of(grid), GridCard)
    lost = card.loss
    assert lost["cosine_mean"] > 0.999
    assert "visual dimensions lose more than 10% of their deviation" in lost["warning"]
    assert lost["warning"] in caplog.text
    assert f"scores {lost['latitude_probe_r2']['float32']} in float32" in caplog.text
    assert lost["warning"] in storage.read(storage.join(home_of(grid), "loss.md")).decode()
    stored = np.moveaxis(xr.open_zarr(grid).visual.values, 0, -1)
    land = np.isfinite(stored[..., 0])
    difference = stored[land] - exact[land][:, :8]
    measured = np.sqrt((difference.astype("f8") ** 2).mean(0)) / exact[land][:, :8].std(0, dtype="f8")
    assert lost["visual"]["worst"] == measured.argmax() == 7
    np.testing.assert_array_equal(np.array(lost["visual"]["lost"]) > 0.1, measured > 0.1)
    found = {f.check: f for f in validate_grid(client, grid, card)}
    assert found["stored as int8"].passed is None
    assert "loss" not in read_card(home_of(publish(url, PublishParams(**STEP))), GridCard).stored()


def test_pictures_are_drawn_once_after_the_card_from_a_bounded_number_of_cells(publish, before, monkeypatch):
    """Here at most 100 of 648 cells, and never the grid as a whole; a rerun draws nothing."""
    monkeypatch.setattr(previews, "MOST_DRAWN", 100)
    drawn, order = [], []
    real = previews.principal_colours
    monkeypatch.setattr(previews, "principal_colours", lambda seen, *at: (drawn.append(seen.shape), real(seen, *at))[1])
    keep = storage.write
    monkeypatch.setattr(storage, "write", lambda url, data: (order.append(url.rpartition("/")[2]), keep(url, data))[1])
    params = PublishParams(**STEP, beta=0.7, evidence=True)
    grid = publish(before, params)
    ((_, rows, columns),) = drawn
    assert rows * columns <= 100
    assert order.index("card.json") < order.index("world.png") < order.index("world.tif") < order.index("evidence.png")
    with rasterio.open(storage_path(home_of(grid)) / "world.tif") as file:
        assert file.shape == (rows, columns)
        assert tuple(file.bounds) == (-180, -90, 180, 90)
        colours, there = file.read((1, 2, 3)), file.read(4) > 0
    assert there.any()
    assert colours[:, there].max(0).min() > 80  # of 255: no land is black
    assert publish(before, params) == grid
    assert len(drawn) == 1
    storage.delete(storage.join(home_of(grid), "world.tif"))
    publish(before, params)
    assert len(drawn) == 2


def test_the_spectrum_is_made_once_per_process(publish, home, monkeypatch):
    """Two threads of one process share it."""
    url = store(home, "spectral", images(np.arange(60)))
    made, real = [], retrieval.Spectrum.of
    monkeypatch.setattr(retrieval, "pays", lambda *_: True)
    monkeypatch.setattr(retrieval.Spectrum, "of", lambda *call: (made.append(call), real(*call))[1])
    publish(url, PublishParams(**STEP))
    assert len(made) == 1
