"""Which scene a place gets, over made-up items; and what is told of real ones."""

import datetime
import json
from dataclasses import asdict

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from hypothesis import given
from hypothesis import strategies as st
from rasterio.windows import Window

from infra.errors import UserError
from infra.imagery.cogs import read_windows
from infra.stac.items import UsableItem
from tasks.core.earth.sampling import TILES, thin
from tasks.core.sentinel2.radiometry import decide
from tasks.params import SampleParams
from tasks.patches.scenes import assets_of, choose, describe, explain, find_items, newest

BOX = shapely.box(0, 0, 1, 1)


def item(name, day="2021-06-01", cloud=10.0, version="05.00", tile="31TAA", area=BOX):
    properties = {"eo:cloud_cover": cloud, "s2:processing_baseline": version, "s2:mgrs_tile": tile}
    taken = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
    made = pystac.Item(name, shapely.geometry.mapping(area), list(area.bounds), taken, properties)
    made.add_asset("visual", pystac.Asset("visual.tif"))
    return UsableItem.parse(made.to_dict())


def candidates(n=1, lon=0.5, lat=0.5, season=-1, u=0.0):
    return np.array([[i, lon, lat, season, u] for i in range(n)], float)


def chosen(items, params, **place):
    return choose(items, candidates(**place), params)[0]


def test_the_least_cloudy():
    items = [item("a", cloud=20), item("b", "2021-07-01", cloud=3), item("c", "2021-08-01", cloud=40)]
    assert chosen(items, SampleParams())[0].id == "b"


def test_the_nearest_to_a_date():
    items = [item("a", "2021-01-01", 0), item("b", "2021-06-20", 50), item("c", "2021-06-20", 40)]
    assert chosen(items, SampleParams(scene="nearest", date="2021-06-30"))[0].id == "c"


@pytest.mark.parametrize(("season", "expected"), [(0, "w"), (1, None), (2, "s"), (3, "a")])
def test_one_of_each_season(season, expected):
    items = [item("w", "2021-12-30"), item("s", "2021-07-01"), item("t", "2021-08-01", 50), item("a", "2021-09-01")]
    scene, reason = chosen(items, SampleParams(scene="seasons"), season=season)
    assert (scene and scene.id) == expected
    assert reason == ("" if expected else "no scene")


def test_the_newest_baseline_among_duplicates_is_the_only_one():
    items = [item("old", version="02.14", cloud=0), item("new", version="05.00", cloud=5), item("x", tile="31TBB")]
    assert {scene.item.id for scene in newest(map(describe, items))} == {"new", "x"}
    assert chosen(items[:2], SampleParams())[0].id == "new"


@given(st.permutations(range(5)))
def test_the_order_of_the_items_changes_nothing(order):
    items = [item(f"i{i}", f"2021-0{1 + i % 3}-01", 10, f"0{2 + i}.00") for i in range(5)]
    assert chosen([items[i] for i in order], SampleParams())[0].id == chosen(items, SampleParams())[0].id


def test_a_patch_that_leaves_its_scene_has_none():
    assert chosen([item("a")], SampleParams(), lon=0.999) == (None, "no scene")


def test_by_tile_a_place_is_as_likely_as_it_has_tiles():
    two = [item("a"), item("b", tile="31TBB")]
    params = SampleParams(places="tile")
    u = thin(6000, 0)
    kept = [sum(bool(scene) for scene, _ in choose(tiles, rows(u), params)) for tiles in (two[:1], two)]
    assert abs(kept[0] - 6000 / TILES) < 5 * np.sqrt(6000 / TILES)
    assert abs(kept[1] - 2 * 6000 / TILES) < 5 * np.sqrt(2 * 6000 / TILES)
    everywhere = choose(two, rows(u), SampleParams())
    assert all(scene for scene, _ in everywhere)


def rows(u):
    return np.column_stack([np.arange(len(u)), np.full((len(u), 2), 0.5), np.full(len(u), -1), u])


def test_reprocessed_scenes_of_one_overpass_are_duplicates_whoever_names_them():
    """The datatake's id ends in the baseline, so two processings differ in it."""
    pairs = [
        {"s2:datatake_id": "GS2A_20200219T112111_024344_N02.14"},
        {"s2:datatake_id": "GS2A_20200219T112111_024344_N05.00", "grid:code": "MGRS-29RKH"},
        {"sentinel:product_id": "S2A_MSIL2A_20200219T112111_N0301_R037_T29RKH_20200219T123947"},
    ]
    items = [item(f"S2A_29RKH_20200219_{n}_L2A", "2020-02-19") for n in range(3)]
    for made, properties in zip(items, pairs, strict=True):
        made.properties = {"eo:cloud_cover": 10.0 * len(properties)} | properties
    assert [scene.item.id for scene in newest(map(describe, items))] == ["S2A_29RKH_20200219_1_L2A"]
    items[1].properties["s2:datatake_id"] = "GS2A_20200219T112131_024344_N05.00"
    assert len(newest(map(describe, items))) == 2, "another overpass"


