"""Sampling from odd but legal archives: which scene a place gets, and what is no pixel."""

import numpy as np
import pytest

from infra import clusters, retries, storage
from infra.errors import Unavailable, UserError
from tasks.params import SampleParams
from tasks.patches.store import open_patches
from tasks.sample import sample_patches
from tests import archive
from tests.archive import BANDS, CLEAR, CLOUD, catalog, columns, item, listed, scene, served

HALF = archive.SIDE // 20 // 2
PLACES = [[r, c] for r in (200, 500, 800) for c in (150, 350, 750, 950)]


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("RANGEGRID_COLLECTION", "s2")
    monkeypatch.setenv("RANGEGRID_STAC_URL", str(tmp_path / "items.json"))
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "home").as_uri())


def params(folder, places, **more):
    source = listed(folder, places)
    asked = {"patches": len(places), "places": "list", "source": source, "patch_pixels": 64, "shard_patches": 64}
    return SampleParams(**asked | {"datetime": "2021-01-01/2021-12-31", "bands": BANDS, "max_tries": 1} | more)


def run(folder, items, places, **more):
    catalog(folder, items)
    with clusters.connect("threads") as client:
        return open_patches(sample_patches(client, params(folder, places, **more)))


def assert_register(patches):
    """Every band of every patch holds the columns that B02 says."""
    for fine, twenty, sixty in patches.pixels(slice(None)).astype(int):
        np.testing.assert_array_equal(twenty - 1000, (fine - 1000) // 2 * 2)
        np.testing.assert_array_equal(sixty - 1000, (fine - 1000) // 6 * 6)


def half(left):
    """A scene's classes and numbers with data in its left or right half alone."""
    classes = np.full((2 * HALF, 2 * HALF), CLEAR, np.uint8)
    classes[:, HALF:] *= not left
    classes[:, :HALF] *= left

    def values(band):
        data = columns(band)
        middle = data.shape[1] // 2
        data[:, middle:] *= not left
        data[:, :middle] *= left
        return data

    return values, classes


def test_places_at_pixel_centres_get_bands_that_register(tmp_path):
    places = np.random.default_rng(0).integers(150, 900, (40, 2)) + 0.5
    assert_register(run(tmp_path, [item("a", scene(tmp_path / "a"))], places.tolist()))


def test_a_tile_in_two_halves_serves_both(tmp_path):
    halves = [
        item(f"S2A_{n}", scene(tmp_path / n, *half(n == "left")), made=made)
        for n, made in (("left", "20210615T130912"), ("right", "20210615T100652"))
    ]
    patches = run(tmp_path, halves, PLACES)
    left = [column < 540 for _, column in PLACES]
    assert (patches.manifest.sort_values("row_id")["item_id"] == np.where(left, "S2A_left", "S2A_right")).all()
    assert_register(patches)
    assert patches.card.passed_over == {"nodata": 6}
    assert patches.card.rejected == {}


def test_a_cloud_just_there_leaves_the_place_to_the_next_scene(tmp_path):
    cloud = np.full((540, 540), CLEAR, np.uint8)
    cloud[100:200, 100:200] = CLOUD
    items = [item("a", scene(tmp_path / "a", classes=cloud), cloud=1.0)]
    items += [item(n, scene(tmp_path / n), f"2021-0{m}-01", cloud=m) for n, m in (("b", 4), ("c", 5))]
    found = run(tmp_path, items, [[300, 300], [800, 800]]).manifest.sort_values("row_id")
    assert found["item_id"].tolist() == ["b", "a"]
    assert (found["clear_fraction"] == 1).all()


def test_a_footprint_of_half_the_world_takes_no_place(tmp_path):
    ring = [[-60, -10], [60, -10], [60, 80], [-60, 80], [-60, -10]]
    far = {}
    for band in (*BANDS, "SCL"):
        size = archive.PIXEL.get(band, 10)
        data = columns(band) if band != "SCL" else np.full((540, 540), CLEAR, np.uint8)
        far[band] = archive.write(tmp_path / f"far/{band}.tif", data, size, left=archive.LEFT + 200_000)
    bogus = item("bogus", far, cloud=0.0, geometry={"type": "Polygon", "coordinates": [ring]}, tile="31TGJ")
    patches = run(tmp_path, [bogus, item("good", scene(tmp_path / "good"))], PLACES)
    assert set(patches.manifest["item_id"]) == {"good"}


def test_a_scene_that_lacks_a_band_leaves_its_places_to_others(tmp_path):
    lacking = item("lacking", scene(tmp_path / "l", bands=("B02", "B05")), "2021-07-01", cloud=0.0)
    patches = run(tmp_path, [lacking, item("whole", scene(tmp_path / "w"))], PLACES[:2])
    assert set(patches.manifest["item_id"]) == {"whole"}


def test_a_band_with_another_corner_leaves_its_places_to_others(tmp_path):
    """Half a pixel of B05, which is one of B02."""
    apart = scene(tmp_path / "apart")
    apart["B05"] = archive.write(tmp_path / "apart/B05.tif", columns("B05"), 20, left=archive.LEFT + 10)
    items = [item("apart", apart, "2021-07-01", cloud=0.0), item("good", scene(tmp_path / "good"))]
    assert set(run(tmp_path, items, PLACES[:2]).manifest["item_id"]) == {"good"}
    with pytest.raises(UserError, match=r"none of 1 scenes can be read: .*B05\.tif .*its corner is"):
        run(tmp_path, items[:1], PLACES[:3])


def test_numbers_beyond_the_format_are_flagged_and_kept_where_nothing_else_serves(tmp_path):
    def wrapped(band):
        return np.where(np.arange(SIZE[band])[:, None] < SIZE[band] // 2, 64_900, columns(band)).astype(np.uint16)

    bad = item("bad", scene(tmp_path / "bad", wrapped), cloud=0.0)
    patches = run(tmp_path, [bad], [[540, 300], [800, 600]])
    row = patches.manifest.set_index("row_id")["offset_check"]
    assert row[0] == "deny"
    assert row[1] == "agree"
    light = patches.reflectance(slice(None))
    assert (np.isnan(light) == (patches.pixels(slice(None)) > 32_767)).all()
    assert np.isnan(light).any()
    good = item("good", scene(tmp_path / "good"), "2021-07-01")
    found = run(tmp_path, [bad, good], [[540, 300], [800, 601]]).manifest.sort_values("row_id")
    assert found["item_id"].tolist() == ["good", "bad"]
    assert set(found["offset_check"]) == {"agree"}


SIZE = {band: archive.SIDE // archive.PIXEL.get(band, 10) for band in BANDS}


@pytest.mark.parametrize("sparse", [False, True])
def test_nodata_of_the_header_is_nodata(tmp_path, sparse):
    def filled(band):
        data = columns(band)
        data[:, : data.shape[1] // 2] = 65535
        return data

    odd = item("odd", scene(tmp_path / "odd", filled, nodata=65535, SPARSE_OK=sparse), cloud=0.0)
    assert run(tmp_path, [odd], [[540, 800]]).manifest["nodata_fraction"].tolist() == [0]
    with pytest.raises(UserError, match="1 nodata"):
        run(tmp_path, [odd], [[540, 200]])


def test_hrefs_are_read_with_their_query_and_stored_without(tmp_path):
    files = scene(tmp_path / "a b")

    def guarded(path):
        return None if "Signature=abc%2Bdef" in path else (403, {})

    with served(tmp_path, guarded) as server:
        hrefs = {band: f"{server.url}/a b/{band}.tif?Signature=abc%2Bdef" for band in files}
        patches = run(tmp_path, [item("a", hrefs)], PLACES[:3])
    assert_register(patches)
    stored = "".join(
        storage.read(storage.join(patches.url, name)).decode("latin1") for name in storage.paths(patches.url)
    )
    assert "Signature" not in stored
    assert "Signature" not in patches.manifest.to_csv()


def test_an_object_refused_for_good_is_gone_and_counted(tmp_path):
    """The first scene has one band of another scene's folder, where that object is not, and nothing may be listed."""
    files = scene(tmp_path / "good")
    with served(tmp_path, lambda path: (403, {}) if path.startswith("/bad/B05") else None) as server:
        scene(tmp_path / "bad")
        items = [
            item(n, {b: f"{server.url}/{n}/{b}.tif" for b in files}, day, cloud)
            for n, day, cloud in (("good", "2021-06-15", 9.0), ("bad", "2021-08-01", 1.0))
        ]
        patches = run(tmp_path, items, PLACES[:3])
        assert set(patches.manifest["item_id"]) == {"good"}
        with pytest.raises(UserError, match=r"none of 1 scenes can be read: .*bad/B05\.tif.*access is refused"):
            run(tmp_path, items[1:], PLACES[:4])


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "cannot be read"), (b"<html>" + bytes(100), "it is HTML or XML")],
)
def test_a_catalog_whose_bands_cannot_be_read_is_told_before_work(tmp_path, content, said):
    files = scene(tmp_path / "a")
    for path in files.values():
        archive.Path(path).write_bytes(content)
    with served(tmp_path) as server:
        made = [item(f"i{n}", {b: f"{server.url}/a/{b}.tif" for b in files}, f"2021-0{n}-01") for n in (1, 2)]
        with pytest.raises(UserError, match=rf"none of 2 scenes can be read: .*{said}") as caught:
            run(tmp_path, made, PLACES)
    assert not isinstance(caught.value, Unavailable)
    assert "places" not in str(caught.value)
