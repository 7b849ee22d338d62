"""Grids of a box, across 180 degrees, and in projected planes: against pyproj, rioxarray, and points embedded."""

import html
import json
import posixpath
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import rasterio
import shapely
import xarray as xr
import zarr_cm
from PIL import Image
from pyproj import Transformer
from pystac.validation import validate_dict

from infra import storage
from infra.errors import UserError
from tasks.cards import home_of, read_card
from tasks.core.earth.land import is_land, land_mask
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.database.store import open_database
from tasks.grid.store import open_spec, open_vectors, write_tile
from tasks.model.checkpoint import load_checkpoint
from tasks.params import PublishParams
from tasks.points.sample_grid import sample_grid
from tasks.products import GridCard
from tasks.publish import publish_grid
from tasks.release import diff, validation, versions
from tests.core.test_retrieval import close
from tests.tasks.grid.test_reading_recipes import ALONE
from tests.tasks.release.test_stac import validator  # noqa: F401
from tests.tasks.test_publish import DIM, VALUES, inputs

EDGES = ("west", "south", "east", "north")
BOXES = {
    "box": {"step": 2.5, "west": -10, "south": 35, "east": 30, "north": 60, "tile_cells": 20},
    "across 180": {"step": 2.5, "west": 150, "south": 50, "east": 210, "north": 75}
    | {"tile_cells": 20, "dtype": "int8"},
    "Europe": {"crs": "epsg:3035", "step": 125e3, "west": 2.5e6, "south": 1.4e6, "east": 7.5e6, "north": 5.4e6}
    | {"tile_cells": 20, "evidence": True, "overviews": 1},
    "Arctic": {"crs": "EPSG:3413", "step": 250e3, "west": -4e6, "south": -4e6, "east": 4e6, "north": 4e6}
    | {"tile_cells": 40, "tolerance": 1e-2},
    "WKT": {"crs": "+proj=laea +lat_0=-10 +lon_0=-60", "step": 2e5, "west": -2e6, "south": -2e6, "east": 2e6}
    | {"north": 2e6, "tile_cells": 20},
}
READER = """
import json, sys
import rioxarray
import xarray as xr

def told(url):
    grid = xr.open_zarr(url)
    name = next(name for name in ("embedding", "visual") if name in grid)
    crs, (y, x) = grid.rio.crs, (grid[dim].values for dim in grid[name].dims[1:])
    place = {"bounds": grid.rio.bounds(), "transform": list(grid[name].rio.transform())[:6]}
    return place | {"crs": crs.to_wkt(), "same": grid[name].rio.crs == crs, "ends": [x[0], x[-1], y[0], y[-1]]}

print(json.dumps([told(url) for url in sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def made(client, tmp_path_factory):
    """A function that publishes a grid, and the encoder and index behind it."""
    with inputs(tmp_path_factory.mktemp("boxes")) as (checkpoint, url):
        data = open_database(url)
        ours = load_checkpoint(checkpoint).location, RetrievalIndex(data.keys, data.values, data.locations)
        yield lambda params: publish_grid(client, checkpoint, url, PublishParams(**{"method": "range+"} | params)), ours


@pytest.fixture(scope="module", params=BOXES)
def grid(request, made):
    """URL of the Zarr of each box, and its parameters."""
    return made[0](BOXES[request.param]), BOXES[request.param]


def centres(grid):
    """Longitude and latitude of all cells, (rows, columns, 2): the stored coordinates through pyproj."""
    url, params = grid
    dataset = xr.open_zarr(url)
    names = ("x", "y") if "x" in dataset else ("lon", "lat")
    plane = np.meshgrid(*(dataset[name].values for name in names))
    lonlat = Transformer.from_crs(params.get("crs", "EPSG:4326"), "EPSG:4326", always_xy=True).transform(*plane)
    return np.stack(lonlat, axis=-1)


def test_a_cell_is_its_centre_embedded(grid, made):
    """By the inverse projection of pyproj, and points embedded as `rangegrid embed` does."""
    url, params = grid
    places, found = centres(grid), np.moveaxis(open_vectors(url)[:], 0, -1)
    assert len(found[0, 0]) == VALUES + DIM
    land = land_mask(open_spec(url))
    assert (is_land(places) & ~land).sum() == 0
    assert 10 < land.sum() < land.size
    np.testing.assert_array_equal(np.isfinite(found).all(-1), land)
    expected = embed(*made[1], places[land], Method())
    close(found[land], expected, {"int8": 0.03}.get(params.get("dtype"), max(params.get("tolerance", 0), 1e-5)))


def test_rioxarray_alone_finds_the_plane(made):
    urls = [made[0](params) for params in BOXES.values()]
    ran = subprocess.run([sys.executable, "-I", "-c", ALONE + READER, *urls], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for found, params in zip(json.loads(ran.stdout), BOXES.values(), strict=True):
        (west, south, east, north), step = (params[name] for name in EDGES), params["step"]
        expected = rasterio.CRS.from_user_input(params.get("crs", "EPSG:4326"))
        assert rasterio.CRS.from_wkt(found["crs"]) == expected
        assert found["same"]
        assert found["bounds"] == [west, south, east, north]
        assert found["transform"] == [step, 0, west, 0, -step, north]
        assert found["ends"] == [west + step / 2, east - step / 2, north - step / 2, south + step / 2]


def test_the_conventions_are_kept(grid):
    node = storage.read_json(storage.join(grid[0], "zarr.json"))
    assert set(zarr_cm.detect_revisions(node["attributes"])) >= {"proj", "spatial"}
    zarr_cm.validate_all(node)


def test_points_are_found_by_longitude_and_latitude(grid):
    url, params = grid
    dataset = xr.open_zarr(url)
    rng = np.random.default_rng(1)
    points = np.column_stack([rng.uniform(-180, 180, 2000), np.degrees(np.arcsin(rng.uniform(-1, 1, 2000)))])
    points = np.concatenate([points, centres(grid).reshape(-1, 2) + rng.uniform(-0.4, 0.4, 2)])
    x, y = Transformer.from_crs("EPSG:4326", params.get("crs", "EPSG:4326"), always_xy=True).transform(*points.T)
    if "lon" in dataset:
        x = np.where(x < params["west"], x + 360, x)
    inside = (x > params["west"]) & (x < params["east"]) & (y > params["south"]) & (y < params["north"])
    dims = ("x", "y") if "x" in dataset else ("lon", "lat")
    at = {name: xr.DataArray(values[inside], dims="point") for name, values in zip(dims, (x, y), strict=True)}
    names = ["embedding"] if "embedding" in dataset else ["visual", "location"]
    for method in ("nearest", "bilinear"):
        found = sample_grid(url, points, method)
        assert np.isnan(found[~inside]).all()
        read = [dataset[n].load() for n in names]
        picked = [v.sel(at, method="nearest") if method == "nearest" else v.interp(at) for v in read]
        expected = np.concatenate([part.values for part in picked]).T
        known = np.isfinite(expected[:, 0])
        assert known.sum() > 20
        np.testing.assert_allclose(found[inside][known], expected[known], rtol=1e-4, atol=1e-4)
        if method == "nearest":
            assert np.isnan(found[inside][~known]).all()


def test_the_item_is_where_the_cells_are(grid, validator):  # noqa: F811
    item = storage.read_json(storage.join(home_of(grid[0]), "item.json"))
    assert len(validate_dict(item, validator=validator)) == 1 + len(item["stac_extensions"])
    shape = shapely.geometry.shape(item["geometry"])
    assert shape.is_valid
    lon, lat = centres(grid).reshape(-1, 2).T
    lon = (lon + 180) % 360 - 180
    assert shapely.covers(shape, shapely.points(lon, lat)).all()
    west, south, east, north = item["bbox"]
    assert ((lat >= south) & (lat <= north)).all()
    assert ((lon >= west) & (lon <= east) if west < east else (lon >= west) | (lon <= east)).all()
    assert (west > east) == ("across 180" in BOXES and grid[1] is BOXES["across 180"])


def test_the_pictures_lie_in_the_plane(grid, monkeypatch):
    url, params = grid
    home = home_of(url)
    with rasterio.open(BytesIO(storage.read(f"{home}/world.tif"))) as picture:
        assert picture.crs == rasterio.CRS.from_user_input(params.get("crs", "EPSG:4326"))
        assert tuple(picture.bounds) == tuple(params[name] for name in EDGES)
        np.testing.assert_array_equal(picture.read(4) > 0, np.isfinite(open_vectors(url)[0]))
    assert Image.open(BytesIO(storage.read(f"{home}/world.png"))).width > 1000
    page = storage.read(f"{home}/index.html").decode()
    monkeypatch.chdir(home.removeprefix("file://"))
    exec(html.unescape(page.split("<pre>")[1].split("</pre>")[0]), found := {})
    assert set(found["vectors"].sizes) <= {"embedding_dim", "visual_dim", "location_dim"}


def test_a_level_lies_on_the_same_box(made):
    url = made[0](BOXES["Europe"])
    whole, half = (xr.open_zarr(f"{home_of(url)}/{name}.zarr") for name in ("grid", "x2"))
    expected = whole.embedding.coarsen(x=2, y=2).mean()
    xr.testing.assert_allclose(half.embedding, expected, rtol=1e-5)
    assert half.spatial_ref.attrs["GeoTransform"] == "2500000.0 250000.0 0.0 5400000.0 0.0 -250000.0"


def test_a_grid_of_another_box_is_no_parent_and_not_compared(made, client):
    publish, box = made[0], {**BOXES["box"], "keep_sums": True}
    parent = publish(box)
    with pytest.raises(UserError, match=r"has box \[-10.0, 35.0, 30.0, 60.0\] and not \[-10.0, 35.0, 30.0, 57.5\]"):
        publish({**box, "north": 57.5, "parent": parent})
    with pytest.raises(UserError, match="only vectors of the same cells"):
        diff.diff(client, parent, publish({**box, "north": 57.5, "south": 32.5}))


def test_a_box_of_sea_is_refused(made):
    with pytest.raises(UserError, match="has no land in any cell"):
        made[0]({"step": 1, "west": -40, "south": 20, "east": -30, "north": 30})


@pytest.mark.parametrize("flipped", [{"latitude flipped"}, {"longitude flipped"}])
def test_rows_and_columns_in_the_wrong_order_are_found(made, client, tmp_path, flipped):
    """In Europe's plane, whose box is no mirror image of itself in longitude or latitude."""
    source = made[0](BOXES["Europe"])
    home = (tmp_path / versions.name_of(source)).as_uri()
    storage.copy(home_of(source), home)
    copy, spec = f"{home}/grid.zarr", PublishParams(**BOXES["Europe"]).spec
    vectors = open_vectors(copy)[:]
    vectors = vectors[:, ::-1] if flipped == {"latitude flipped"} else vectors[:, :, ::-1]
    for tile in spec.tiles():
        write_tile(copy, tile, np.ascontiguousarray(vectors[:, *tile.window]))
    found = validation.validate_grid(client, copy, read_card(posixpath.dirname(copy), GridCard))
    failed = {finding.check for finding in found if finding.passed is False}
    assert failed >= {"land and sea", "cells computed again"}


def test_over_a_box_too_small_to_tell_the_flips_are_left_open(made, client):
    """In int8, a field that hardly changes over the box is the same wherever it is stored."""
    url = made[0]({"step": 0.1, "west": 10, "south": 50, "east": 11, "north": 51, "dtype": "int8"})
    assert open_spec(url).tile == read_card(home_of(url), GridCard).made_of["tile_cells"] == 480
    found = {f.check: f for f in validation.validate_grid(client, url, read_card(home_of(url), GridCard))}
    assert found["cells computed again"].passed
    assert found["latitude flipped, must differ"].passed is None
