"""Validation: a good grid passes, and every fault that can be put into one is found, and keeps it from readers."""

import numpy as np
import pytest
import xarray as xr
import zarr

from infra import storage
from infra.errors import UserError
from tasks.cards import home_of, read_card
from tasks.core.compact import Compact
from tasks.core.earth.grid import GridSpec
from tasks.core.earth.sphere import unit_vectors
from tasks.core.retrieval import Method
from tasks.database.store import read_rows
from tasks.grid import store
from tasks.grid.tiles import land_tiles
from tasks.params import PublishParams
from tasks.products import GridCard
from tasks.publish import publish_grid
from tasks.release import validation, versions
from tests.core.test_heads import HEADS, weights
from tests.core.test_retrieval import brute_force
from tests.tasks.test_publish import DIM, VALUES, inputs

STEP = {"step": 10.0, "tile_cells": 8, "method": "range+"}
SPEC = GridSpec(10.0, 5)


@pytest.fixture(scope="module")
def made(client, tmp_path_factory):
    """A checkpoint and a database of 300 images, and a function that publishes their grid."""
    with inputs(tmp_path_factory.mktemp("validation")) as (checkpoint, database):
        yield lambda **params: publish_grid(client, checkpoint, database, PublishParams(**STEP | params))


@pytest.fixture(scope="module")
def good(made):
    """A good grid."""
    return made()


@pytest.fixture
def copy(good, tmp_path):
    """A copy of the good grid under its own name, to spoil."""
    home = (tmp_path / versions.name_of(good)).as_uri()
    storage.copy(home_of(good), home)
    return storage.join(home, "grid.zarr")


@pytest.fixture
def findings(client):
    """A function that validates a grid; its findings by check."""

    def found(grid):
        listed = validation.validate_grid(client, grid, read_card(home_of(grid), GridCard))
        return {finding.check: finding for finding in listed}

    return found


def failed(found):
    return {name for name, finding in found.items() if finding.passed is False}


@pytest.mark.parametrize(
    "params",
    [{}, {"method": "range"}, {"beta": 0.2, "compact_dims": 3}, {"tolerance": 0.01, "tile_cells": 18}],
    ids=["range+", "range", "compact", "interpolated"],
)
def test_a_good_grid_passes_and_becomes_the_latest(made, findings, params):
    grid = made(**params)
    found = findings(grid)
    assert not failed(found), found
    assert all(finding.passed for finding in found.values())
    assert versions.read_pointer(versions.read_line(grid))[0].grid == grid


def test_a_version_of_before_the_boxes_is_the_globe_with_its_own_step():
    params = GridCard(made_of={"step_degrees": 2.0, "tile_cells": 60, "parent": None}).recipe.params
    assert params.spec == GridSpec(2.0, 60, land="centre")


def test_a_grid_may_wait_for_its_promotion(made):
    first, waiting = made(), made(promote=False, beta=0.7)
    assert versions.read_pointer()[0].grid != waiting
    assert made(beta=0.7) == waiting == versions.read_pointer()[0].grid
    versions.promote(first)


def test_a_withdrawn_grid_does_not_come_back_by_itself(made):
    first, second = made(), made(beta=0.6)
    versions.promote(first)
    versions.promote(second)
    assert versions.rollback().grid == first
    assert made(beta=0.6) == second
    assert versions.read_pointer()[0].grid == first


def test_the_reference_is_the_brute_force(made, good):
    """By another implementation of the formula, the tests' own."""
    card = read_card(home_of(good), GridCard)
    database = read_rows(card.database, slice(None))
    rng = np.random.default_rng(0)
    places = np.column_stack([rng.uniform(-180, 180, 9), rng.uniform(-80, 80, 9)])
    queries = rng.normal(size=(9, DIM))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    index = database.keys, database.values, database.locations
    side_by_side = Method("multi-head", side_by_side=HEADS)
    found = validation.refer(card.database, queries, places, side_by_side, Compact())
    for head, part in zip(HEADS, np.split(found.visual, len(HEADS), axis=1), strict=True):
        np.testing.assert_allclose(part, weights(head, index, queries, places) @ database.values, rtol=1e-6, atol=1e-9)
    for method in (Method("range+", 0.3), Method("range")):
        found = validation.refer(card.database, queries, places, method, Compact())
        expected = brute_force(index, queries, places, method)
        np.testing.assert_allclose(found.visual, expected, rtol=1e-9, atol=1e-12)
    assert unit_vectors(places).shape == (9, 3)


