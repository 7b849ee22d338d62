"""Joined databases: what they hold, how much each image counts, and where it came from."""

import itertools
import json
import tracemalloc
from datetime import UTC, datetime

import numpy as np
import pytest
import xarray as xr
import zarr
from typer.testing import CliRunner

from flows.cli import app
from infra import storage
from infra.errors import UserError
from tasks.cards import read_card, write_card
from tasks.core.earth.density import land_shares
from tasks.core.earth.land import mask
from tasks.core.earth.sampling import draw_even, draw_land
from tasks.core.earth.sphere import unit_vectors
from tasks.core.encoders.location import LocationEncoder
from tasks.database import join as join_module
from tasks.database.audit import audit_database
from tasks.database.join import join_databases
from tasks.database.npz import export_npz, import_npz
from tasks.database.store import create_database, finish_database, open_database, write_rows
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tasks.newest import resolve
from tasks.params import JoinParams, PublishParams
from tasks.products import CheckpointCard, DatabaseCard, PatchesCard
from tasks.publish import publish_grid
from tasks.release.inventory import products
from tasks.tables.regions import card_of, find_region, keep_region
from tests.core.test_retrieval import close, softmax

DIM, VALUES = 8, 4
BAND = (0.0, 20.0)  # the region that is sampled more densely


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    save_checkpoint(f"{tmp_path.as_uri()}/space", LocationEncoder(4, hidden=8, dim=DIM))  # no heads are measured by it
    return tmp_path.as_uri()


def encoded(lonlat, scene=0):
    """Keys and values that belong to a place and a scene, and to no other."""
    seeds = np.random.default_rng(3).normal(size=(3, DIM + VALUES))
    raw = np.sin(np.column_stack([lonlat, np.full(len(lonlat), 1 + scene)]) @ seeds * 5)
    keys = raw[:, :DIM] / np.linalg.norm(raw[:, :DIM], axis=1, keepdims=True)
    return keys.astype("f4"), raw[:, DIM:].astype("f4")


def sampled(
    home, name, lonlat, south=-80.0, north=84.0, places="even", scene=0, rows=64, patches=True, region=None, **told
):
    """A database of places, and the card of the patches that it was made of."""
    url, count = f"{home}/databases/{name}", len(lonlat)
    if patches:
        design = {"places": places, "south": south, "north": north, "patches": count, "datetime": "2021"}
        card = PatchesCard(fingerprint=f"patches-{name}", made_of=design, attribution="nobody", **card_of(region))
        write_card(f"{home}/patches/patches-{name}", card)
        told["patches"] = f"patches-{name}"
    keys, values = encoded(lonlat, scene)
    create_database(url, count, DIM, VALUES, rows)
    arrays = {"keys": keys, "values": values, "locations": lonlat, "row_ids": np.arange(count)}
    for start in range(0, count, rows):
        write_rows(url, start, {name: array[start : start + rows] for name, array in arrays.items()})
    space = read_card(f"{home}/space", CheckpointCard).fingerprint
    finish_database(url, **({"checkpoint": space, "fingerprint": name, "attribution": "nobody"} | told))
    return url


@pytest.fixture
def world(home):
    return sampled(home, "world", draw_even(400, 0))


@pytest.fixture
def region(home):
    """With the world's seed, so that it has the world's places there too."""
    return sampled(home, "region", draw_even(500, 0, *BAND), *BAND)


def within(lonlat, band=BAND):
    return (lonlat[:, 1] >= band[0]) & (lonlat[:, 1] <= band[1])


def land(south, north):
    """Area of the mask's land between two latitudes on whole degrees, by another formula: thin strips."""
    lat = (np.arange(2160) + 0.5) / 12 - 90
    rows = (lat > south) & (lat < north)
    return (mask()[rows].sum(1) * np.cos(np.radians(lat[rows]))).sum() * (6371.0088 * np.pi / 180 / 12) ** 2