def test_a_quarantined_scene_leaves_the_place_to_another():
    unclear, clear = item("a", cloud=0), item("b", "2021-07-01", cloud=30)
    unclear.properties["earthsearch:boa_offset_applied"] = "perhaps"
    assert chosen([unclear, clear], SampleParams())[0].id == "b"
    assert chosen([unclear], SampleParams()) == (None, "radiometry quarantined")


def test_a_scene_that_does_not_tell_its_clouds_comes_last():
    silent, cloudy = item("a", cloud=None), item("b", "2021-07-01", cloud=90)
    assert chosen([silent, cloudy], SampleParams())[0].id == "b"
    assert chosen([silent], SampleParams())[0].id == "a"


@pytest.mark.parametrize("unsplit", [True, False])
def test_a_scene_across_180_holds_places_on_both_sides(unsplit):
    split = shapely.MultiPolygon([shapely.box(179, -17, 180, -16), shapely.box(-180, -17, -179.5, -16)])
    spanning = shapely.Polygon([(179, -17), (-179.5, -17), (-179.5, -16), (179, -16)])
    items = [item("a", area=spanning if unsplit else split)]
    for lon, held in [(179.5, True), (-179.7, True), (179.9999, True), (-180.0, True), (-179.4, False), (0.0, False)]:
        scene, _ = chosen(items, SampleParams(), lon=lon, lat=-16.5)
        assert (scene is not None) == held, lon


def test_a_place_in_six_tiles_is_not_six_times_as_likely(colorado):
    """Places by area over the footprints of a month: those in more tiles are taken as often as their area."""
    month = {i["id"]: i for i in colorado if i["properties"]["datetime"][:7] == "2024-08"}
    items = [UsableItem.parse(i) for i in month.values()]
    rng = np.random.default_rng(0)
    lonlat = rng.uniform((-109.5, 36.5), (-101.5, 41.5), (1500, 2))  # by degrees: enough in this narrow band
    table = np.column_stack([np.arange(1500), lonlat, np.full(1500, -1), rng.random(1500)])
    shapes = [shapely.geometry.shape(i["geometry"]) for i in month.values()]
    codes = np.array([i["properties"]["s2:mgrs_tile"] for i in month.values()])
    held = np.array([shapely.intersects_xy(shape, *lonlat.T) for shape in shapes])
    tiles = np.array([len(set(codes[held[:, n]])) for n in range(1500)])
    once, often = tiles == 1, tiles > 1
    assert min(once.sum(), often.sum()) > 200
    kept = {
        places: np.array([bool(scene) for scene, _ in choose(items, table, SampleParams(places=places))])
        for places in ("area", "tile")
    }
    assert kept["area"][once].mean() > 0.95
    assert kept["area"][often].mean() > 0.95
    ratio = kept["tile"][often].mean() / kept["tile"][once].mean()
    assert ratio == pytest.approx(tiles[often].mean(), rel=0.3), "S2-100K's rule, for comparison"


def test_every_item_is_explained_as_it_is_chosen(items, tmp_path):
    """The command reads the file as it comes, the sample an item of pystac's: both decide alike."""
    for listed in items.values():
        for real in listed[:: max(1, len(listed) // 60)]:
            (tmp_path / "item.json").write_text(json.dumps(real))
            found = explain(str(tmp_path / "item.json"))
            assert set(found) == {"offset", "already_applied", "reasons", "quarantined", "scale", "nodata"}
            assert found == asdict(decide(pystac.Item.from_dict(real).to_dict(transform_hrefs=False)))
            assert found == asdict(decide(real))


def test_a_scene_is_found_offline_and_read(whole_scene, tmp_path, monkeypatch):
    """The files of one scene beside its item, as an item collection."""
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [whole_scene.item]}))
    monkeypatch.setenv("RANGEGRID_STAC_URL", str(tmp_path / "items.json"))
    monkeypatch.setenv("RANGEGRID_COLLECTION", "sentinel-2-l2a")
    day = whole_scene.item["properties"]["datetime"][:10]
    params = SampleParams(datetime=day, resolution_m=100, patch_pixels=32)
    place = whole_scene.places([[512, 400]])
    (lon, lat), *_ = place
    scene, _ = choose(find_items(place, params), candidates(lon=lon, lat=lat), params)[0]
    (window,) = read_windows(assets_of(scene)["B04"], place, 32, 100)
    with rasterio.open(whole_scene.files["B04"]) as source:
        np.testing.assert_array_equal(window, source.read(1, window=Window(512 - 16, 400 - 16, 32, 32)))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"type": "Feature"}', "\x00"])
def test_what_is_no_item_is_refused(tmp_path, content):
    (tmp_path / "item.json").write_text(content)
    with pytest.raises(UserError, match="is no STAC item"):
        explain(str(tmp_path / "item.json"))
