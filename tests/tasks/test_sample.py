"""Sampling from the sandbox's real STAC and S3 servers, in every way."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from itertools import count, islice
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
import zarr
from pydantic import ValidationError
from pyproj import Transformer
from rasterio.session import DummySession
from rasterio.windows import Window
from typer.testing import CliRunner

from flows.cli import app
from infra import clusters, storage
from infra.errors import UserError
from tasks.core.earth.land import is_land, land_km2
from tasks.core.earth.sampling import grid_zone
from tasks.database.store import open_database
from tasks.encode import encode_database
from tasks.params import BANDS, EncodeParams, EncoderParams, SampleParams, TrainParams
from tasks.patches.estimate import Archive, estimate
from tasks.patches.store import open_patches, read_parts
from tasks.sample import sample_patches
from tasks.tables.regions import countries, find_region
from tasks.train import train_model
from tests.proxy import Proxy

KEPT = ("patches.zarr", "manifest.parquet", "samples.png", "card.json")
COMMON = {
    "patches": 30,
    "patch_pixels": 16,
    "resolution_m": 5_000,
    "bands": ("B02", "B04", "B08"),
    "south": 43,
    "north": 52,
    "shard_patches": 10,
    "max_cloud_percent": 95,
    "min_clear_fraction": 0.5,
}


@pytest.fixture
def run(sandbox, tmp_path, monkeypatch):
    """Samples into a folder of its own."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())

    def sample(**params):
        with clusters.connect("threads") as client:
            return open_patches(sample_patches(client, SampleParams(**COMMON | params)))

    return sample