def test_a_dense_region_has_its_share_of_land(home, world, region):
    data = open_database(join_databases([world, region]))
    inside = within(data.locations)
    assert (data.weights[~inside] == 1).all()
    share = land(*BAND) / land(-80, 84)
    assert np.ptp(data.weights[inside]) == 0
    np.testing.assert_allclose(data.weights[inside].sum() / 400, share, rtol=0.02)
    assert len(data.keys) == 400 + 500 - within(open_database(world).locations).sum()  # the world's are the region's


def test_a_country_has_its_share_of_land(home, world):
    """By polygons: the images of Brazil count as Brazil's part of the world's land, by its area in an atlas."""
    brazil = find_region(("BR",))
    dense = sampled(home, "brazil", draw_even(300, 0, region=brazil), region=brazil)
    data = open_database(join_databases([world, dense]))
    inside = brazil.holds(data.locations)
    assert (inside.sum(), np.ptp(data.weights[inside])) == (300, 0)  # the world's places there are among them
    assert (data.weights[~inside] == 1).all()
    np.testing.assert_allclose(data.weights[inside].sum() / 400, 8.4e6 / land(-80, 84), rtol=0.03)


def test_a_region_counts_by_all_its_polygons(home, world):
    """Of which a card shows a simpler shape; where the file beside the patches is gone, by that shape."""
    brazil, simpler = find_region(("BR",)), find_region(("-74 -34 -34 5",))
    dense = sampled(home, "brazil", draw_even(300, 0, region=brazil), region=simpler)
    keep_region(f"{home}/patches/patches-brazil", brazil)
    data = open_database(join_databases([world, dense]))
    inside = brazil.holds(data.locations)
    assert (data.weights[~inside] == 1).all()
    np.testing.assert_allclose(data.weights[inside].sum() / 400, 8.4e6 / land(-80, 84), rtol=0.03)
    assert data.card.origins[1].land_km2 == pytest.approx(8.4e6, rel=0.02)


def test_samples_that_share_no_image_add_their_densities(home, world):
    other = sampled(home, "other", draw_land(500, 7, *BAND), *BAND, places="area")
    data = open_database(join_databases([world, other]))
    inside, theirs = within(data.locations), 500 / land(*BAND)
    ours = 400 / land(-80, 84)
    assert len(data.keys) == 900
    np.testing.assert_allclose(data.weights[inside], ours / (ours + theirs), rtol=1e-3)
    assert (data.weights[~inside] == 1).all()


@pytest.mark.further
def test_the_order_decides_nothing_but_rows(home, world, region):
    third = sampled(home, "third", draw_even(300, 5, 10, 40), 10.0, 40.0)
    found = []
    for order in itertools.permutations([world, region, third]):
        data = open_database(join_databases(list(order)))
        rows = np.lexsort(data.locations.T)
        found.append(np.column_stack([data.locations, data.keys, data.values, data.weights])[rows])
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], rtol=1e-12)


def test_joined_ones_are_joined_as_all_at_once(home, world, region):
    third = sampled(home, "third", draw_even(300, 0, 10, 40), 10.0, 40.0)  # the same sequence: nested in places
    once = open_database(join_databases([world, region, third]))
    pair = join_databases([world, region])
    for urls in ([pair, third], [third, pair], [pair, join_databases([region, third])]):
        again = open_database(join_databases(urls))
        rows, ours = np.lexsort(again.locations.T), np.lexsort(once.locations.T)
        np.testing.assert_allclose(again.locations[rows], once.locations[ours])
        np.testing.assert_allclose(again.weights[rows], once.weights[ours], rtol=1e-12)
        assert {origin.database for origin in again.card.origins} == {"world", "region", "third"}


