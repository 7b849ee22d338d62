"""Grids of a region, published and read as users do, against shapely and the grid of the box."""

import json

import geopandas as gpd
import numpy as np
import pytest
import shapely
import xarray as xr
from pyproj import Transformer
from pystac.validation import validate_dict

from infra import storage
from infra.errors import UserError
from tasks.cards import home_of, read_card
from tasks.core.bandwidths import TRIED
from tasks.core.earth.land import land_mask
from tasks.core.earth.sphere import unit_vectors
from tasks.grid.store import level_url, open_spec, open_vectors
from tasks.params import PublishParams
from tasks.points.sample_grid import sample_grid
from tasks.products import GridCard
from tasks.publish import publish_grid
from tasks.release.validation import validate_grid
from tasks.tables.regions import countries, find_region
from tests.core.test_retrieval import places, unit
from tests.tasks.release.test_stac import validator  # noqa: F401
from tests.tasks.test_publish import DIM, inputs, store

KENYA = {"region": ("KE",), "step": 0.5, "tile_cells": 20, "overviews": 1, "method": "range+"}


@pytest.fixture(scope="module")
def publish(client, tmp_path_factory):
    with inputs(tmp_path_factory.mktemp("regions")) as (checkpoint, database):
        yield lambda **params: publish_grid(client, checkpoint, database, PublishParams(**params))


@pytest.fixture(scope="module")
def kenya(publish):
    return publish(**KENYA)


@pytest.fixture(scope="module")
def shape():
    return countries().set_index("iso2").geometry["KE"]