@pytest.fixture
def points(tmp_path):
    """A table of 40 points in France and Germany."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"name": range(40), "lon": rng.uniform(2, 10, 40), "lat": rng.uniform(46, 51, 40)})
    table.to_csv(tmp_path / "points.csv", index=False)
    return tmp_path / "points.csv"


def test_values_are_what_rasterio_reads(run, sandbox):
    patches = run()
    pixels = patches.pixels(slice(None))
    at = {
        "AWS_S3_ENDPOINT": sandbox.endpoint.removeprefix("http://"),
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
    }
    with rasterio.Env(DummySession(), **at):
        for row in (0, 13, 29):
            place = patches.manifest.iloc[row]
            with rasterio.open(place.href.replace("s3://", "/vsis3/")) as source:
                x, y = Transformer.from_crs(4326, source.crs, always_xy=True).transform(place.lon, place.lat)
                left, top = source.bounds.left, source.bounds.top
                corner = np.rint([(x - left) / 5000 - 8, (top - y) / 5000 - 8]).astype(int)
                np.testing.assert_array_equal(pixels[row, 0], source.read(1, window=Window(*corner, 16, 16)))
    assert set(patches.manifest.offset_check) <= {"agree", "silent"}
    assert (patches.manifest.nodata_fraction == 0).all()
    assert "| requests |" in storage.read(storage.join(patches.url, "run.md")).decode()


def test_the_card_tells_how_patches_are_spread(run):
    """Beside the days of the window and the land between the limits."""
    patches = run()
    skew, manifest = patches.card.model_dump()["skew"], patches.manifest
    for year, group in skew["year"].items():
        assert group["patches"] == manifest.datetime.str.startswith(year).sum()
        assert group["even"] == 0.5  # of 2021 and 2022
    days = {"December to February": 90, "March to May": 92, "June to August": 92, "September to November": 91}
    even = {name: group["even"] for name, group in skew["season"].items()}
    assert even == {name: round(count / 365, 4) for name, count in days.items()}
    months = manifest.datetime.str[5:7].astype(int) % 12 // 3
    assert [skew["season"][name]["patches"] for name in days] == [(months == i).sum() for i in range(4)]
    assert list(skew["latitude"]) == ["30 to 45", "45 to 60"]
    areas = {"30 to 45": land_km2(43, 45), "45 to 60": land_km2(45, 52)}
    for band, group in skew["latitude"].items():
        low, high = map(int, band.split(" to "))
        assert group["patches"] == manifest.lat.between(low, high, inclusive="left").sum()
        assert group["share"] == round(group["patches"] / 30, 4)
        assert group["even"] == round(areas[band] / sum(areas.values()), 4)
    assert "| season | June to August |" in storage.read(storage.join(patches.url, "skew.md")).decode()


def test_the_store_is_what_it_says_to_plain_readers(run, sandbox, monkeypatch):
    """Zarr, GeoPandas and hashlib alone, on S3."""
    url = f"{sandbox.environment()['RANGEGRID_STORAGE_URL']}/plain"
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", url)
    patches = run(patches=25)
    options = {"endpoint_url": sandbox.endpoint, "key": sandbox.keys[0], "secret": sandbox.keys[1]}
    group = zarr.open_group(f"{patches.url}/patches.zarr", mode="r", storage_options=options)
    pixels, manifest = group["pixels"], gpd.read_parquet(f"{patches.url}/manifest.parquet", storage_options=options)
    assert (pixels.shape, pixels.dtype, pixels.chunks) == ((25, 3, 16, 16), np.uint16, (1, 3, 16, 16))
    assert pixels.metadata.dimension_names == ("patch", "band", "y", "x")
    assert pixels.attrs.asdict() == {"bands": ["B02", "B04", "B08"], "resolution_m": 5000.0}
    assert manifest.crs.to_epsg() == 4326
    assert manifest.row_id.is_unique
    for patch, row in zip(pixels[:], manifest.itertuples(), strict=True):
        assert row.sha256 == hashlib.sha256(patch.astype("<u2").tobytes()).hexdigest()
        assert row.nodata_fraction == (patch == 0).any(0).mean()
        assert row.item_id in row.href
        assert "?" not in row.href
        assert (row.geometry.x, row.geometry.y) == (row.lon, row.lat)
    assert manifest.clear_fraction.between(0.5, 1).all()
    assert manifest.saturated_fraction.between(0, 0.01).all()
    filled = manifest[["datetime", "platform", "baseline", "offset_reason", "catalog", "collection"]]
    assert (filled != "").all().all()
    assert set(manifest.offset[manifest.baseline >= "04.00"]) <= {-1000}


def files(url):
    """Bytes by name of a product of this machine, without the parts, whose attributes tell when they were made."""
    home = Path(url.removeprefix("file://"))
    there = {path.relative_to(home).as_posix(): path for path in home.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in there.items() if name.split("/")[0] in KEPT}


def test_a_larger_sample_reads_the_new_places_alone_and_is_the_one_made_from_nothing(
    run, points, sandbox, tmp_path, monkeypatch
):
    """Also of another layout; what the smaller one lost, as by a prune at the same time, is read again."""

    def sample(**size):
        return run(places="list", source=str(points), **size)

    def asked(**size):
        with Proxy(sandbox.endpoint) as s3, pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANGEGRID_S3_ENDPOINT", s3.url)
            return sample(**size), Counter({path: n for (_, path), n in s3.requests.items() if path.endswith(".tif")})

    small, _ = asked(patches=8)
    before = files(small.url)
    known, checked = asked(patches=8, shard_patches=5)
    assert len({path.rpartition("/")[0] for path in checked}) == 1  # before work, the bands of one scene are opened
    large, read = asked(patches=20)
    assert files(small.url) == before
    enlarged = files(large.url)
    new = large.manifest[~large.manifest["row_id"].isin(small.manifest["row_id"])]
    assert len(new) == 12
    bands = {path for path in read - checked if "scl" not in path.lower()}
    assert {path.rpartition("/")[0] for path in bands} == {
        href.rpartition("/")[0].removeprefix("s3:/") for href in new["href"]
    }
    relaid = files(known.url)
    shutil.rmtree(Path(large.url.removeprefix("file://")))
    for one in (small, known):
        shutil.rmtree(Path(one.url.removeprefix("file://")) / "patches.zarr/pixels/c")
    mended = files(sample(patches=20).url)
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "elsewhere").as_uri())
    assert files(sample(patches=8, shard_patches=5).url) == relaid
    shutil.rmtree(tmp_path / "elsewhere")
    assert files(sample(patches=20).url) == mended == enlarged


def test_an_items_places_are_searched_and_read_together(run, sandbox, tmp_path, monkeypatch):
    """A file is opened once, and a row of its tiles is one request, however many places of a cell it serves."""
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"lon": rng.uniform(1, 5, 60), "lat": rng.uniform(42, 46, 60)})
    table.to_csv(tmp_path / "near.csv", index=False)
    stac, s3 = (Proxy(origin) for origin in (os.environ["RANGEGRID_STAC_URL"], sandbox.endpoint))
    with stac, s3:
        monkeypatch.setenv("RANGEGRID_STAC_URL", stac.url)
        monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", s3.url)
        found = run(places="list", source=str(tmp_path / "near.csv"), patches=40, shard_patches=40).manifest
    items = set(found["item_id"])
    assert len(found) / len(items) >= 5
    asked = Counter({path: n for (_, path), n in s3.requests.items() if path.endswith(".tif")})
    bands = {path: n for path, n in asked.items() if path.split("/")[-2] in items}
    assert len(bands) == 4 * len(items), "three bands and the classification"
    checked = 1  # before work, the bands of one scene are opened
    assert max(asked.values()) <= 1 + 2 + checked, "its header, and two rows of tiles"
    searches = sum(n for (_, path), n in stac.requests.items() if path.startswith("/search"))
    assert searches <= 8, "one for the cell in each round, not one for each place"


@pytest.mark.parametrize(
    ("window", "first", "last"), [("2021-07", "2021-07-01", "2021-08"), ("2022/..", "2022", "2024")]
)
def test_the_images_are_of_the_window(run, window, first, last):
    taken = run(patches=4, datetime=window).manifest.datetime
    assert taken.between(first, last).all()


def test_a_list_is_sampled_in_its_order(run, points):
    found = run(places="list", source=str(points), patches=20).manifest
    table = pd.read_csv(points)
    assert len(found) == 20
    np.testing.assert_allclose(found[["lon", "lat"]], table.iloc[found.row_id][["lon", "lat"]])
    assert found.row_id.max() < 40


def test_the_classes_of_a_raster_in_turn(run, tmp_path):
    classes = np.array([[1, 2], [1, 2]], np.uint8)
    profile = {"driver": "GTiff", "height": 2, "width": 2, "count": 1, "dtype": "uint8", "crs": "EPSG:4326"}
    transform = rasterio.transform.from_bounds(2, 46, 10, 51, 2, 2)
    with rasterio.open(tmp_path / "classes.tif", "w", transform=transform, **profile) as raster:
        raster.write(classes, 1)
    found = run(places="class", source=str(tmp_path / "classes.tif"), patches=24).manifest
    np.testing.assert_array_equal(found.row_id % 2, (found.lon > 6).astype(int))


def test_images_drawn_by_class_count_as_much_as_its_land(run, tmp_path):
    """Class 2 is the northern third of a raster of one degree a pixel; encoded, its images have its land."""
    classes = np.where(np.arange(6)[:, None] < 2, 2, 1).repeat(8, 1).astype(np.uint8)
    profile = {"driver": "GTiff", "height": 6, "width": 8, "count": 1, "dtype": "uint8", "crs": "EPSG:4326"}
    transform = rasterio.transform.from_bounds(2, 45, 10, 51, 8, 6)
    with rasterio.open(tmp_path / "classes.tif", "w", transform=transform, **profile) as raster:
        raster.write(classes, 1)
    found = run(places="class", source=str(tmp_path / "classes.tif"), patches=24)
    north = found.manifest.lat.to_numpy() > 49
    cap = np.sin(np.radians([45, 49, 51]))
    with clusters.connect("threads") as client:
        params = TrainParams(encoder=EncoderParams(dim=16), steps=4, batch=8, degree=4, hidden=16, dim=8)
        checkpoint = train_model(client, found.url, params)
        data = open_database(encode_database(client, found.url, checkpoint, EncodeParams()))
        assert data.weights[north].sum() / data.weights.sum() == pytest.approx((cap[2] - cap[1]) / np.ptp(cap), 1e-4)
        assert np.ptp(data.weights[north]) == np.ptp(data.weights[~north]) == 0
        (tmp_path / "classes.tif").unlink()
        again = open_database(encode_database(client, found.url, checkpoint, EncodeParams(shard_rows=8)))
        assert again.weights is None


def even_places(seed, south, north):
    """The sequence in whole numbers and plain floats: 1 / 1.3247... and its square, from the seed's shift, on land."""
    root = (1 << 200) * 132471795724474602596090885447809734073440405690173336453401505 // 10**62
    shift = [int(one) << 136 for one in np.random.default_rng(seed).integers(0, 2**64, 2, dtype=np.uint64)]
    steps = [(1 << 400) // root, (1 << 600) // root**2]
    for n in count():
        u, v = ((first + n * step) % (1 << 200) / (1 << 200) for first, step in zip(shift, steps, strict=True))
        place = [360 * u - 180, math.degrees(math.asin(2 * v - 1))]
        if south <= place[1] <= north and is_land(np.array([place]))[0]:
            yield place


def test_even_places_are_those_of_the_sequence_and_more_extend_them(run, caplog):
    """Rejected places are followed by the next ones; a larger sample copies what a smaller one read."""
    caplog.set_level("INFO", "rangegrid")
    small, large = run(places="even", seed=3, patches=12), run(places="even", seed=3, patches=20)
    expected = np.array(list(islice(even_places(3, 43, 52), large.card.tried)))
    for found in (small.manifest, large.manifest):
        np.testing.assert_allclose(found[["lon", "lat"]], expected[found.row_id], rtol=0, atol=1e-9)
    assert sum(large.card.rejected.values()) > 0, "nothing was refilled"
    assert sorted(small.manifest.row_id) == sorted(large.manifest.row_id)[:12]
    assert "12 of 20 places were read for" in caplog.text


def test_even_is_the_default_and_seasons_share_its_places(run):
    found = run(scene="seasons", patches=4, seed=3, max_tries=100).manifest
    expected = np.array(list(islice(even_places(3, 43, 52), found.row_id.max() // 4 + 1)))
    np.testing.assert_allclose(found[["lon", "lat"]], expected[found.row_id // 4], rtol=0, atol=1e-9)


def test_every_season_of_a_place(run, points):
    found = run(scene="seasons", patches=24, places="list", source=str(points)).manifest
    month = pd.to_datetime(found.datetime, format="ISO8601").dt.month
    np.testing.assert_array_equal(month % 12 // 3, found.row_id % 4)
    assert found.groupby(["lon", "lat"]).size().max() > 1


def test_tries_are_bounded(run):
    with pytest.raises(UserError, match=r"only \d+ of 30 patches were found among 60 places .* raise .* --max-tries"):
        run(max_tries=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lon,lat\n2,95\n", "no place in row 1: lon 2, lat 95. Latitude and longitude may be swapped"),
        ("name,height\na,5\n", "has no column 'lon' among name, height"),
        ("lon,lat\n2,nan\n", "no place in row 1: lon 2, lat nan. Leave out rows without a place"),
    ],
)
def test_a_wrong_list_is_refused_before_work(run, tmp_path, text, message):
    (tmp_path / "wrong.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        run(places="list", source=str(tmp_path / "wrong.csv"))


def test_bands_are_known_before_work(run):
    with pytest.raises(
        UserError, match=r"items have no B05: give --bands of B02, B03, B04, B08, or set RANGEGRID_COLL"
    ):
        run(bands=("B02", "B05"))
    with pytest.raises(ValidationError, match="give bands of Sentinel-2 L2A, each once: B01, B02"):
        run(bands=("B02", "B10"))
    with pytest.raises(ValidationError, match="give bands of Sentinel-2 L2A, each once: B01, B02"):
        run(bands=("B02", "../../B04"))


def test_no_name_of_a_catalog_leads_out_of_the_store(run, sandbox, tmp_path, monkeypatch):
    """Ids of items, keys of assets and names of bands are text in the manifest, and never a part of a path."""
    (tmp_path / "catalog").mkdir()
    (tmp_path / "home").mkdir()
    hostile = json.loads((sandbox.directory / "planet/items.json").read_text())
    for item in hostile["features"]:
        item["id"] = f"../../../../{tmp_path.name}/{item['id']}"
        item["assets"]["scl"]["bands"] = [{"name": "SCL"}]  # the others tell their bands already
        item["assets"] = {f"../../{key}": asset for key, asset in item["assets"].items()}
        item["assets"]["../../../x"] = {"href": "../../../../x.tif", "bands": [{"name": "../../x"}]}
    (tmp_path / "catalog/items.json").write_text(json.dumps(hostile))
    monkeypatch.setenv("RANGEGRID_STAC_URL", str(tmp_path / "catalog/items.json"))
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "home").as_uri())
    patches = run(patches=5)
    assert patches.manifest.item_id.str.startswith("../../../../").all()
    assert {path.name for path in tmp_path.iterdir()} == {"catalog", "home"}
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"patches"}
    assert {path.as_uri() for path in (tmp_path / "home/patches").iterdir()} == {patches.url}


def test_items_without_a_known_band_are_told(run, sandbox, tmp_path, monkeypatch):
    strange = json.loads((sandbox.directory / "planet/items.json").read_text())
    for item in strange["features"]:
        item["assets"] = {"../../x": item["assets"]["scl"]}
    (tmp_path / "items.json").write_text(json.dumps(strange))
    monkeypatch.setenv("RANGEGRID_STAC_URL", str(tmp_path / "items.json"))
    with pytest.raises(UserError, match=r"have no asset that is a band of Sentinel-2 L2A .* has \.\./\.\./x \(image"):
        run(patches=5)


def test_a_list_too_short_is_refused_before_work(run, points):
    with pytest.raises(
        UserError, match=r"points.csv offers 40 places for 41 patches: ask for fewer patches, or give a"
    ):
        run(places="list", source=str(points), patches=41)


def test_a_shard_too_large_for_a_worker_is_refused_before_work(run):
    with pytest.raises(UserError, match=r"a shard of 100000 patches needs \d+\.\d GB .* lower --shard-patches"):
        run(patches=10_000, patch_pixels=2048, shard_patches=100_000)


def test_a_resolution_that_does_not_fit_is_told(run):
    with pytest.raises(UserError, match=r"0000? m pixels does not fit windows of 3000 m pixels"):
        run(resolution_m=3_000)


def test_the_estimate_counts_real_places():
    small, large = (estimate(SampleParams(**COMMON | {"patches": n}), 2) for n in (100, 1000))
    assert small.places == pytest.approx(100 / 0.55, abs=1)
    assert small.requests < large.requests
    assert large.bytes_stored == pytest.approx(1000 * 3 * 16 * 16 * 1.4, rel=0.01)


def test_the_estimate_is_what_a_run_takes(run, whole_scene, tmp_path, monkeypatch):
    """All bands of a scene: within a factor of 1.5, by its own counts."""
    item, rng = whole_scene.item, np.random.default_rng(1)
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [item]}))
    monkeypatch.setenv("RANGEGRID_STAC_URL", str(tmp_path / "items.json"))
    monkeypatch.setenv("RANGEGRID_COLLECTION", item["collection"])
    places = whole_scene.places(rng.uniform(100, 1000, (60, 2)))
    pd.DataFrame(places, columns=["lon", "lat"]).to_csv(tmp_path / "points.csv", index=False)
    asked = {"patches": 40, "places": "list", "source": str(tmp_path / "points.csv")}
    asked |= {"datetime": item["properties"]["datetime"][:10], "bands": BANDS, "patch_pixels": 64}
    asked |= {"resolution_m": 100.0, "shard_patches": 40, "south": -80, "north": 84}
    patches = run(**asked)
    archive = Archive(scene=lambda places: np.zeros(len(places)), accepted=1.0, finest_m=100.0)
    planned = estimate(SampleParams(**COMMON | asked), 2, archive)
    (part,) = read_parts(patches.url, "parts", 0, [0], ["row_id"])
    (screened,) = read_parts(patches.url, "screen", 0, [int(grid_zone(places[:1])[0])], ["row_id"])
    requests = part.attrs["requests"] + screened.attrs["requests"]
    read = part.attrs["bytes_read"] + screened.attrs["bytes_read"]
    stored = storage.size(storage.join(patches.url, "patches.zarr"))
    assert planned.requests / 1.5 < requests < planned.requests * 1.5
    assert planned.bytes_read / 1.5 < read < planned.bytes_read * 1.5
    assert planned.bytes_stored / 1.5 < stored < planned.bytes_stored * 1.5


def test_a_region_is_sampled_like_the_world_there(run, tmp_path):
    """Places of four countries are those that a sample of all land has there, by shapely alone."""
    codes = ["FR", "DE", "PL", "UA"]
    shape = shapely.union_all(countries().set_index("iso2").geometry[codes].values)
    inside, world = run(patches=12, region=(",".join(codes[:2]), *codes[2:])), run(patches=12).manifest
    near = world[shapely.intersects_xy(shape, world.lon, world.lat)]
    ours = inside.manifest
    assert shapely.intersects_xy(shape, ours.lon, ours.lat).all()
    assert 3 < len(near) <= 12
    assert {*zip(near.lon, near.lat, strict=True)} <= {*zip(ours.lon, ours.lat, strict=True)}
    card = json.loads(storage.read(storage.join(inside.url, "card.json")))
    assert card["region"]["name"] == "France, Germany, Poland and 1 more"
    assert card["made_of"]["region"] == card["region"]["digest"] == find_region(codes).digest
    assert shapely.geometry.shape(card["region"]["geometry"]).area == pytest.approx(shape.area, rel=0.01)
    assert gpd.read_parquet(storage.join(inside.url, "region.parquet").removeprefix("file://")).area[
        0
    ] == pytest.approx(shape.area, rel=1e-6)


def test_a_spacing_is_a_number_of_patches(run):
    """Of a box, by the area of its land; the sample is the one of that number."""
    given = {"region": ("5 45 10 50",), "patch_pixels": 4}
    by_spacing = run(spacing_km=100, **given)
    count = len(by_spacing.manifest)
    land = 6371.0088**2 * math.radians(5) * (math.sin(math.radians(50)) - math.sin(math.radians(45)))
    assert count == pytest.approx(land / 1e4, abs=2)  # all of it is land but some lakes
    assert run(patches=count, **given).url == by_spacing.url


def test_a_sample_of_everywhere_keeps_its_name(run):
    """What decides a sample without a region is what it was before there were regions."""
    made_of = json.loads(storage.read(storage.join(run().url, "card.json")))["made_of"]
    assert not {"region", "buffer_km", "spacing_km"} & made_of.keys()


def test_a_region_is_refused_before_work(run, tmp_path):
    with pytest.raises(UserError, match="no land"):
        run(region=("0 0 1 1",))
    with pytest.raises(UserError, match="no land between 43 and 52"):
        run(region=("KE",))
    with pytest.raises(UserError, match="more than a sample can have"):
        run(region=("DE",), spacing_km=0.01)
    assert not list(tmp_path.glob("patches/*"))


def test_the_plan_counts_a_spacing(run):
    ran = CliRunner().invoke(app, ["sample", "plan", "--region", "KE", "--spacing-km", "50"])
    assert ran.exit_code == 0, ran.output
    places = int(
        next(line for line in ran.output.splitlines() if line.startswith("places")).split()[1].replace(",", "")
    )
    assert places == pytest.approx(580_000 / 2500 / 0.55, rel=0.05)