def test_every_image_tells_where_it_came_from(home, world, region):
    third = sampled(home, "third", draw_even(300, 0, 10, 40), 10.0, 40.0)
    url = join_databases([third, join_databases([world, region], JoinParams(shard_rows=100))])
    data, stored = open_database(url), zarr.open_group(storage.zarr_store(f"{url}/database.zarr"), mode="r")
    origins, rows, held_by = (stored[name][:] for name in ("origins", "origin_rows", "held_by"))
    names = [origin.database for origin in data.card.origins]
    leaves = {name: open_database(f"{home}/databases/{name}") for name in names}
    for i, name in enumerate(names):
        own = origins == i
        for array in ("keys", "values", "locations", "row_ids"):
            np.testing.assert_array_equal(getattr(data, array)[own], getattr(leaves[name], array)[rows[own]])
        has = (data.locations[:, None] == leaves[name].locations).all(2).any(1)
        np.testing.assert_array_equal((held_by >> i) & 1, has)
    assert read_card(url, DatabaseCard).origins[names.index("world")].patches == "patches-world"


def test_only_images_of_one_place_and_scene_are_the_same(home, world):
    places = open_database(world).locations
    later = sampled(home, "later", np.concatenate([places[:30], places[30:60] + 1e-3]), scene=1)
    again = sampled(home, "again", np.concatenate([places[:50], places[50:90] + 1e-3]))
    assert len(open_database(join_databases([world, later])).keys) == 400 + 60
    assert len(open_database(join_databases([world, again])).keys) == 400 + 40


def test_no_place_is_counted_twice_across_180_degrees(home):
    west = sampled(home, "west", np.array([[-180.0, 10.0], [5.0, 5.0]]))
    keys, values = encoded(np.array([[-180.0, 10.0]]))
    east = f"{home}/databases/east"
    create_database(east, 1, DIM, VALUES, 4)
    arrays = {"keys": keys, "values": values, "locations": np.array([[180.0, 10.0]]), "row_ids": np.zeros(1, int)}
    write_rows(east, 0, arrays)
    space = read_card(west, DatabaseCard).checkpoint
    finish_database(east, checkpoint=space, fingerprint="east")
    assert len(open_database(join_databases([west, east], JoinParams(weights="estimated"))).keys) == 2


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"checkpoint": "another"}, "has the checkpoint another and .* only databases of one checkpoint"),
        ({"values": {"encoder": {"name": "satmae"}}}, "has the values' encoder satmae and .*unknown"),
        ({"encoder": {"name": "vit"}}, "has the keys' encoder vit"),
    ],
)
def test_what_does_not_belong_together_is_refused(home, world, told, says):
    other = sampled(home, "other", draw_even(30, 3), **told)
    with pytest.raises(UserError, match=says):
        join_databases([world, other])


def test_values_of_encoders_that_were_fitted_to_their_samples_are_refused(home, world):
    """Both are `rcf`, of other weights."""
    told = {name: {"encoder": {"name": "rcf"}, "features": f"{home}/features/{name}"} for name in ("one", "two")}
    urls = [sampled(home, name, draw_even(30, i), values=told[name]) for i, name in enumerate(told)]
    for name in told:
        storage.write(f"{home}/features/{name}/encoder.safetensors", name.encode())
    with pytest.raises(UserError, match="values by the encoder"):
        join_databases(urls)
    storage.write(f"{home}/features/two/encoder.safetensors", b"one")
    assert open_database(join_databases(urls)).card.images == 60


@pytest.mark.parametrize("how", [{"patches": False}, {"places": "class"}, {"places": "list"}, {"places": "tile"}])
def test_a_sample_without_a_design_is_refused_or_estimated(home, world, how):
    other = sampled(home, "other", draw_even(600, 3, *BAND), **how)
    with pytest.raises(UserError, match=r"the database other does not tell how densely .* --weights estimated"):
        join_databases([world, other])
    data = open_database(join_databases([world, other], JoinParams(weights="estimated")))
    inside = within(data.locations, (2, 18))
    assert data.weights[inside].sum() / data.weights.sum() == pytest.approx(land(2, 18) / land(-90, 84), rel=0.2)


