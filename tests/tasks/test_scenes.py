"""Which scene a place gets, over made-up items; and what is told of real ones."""

import datetime
import json

import numpy as np
import pyarrow.parquet
import pystac
import pytest
import shapely
import stac_geoparquet.arrow
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from tasks.core.items import baseline
from tasks.core.sampling import TILES, thin
from tasks.params import SampleParams
from tasks.scenes import choose, explain, newest

BOX = shapely.box(0, 0, 1, 1)


def item(name, day="2021-06-01", cloud=10.0, version="05.00", tile="31TAA", area=BOX):
    properties = {"eo:cloud_cover": cloud, "s2:processing_baseline": version, "s2:mgrs_tile": tile}
    taken = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
    return pystac.Item(name, shapely.geometry.mapping(area), list(area.bounds), taken, properties)


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
    assert {i.id for i in newest(items)} == {"new", "x"}
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
    kept = [sum(scene is not None for scene, _ in choose(tiles, rows(u), params)) for tiles in (two[:1], two)]
    assert abs(kept[0] - 6000 / TILES) < 5 * np.sqrt(6000 / TILES)
    assert abs(kept[1] - 2 * 6000 / TILES) < 5 * np.sqrt(2 * 6000 / TILES)
    everywhere = choose(two, rows(u), SampleParams())
    assert all(scene is not None for scene, _ in everywhere)


def rows(u):
    return np.column_stack([np.arange(len(u)), np.full((len(u), 2), 0.5), np.full(len(u), -1), u])


def real_items(folder):
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        yield from (i for i in content.get("features", [content]) if i.get("type") == "Feature")
    for path in sorted(folder.rglob("*.parquet")):
        yield from stac_geoparquet.arrow.stac_table_to_items(pyarrow.parquet.read_table(path))


def test_every_real_item_is_explained(fixtures_dir, tmp_path):
    told = 0
    for real in real_items(fixtures_dir):
        if not {"B04", "red"} & set(real["assets"]):
            continue
        (tmp_path / "item.json").write_text(json.dumps(real, default=str))
        found = explain(str(tmp_path / "item.json"))
        assert set(found) == {"offset", "already_applied", "reasons", "quarantined", "scale", "nodata"}
        version = baseline(real)
        assert found["offset"] == (-1000 if version >= (4, 0) and not found["already_applied"] else 0)
        assert found["reasons"]
        assert not found["quarantined"]
        told += 1
    assert told > 1100


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"type": "Feature"}', "\x00"])
def test_what_is_no_item_is_refused(tmp_path, content):
    (tmp_path / "item.json").write_text(content)
    with pytest.raises(UserError, match="is no STAC item"):
        explain(str(tmp_path / "item.json"))