def test_a_country_has_its_own_cells_and_those_of_the_box_elsewhere_none(kenya, publish, shape):
    grid = xr.open_zarr(kenya)
    west, south, east, north = grid.attrs["spatial:bbox"]
    assert (west, south, east, north) == (33.5, -5.0, 42.5, 6.0) or all(
        edge % 0.5 == 0 for edge in (west, south, east, north)
    )
    assert west <= shape.bounds[0]
    assert south <= shape.bounds[1]
    lon, lat = np.meshgrid(grid.lon, grid.lat)
    boxes = shapely.box(lon - 0.25, lat - 0.25, lon + 0.25, lat + 0.25)
    there = np.isfinite(grid.embedding.values).all(0)
    overlaps = shapely.area(shapely.intersection(boxes, shape)) > 1e-9
    box = publish(**KENYA | {"region": (), "west": west, "south": south, "east": east, "north": north})
    whole = open_vectors(box)[:]
    np.testing.assert_array_equal(there, overlaps & np.isfinite(whole).all(0))
    np.testing.assert_allclose(grid.embedding.values[:, there], whole[:, there], atol=1e-6)
    coarse = np.isfinite(open_vectors(level_url(kenya, 1))[0])
    np.testing.assert_array_equal(coarse, there.reshape(there.shape[0] // 2, 2, -1, 2).any((1, 3)))


def test_it_is_a_line_of_its_own_and_tells_its_region(kenya, publish, shape, validator):  # noqa: F811
    home = home_of(kenya)
    card = read_card(home, GridCard)
    region = find_region(("KE",))
    assert card.line.endswith(f"region{region.digest[:8]}")
    assert (card.region.name, card.region.digest, card.made_of["region"]) == ("Kenya", region.digest, region.digest)
    item = storage.read_json(storage.join(home, "item.json"))
    validate_dict(item, validator=validator) if validator else None
    told = shapely.geometry.shape(item["geometry"])
    assert told.symmetric_difference(shape).area < 1e-6
    assert item["properties"]["title"] == "RANGE embeddings of Kenya, 0.5 degree"
    kept = gpd.read_parquet(storage.join(home, item["assets"]["region"]["href"]).removeprefix("file://"))
    assert kept.geometry[0].symmetric_difference(shape).area < 1e-6
    assert publish(**KENYA | {"region": ("Kenya",)}) == kenya  # by another name the same


def test_it_validates_and_a_cell_outside_is_misplaced(kenya, client):
    card = read_card(home_of(kenya), GridCard)
    assert not [finding for finding in validate_grid(client, kenya, card) if finding.passed is False]
    np.testing.assert_array_equal(land_mask(open_spec(kenya)), np.isfinite(open_vectors(kenya)[0]))


def test_points_outside_have_no_data(kenya):
    found = sample_grid(kenya, np.array([[36.8, -1.3], [34.2, 5.7], [33.6, -4.9]]), "nearest")
    assert np.isfinite(found).all(1).tolist() == [True, False, False]


def test_the_plane_is_chosen(publish, shape):
    grid = xr.open_zarr(publish(**KENYA | {"crs": "auto", "step": 50_000, "overviews": 0}))
    assert grid.spatial_ref.attrs["grid_mapping_name"] == "lambert_azimuthal_equal_area"
    plane = Transformer.from_crs(grid.spatial_ref.attrs["crs_wkt"], 4326, always_xy=True)
    there = np.isfinite(grid.embedding.values).all(0)
    lonlat = np.column_stack([part.ravel() for part in plane.transform(*np.meshgrid(grid.x, grid.y))])
    inside = shapely.intersects_xy(shape, *lonlat.T).reshape(there.shape)
    assert not (inside & ~there).any()
    corners = np.hypot(25_000, 25_000) / 111_000 * 1.01
    far = shapely.distance(shape, shapely.points(lonlat)).reshape(there.shape) > corners
    assert not (far & there).any()


def test_across_180(publish):
    grid = xr.open_zarr(publish(**KENYA | {"region": ("FJ",), "step": 0.25}))
    west, _, east, _ = grid.attrs["spatial:bbox"]
    assert (170 < west < 180 < east < 185) is True
    there = np.isfinite(grid.embedding.values).all(0)
    assert bool(there[:, grid.lon.values < 180].any())
    assert bool(there[:, grid.lon.values > 180].any())
    item = storage.read_json(storage.join(home_of(publish(**KENYA | {"region": ("FJ",), "step": 0.25})), "item.json"))
    assert item["bbox"][0] > item["bbox"][2]
    assert shapely.geometry.shape(item["geometry"]).bounds[0] >= -180


def test_its_heads_are_those_that_its_own_images_choose(client, tmp_path, caplog):
    """By leaving images of the region out, one by one and in blocks of the region's size; of few, all images choose."""
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    where = np.concatenate([places(300), rng.uniform((20, 0), (40, 10), (120, 2))])
    values = np.sin(120 * unit_vectors(where) @ rng.normal(size=(3, 4))).astype("f4")  # rough: some 300 km
    values[:300] = unit_vectors(where[:300]) @ rng.normal(size=(3, 4))
    keys = unit(rng.normal(size=(420, DIM))).astype("f4")
    rows = {"keys": keys, "values": values, "locations": where, "row_ids": np.arange(420)}
    given = {"step": 1.0, "tile_cells": 20, "compact_dims": 4}
    with inputs(tmp_path) as (checkpoint, _):
        urls = checkpoint, store(tmp_path, "dense", rows)
        regions = ("20 0 40 10",), ("100 0 110 5",), ()
        grids = [publish_grid(client, *urls, PublishParams(region=region, **given)) for region in regions[:2]]
        grids.append(publish_grid(client, *urls, PublishParams(**given | {"step": 10.0})))
    dense, few, world = (read_card(home_of(grid), GridCard).recipe.heads for grid in grids)
    inside = (where >= (20, 0)).all(1) & (where <= (40, 10)).all(1)
    side = np.sqrt(6371.0088**2 * np.radians(20) * np.sin(np.radians(10)) / 50) / 111.195
    assert dense[1] == f"geodesic:{sharpest(where, values, inside, np.floor(side)):g}"
    assert few == world != dense
    assert "heads that the images in 20 0 40 10 choose" in caplog.text


def sharpest(where, values, inside, degrees):
    """The temperature that restores images of a region best, by the formula."""
    x, block = unit_vectors(where), np.floor((where + np.array([180, 90])) / degrees)
    scaled = (values - values.mean(0)) / values.std(0)
    lost = []
    for at in TRIED["geodesic"]:
        kernel = np.exp(at * (x[inside] @ x.T - 1))
        told = [kernel * ~same[inside] for same in (np.eye(len(x), dtype=bool), (block[:, None] == block).all(2))]
        lost.append(sum(((w @ scaled / w.sum(1, keepdims=True) - scaled[inside]) ** 2).sum() for w in told))
    return TRIED["geodesic"][int(np.argmin(lost))]


def test_a_step_below_what_the_field_resolves_is_told(publish, caplog):
    grid = publish(**KENYA | {"region": ("36 -1 37 0",), "step": 0.05, "overviews": 0})
    field = xr.open_zarr(grid).attrs["rangegrid:field"]
    assert {1.0, 2.5, 5.0, 10.0} <= set(field["distances_km"])
    assert "finer than the field resolves in 36 -1 37 0" in caplog.text


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"region": ("KE",), "step": 200.0}, "do not fit the globe"),
        ({"region": ("-30 0 -29 1",)}, "no land"),
        ({"region": ("KE",), "crs": "auto", "step": 0.5}, "cells of the box"),
    ],
)
def test_what_cannot_be_published_is_refused(publish, params, told):
    with pytest.raises(UserError, match=told):
        publish(**params)


def test_auto_needs_a_region():
    with pytest.raises(ValueError, match="crs auto is that of a region"):
        PublishParams(crs="auto")
    assert json.dumps(PublishParams(region=("KE",), crs="auto", step=1000).model_dump())