def test_land_is_estimated_to_the_error_of_its_neighbours():
    """A dense box of even places within the world's: the mean of each stands for the land of its places."""
    world, dense = draw_even(3000, 0), draw_even(60_000, 0, 0, 10)
    dense = dense[(dense[:, 0] > 15) & (dense[:, 0] < 35)]  # 7.2 % of that land lie there
    shares = land_shares(np.concatenate([world, dense]))
    inside = (dense[:, 0] > 16) & (dense[:, 0] < 34) & (dense[:, 1] > 1) & (dense[:, 1] < 9)
    far = np.abs(world[:, 1]) > 25
    expected = (land(0, 10) / 60_000) / (land(-80, 84) / 3000)
    assert shares[3000:][inside].mean() / shares[:3000][far].mean() == pytest.approx(expected, rel=0.1)
    assert shares.mean() == pytest.approx(1)


def test_one_database_alone_can_be_estimated(home, world):
    with pytest.raises(UserError, match="give two or more databases, each once"):
        join_databases([world])
    with pytest.raises(UserError, match="each once"):
        join_databases([world, world])
    again = open_database(join_databases([world], JoinParams(weights="estimated")))
    assert 0.1 < again.weights.std() / again.weights.mean() < 0.5


def test_weights_survive_the_published_layout(home, world, region, tmp_path):
    url = join_databases([world, region])
    export_npz(url, tmp_path / "db.npz")
    import_npz(tmp_path / "db.npz", f"{home}/databases/back", f"{home}/space")
    back, data = open_database(f"{home}/databases/back"), open_database(url)
    np.testing.assert_array_equal(back.weights, data.weights)
    with np.load(tmp_path / "db.npz") as file:
        np.savez(tmp_path / "bad.npz", **{**file, "weights": np.where(np.arange(len(data.keys)) == 7, 0, 1.0)})
    with pytest.raises(UserError, match=r"1 weights that are not above 0 \(first in row 7\)"):
        import_npz(tmp_path / "bad.npz", f"{home}/databases/bad", f"{home}/space")


def test_an_interrupted_join_goes_on(home, world, region, monkeypatch):
    made, real = [], join_module.write_rows

    def broken(url, start, rows):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(start)
        real(url, start, rows)

    monkeypatch.setattr(join_module, "write_rows", broken)
    params = JoinParams(shard_rows=100)
    with pytest.raises(KeyboardInterrupt):
        join_databases([world, region], params)
    made.clear()
    monkeypatch.setattr(join_module, "write_rows", lambda *call: (made.append(call[1]), real(*call)))
    url = join_databases([world, region], params)
    assert made
    assert min(made) == 300
    whole = open_database(join_databases([world, region], JoinParams(shard_rows=128)))
    for name in ("keys", "values", "locations", "row_ids", "weights"):
        np.testing.assert_array_equal(getattr(open_database(url), name), getattr(whole, name))


@pytest.mark.parametrize("method", [pytest.param("range+", marks=pytest.mark.further), "multi-head"])
def test_a_grid_of_the_world_becomes_one_of_both_by_its_sums(home, world, client, method):
    """Against the formulas in float64; images of the region that the world has too count less than before."""
    region = sampled(home, "region", draw_even(150, 0, *BAND), *BAND)  # fewer came and went than there are
    heads = {"heads": ("semantic:12", "geodesic:200"), "compact_dims": 3, "location_dims": 8}
    params = PublishParams(step=10.0, tile_cells=8, method=method, keep_sums=True, **heads if "multi" in method else {})
    space = f"{home}/space"
    parent, url = publish_grid(client, space, world, params), join_databases([world, region])
    child = xr.open_zarr(publish_grid(client, space, url, params.model_copy(update={"parent": parent})))
    assert child.attrs["rangegrid:datetime"] == "2021"
    land = np.isfinite(child.embedding.values[0])
    row, column = np.nonzero(land)
    lonlat = np.column_stack([child.lon.values[column], child.lat.values[row]])
    data, log_w = open_database(url), np.log(open_database(url).weights)
    queries, values = load_checkpoint(space).location.embed(lonlat).astype("f8"), data.values.astype("f8")
    near = unit_vectors(lonlat) @ unit_vectors(data.locations).T
    semantic, geodesic = (softmax(z + log_w) for z in (12 * queries @ data.keys.T, (40, 200)["multi" in method] * near))
    if method == "range+":
        expected = 0.5 * (semantic + geodesic) @ values
        again = xr.open_zarr(publish_grid(client, space, url, params)).embedding.values[:, land]
        close(child.embedding.values[:, land], again, 1e-6)
    else:
        values = (values - child["mean"].values) @ child.components.values
        expected = np.concatenate([semantic @ values, geodesic @ values], axis=1)
    width = expected.shape[1]
    close(child.embedding.values[:width, land].T, expected, 1e-6, scale=np.abs(values).max())