def every(grid):
    return zarr.open_array(storage.zarr_store(storage.join(grid, store.VARIABLE)), mode="r+")


def spoil(change):
    """A fault that changes all values."""

    def fault(grid):
        array = every(grid)
        array[...] = change(array[...])

    return fault


def one(change):
    """A fault that changes the first land tile's values, in place."""

    def fault(grid):
        array, tile = every(grid), land_tiles(SPEC)[3]
        window = (slice(None), *tile.window)
        array[window] = change(array[window])

    return fault


def shard(grid):
    """The path of one shard's file below the grid."""
    tile = land_tiles(SPEC)[3]
    name = f"{store.VARIABLE}/c/0/{tile.row // 5}/{tile.column // 5}"
    assert storage.exists(storage.join(grid, name))
    return storage.join(grid, name)


def cell(data, land):
    """Indices of the first cell that is on land, or is not."""
    return tuple(np.argwhere(np.isfinite(data[0]) == land)[0])


def nothing_on_land(data):
    data[(slice(3, 4), *cell(data, True))] = np.nan
    return data


def something_at_sea(data):
    data[(slice(None), *cell(data, False))] = 0.5
    return data


def longer(data):
    data[(slice(VALUES, None), *cell(data, True))] *= 1.01
    return data


def far(data):
    data[(slice(0, 1), *cell(data, True))] = 99
    return data


def cut(grid):
    storage.write(shard(grid), storage.read(shard(grid))[:-100])


def turned(grid):
    data = storage.read(shard(grid))
    storage.write(shard(grid), bytes(255 - byte for byte in data[:200]) + data[200:])


def coordinates(grid):
    array = zarr.open_array(storage.zarr_store(storage.join(grid, "lat")), mode="r+")
    array[...] = array[...][::-1]


def attributes(grid):
    group = storage.read_json(storage.join(grid, "zarr.json"))
    group["attributes"]["rangegrid:made_of"]["beta"] = 0.9
    storage.write_json(storage.join(grid, "zarr.json"), group)


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        (lambda grid: storage.delete(shard(grid)), {"shards"}),
        (cut, {"decoding"}),
        (turned, {"decoding"}),
        (one(nothing_on_land), {"land and sea"}),
        (one(something_at_sea), {"land and sea"}),
        (one(longer), {"location part"}),
        (one(far), {"visual part"}),
        (spoil(lambda data: data[:, ::-1]), {"land and sea"}),
        (coordinates, {"coordinates, north up"}),
        (attributes, {"card"}),
    ],
    ids=["missing", "cut", "turned", "hole", "sea", "longer", "far", "flipped", "coordinates", "attributes"],
)
def test_every_fault_is_found(copy, findings, fault, checks):
    fault(copy)
    found = findings(copy)
    assert failed(found) >= checks
    with pytest.raises(UserError, match="is not good"):
        validation.refuse(copy, list(found.values()))


@pytest.mark.parametrize("axis", [0, 1])
def test_vectors_in_the_wrong_order_are_found(copy, findings, axis):
    """Every land cell has a vector of the grid, whole and sound, but another cell's, as if an axis were flipped."""

    def flipped(data):
        land = np.isfinite(data[0])
        data[:, land] = data[:, land][:, ::-1] if axis else np.roll(data[:, land], 1, axis=1)
        return data

    spoil(flipped)(copy)
    assert failed(findings(copy)) == {"cells computed again"}


def test_another_beta_is_found(copy, findings, made):
    """The vectors of one grid under the name of another."""
    array = every(copy)
    array[...] = every(made(beta=0.4, promote=False))[...]
    assert failed(findings(copy)) == {"cells computed again"}


def test_a_bad_grid_is_not_promoted(made, good, monkeypatch):
    """A rerun finds the spoiled shard, and `latest` stays where it is."""
    versions.promote(good)
    other = made(beta=0.1, promote=False)
    data = storage.read(shard(other))
    storage.write(shard(other), data[:-100])
    with pytest.raises(UserError, match=r"decoding: .* delete what is wrong, or all of it, and run again"):
        made(beta=0.1)
    assert versions.read_pointer()[0].grid == good
    storage.delete(shard(other))
    assert made(beta=0.1) == other == versions.read_pointer()[0].grid
    assert storage.read(shard(other)) == data
    assert xr.open_zarr(other).embedding.shape == (VALUES + DIM, 18, 36)
