"""Sampling from the sandbox's real STAC and S3 servers, in every way."""

import numpy as np
import pandas as pd
import pytest
import rasterio
from pyproj import Transformer
from rasterio.session import DummySession
from rasterio.windows import Window

from infra import clusters, storage
from infra.errors import UserError
from tasks.estimate import estimate
from tasks.params import SampleParams
from tasks.patches import open_patches
from tasks.sample import sample_patches

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


def test_a_larger_sample_holds_the_smaller(run):
    small, large = run(patches=12).manifest, run(patches=30).manifest
    both = large.merge(small, on="row_id")
    assert len(both) == 12
    pd.testing.assert_series_equal(both.sha256_x, both.sha256_y, check_names=False)


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
        ("lon,lat\n2,95\n", "row 0: lon 2.0, lat 95.0 is outside"),
        ("x,y\n2,5\n", "give a CSV or Parquet with lon and lat"),
        ("lon,lat\n2,nan\n", "is outside"),
    ],
)
def test_a_wrong_list_is_refused_before_work(run, tmp_path, text, message):
    (tmp_path / "wrong.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        run(places="list", source=str(tmp_path / "wrong.csv"))


def test_the_estimate_counts_real_places():
    small, large = (estimate(SampleParams(**COMMON | {"patches": n}), 2) for n in (100, 1000))
    assert small.places == pytest.approx(100 / 0.55, abs=1)
    assert small.requests < large.requests
    assert large.bytes_stored == pytest.approx(1000 * 3 * 16 * 16 * 1.4, rel=0.01)