@pytest.mark.further
def test_memory_does_not_grow_with_the_rows_bytes(home, monkeypatch):
    """Twice the rows, of 2 kB each: what grows is what is held of each place, not its key and value."""
    storage.delete(f"{home}/checkpoints/space/card.json")  # so that no heads are measured
    peaks = {}
    for count in (15_000, 30_000):
        urls = [wide(home, f"{name}{count}", draw_even(count // 2, i)) for i, name in enumerate(("one", "two"))]
        tracemalloc.start()
        join_databases(urls)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[30_000] - peaks[15_000] < 0.25 * 15_000 * 2048


def wide(home, name, lonlat, rows=1024):
    url, count = f"{home}/databases/{name}", len(lonlat)
    card = PatchesCard(fingerprint=f"patches-{name}", made_of={"places": "area", "south": -80, "north": 84})
    write_card(f"{home}/patches/patches-{name}", card)
    create_database(url, count, 256, 256, rows)
    rng = np.random.default_rng(len(lonlat))
    for start in range(0, count, rows):
        size = min(rows, count - start)
        keys, values = rng.normal(size=(2, size, 256)).astype("f4")
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        ids = np.arange(start, start + size)
        write_rows(url, start, {"keys": keys, "values": values, "locations": lonlat[ids], "row_ids": ids})
    finish_database(url, checkpoint="space", fingerprint=name, patches=f"patches-{name}")
    return url


def test_a_joined_database_is_audited_by_statistics(home, world, region):
    url = join_databases([world, region])
    assert {finding.check: finding.passed for finding in audit_database(url)}["numbers"]
    with pytest.raises(UserError, match="is joined of world, region: audit each of these with its own patches"):
        audit_database(url, f"{home}/patches/patches-world", f"{home}/space")


def test_the_newest_database_of_a_line_is_joined(home, world):
    newer = sampled(home, "newer", draw_even(30, 3), line="kenya")
    found = resolve({"databases": [world, "newest:kenya"], "params": JoinParams()}, datetime.now(UTC))
    assert found["databases"] == [world, newer]


def test_the_command_joins_and_ls_knows_the_parents(home, world, region):
    save_checkpoint(f"{home}/checkpoints/space", load_checkpoint(f"{home}/space").location)
    result = CliRunner().invoke(app, ["database", "join", world, region, "--line", "dense"], catch_exceptions=False)
    url = result.stdout.strip().splitlines()[-1]
    card = read_card(url, DatabaseCard)
    assert (card.line, card.attribution, card.weighted) == ("dense", "nobody", True)
    assert card.heads is None or {c["kind"] for c in card.heads} == {"semantic", "geodesic", "nearest"}
    assert card.heads is not None
    found = products()["databases/" + url.rpartition("/")[2]]
    assert {"databases/world", "databases/region", "patches/patches-region"} <= set(found.made_of)
    assert json.loads(json.dumps(card.stored()))["origins"][1]["north"] == BAND[1]
