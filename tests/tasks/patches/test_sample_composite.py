"""A patch of several scenes: the median of what is clear, of one tile and season, after each one's offset."""

import numpy as np
import pytest

from infra import clusters, retries
from tasks.params import SampleParams
from tasks.patches.store import open_patches
from tasks.sample import decisive, sample_patches
from tests.archive import BANDS, CLEAR, CLOUD, PIXEL, catalog, columns, item, listed, scene

SIDE, PLACES = 64, [[300, 300], [600, 420]]


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("RANGEGRID_COLLECTION", "s2")
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "home").as_uri())


def sample(folder, items, monkeypatch, **more):
    monkeypatch.setenv("RANGEGRID_STAC_URL", catalog(folder, items))
    asked = {"patches": 2, "places": "list", "source": listed(folder, PLACES), "patch_pixels": SIDE, "bands": BANDS}
    asked |= {"scene": "composite", "min_clear_fraction": 0.5, "max_nodata_fraction": 0.2, "max_tries": 1}
    with clusters.connect("threads") as client:
        return open_patches(sample_patches(client, SampleParams(**asked | more)))


def clouds(rows):
    """A scene classification with clouds in some rows of 20 m."""
    classes = np.full((540, 540), CLEAR, np.uint8)
    classes[rows] = CLOUD
    return classes


def fine(data, band, place):
    """The pixels of a whole band under a window."""
    size = PIXEL.get(band, 10) // 10
    row, column = place[0] - SIDE // 2, place[1] - SIDE // 2
    return data.repeat(size, 0).repeat(size, 1)[row : row + SIDE, column : column + SIDE]


def old(made):
    """An item of a baseline that puts no offset into its numbers."""
    made["properties"] |= {"s2:processing_baseline": "02.14"}
    made["properties"]["s2:product_uri"] = made["properties"]["s2:product_uri"].replace("N0510", "N0214")
    for asset in made["assets"].values():
        asset.pop("raster:bands", None)
    return made


def test_a_composite_is_the_median_of_the_clear_pixels_of_one_season(tmp_path, monkeypatch):
    """By NumPy from the whole scenes; pixels that no scene sees have no data; other seasons and tiles add nothing."""
    scenes = {  # added to the numbers, offset, cloudy rows
        "a": (0, -1000, slice(136, 140)),
        "b": (400, -1000, slice(134, 142)),
        "c": (-910, 0, slice(138, 139)),
    }
    items, seen = [], {}
    for n, (name, (more, offset, rows)) in enumerate(scenes.items()):
        values = {band: (columns(band).astype(int) + more).astype(np.uint16) for band in BANDS}
        classes = clouds(rows)
        made = item(name, scene(tmp_path / name, values.get, classes), f"2021-0{6 + n}-15", cloud=n)
        items.append(old(made) if offset == 0 else made)
        seen[name] = (values, classes, offset)
    wild = scene(tmp_path / "wild", lambda band: columns(band) * 5)
    items += [item("winter", wild, "2021-12-15", cloud=3), item("tile", wild, "2021-07-20", cloud=3, tile="31TDJ")]
    patches = sample(tmp_path, items, monkeypatch)
    rows = patches.manifest.sort_values("row_id")
    assert rows["item_id"].tolist() == ["a b c"] * 2
    assert (rows["offset"] == -1000).all()
    for place, pixels in zip(PLACES, patches.pixels(slice(None))[rows.index], strict=True):
        for n, band in enumerate(BANDS):
            stack = []
            for values, classes, offset in seen.values():
                truth = fine(values[band], band, place).astype(float) + offset
                stack.append(np.where(fine(classes, "SCL", place) == CLEAR, truth, np.nan))
            expected = np.nan_to_num(np.nanmedian(stack, axis=0) + 1000, nan=0)
            np.testing.assert_array_equal(pixels[n], np.rint(expected))
    assert (patches.pixels(slice(None))[rows.index][0] == 0).any()


def test_a_scene_that_cannot_be_read_is_left_out_of_a_composite(tmp_path, monkeypatch):
    items = [item(name, scene(tmp_path / name), f"2021-0{n}-15", cloud=n) for n, name in ((6, "a"), (7, "b"), (8, "c"))]
    (tmp_path / "b/B05.tif").write_bytes(b"damaged")
    patches = sample(tmp_path, items, monkeypatch, composite_scenes=2)
    assert patches.manifest["item_id"].tolist() == ["a c"] * 2
    np.testing.assert_array_equal(patches.pixels(slice(0, 1))[0, 0], fine(columns("B02"), "B02", PLACES[0]))


def test_other_samples_are_what_they_were(tmp_path, monkeypatch):
    """A number of scenes that is not used decides nothing."""
    monkeypatch.setenv("RANGEGRID_STAC_URL", catalog(tmp_path, []))
    assert decisive(SampleParams()) == decisive(SampleParams(composite_scenes=3))
    assert "composite_scenes" not in decisive(SampleParams())
    assert decisive(SampleParams(scene="composite"))["composite_scenes"] == 5
