"""Which offset, and why."""

import copy
import itertools
import re
from collections import Counter
from dataclasses import astuple

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.sentinel2.items import acquisition, band_assets, baseline, tile
from tasks.core.sentinel2.radiometry import check_numbers, decide, to_reflectance
from tasks.params import BANDS
from tests import providers
from tests.providers import FORMS


def item(version=None, declared=None, applied=None, name="x"):
    properties = {}
    if version:
        properties["s2:processing_baseline"] = version
    if applied is not None:
        properties["earthsearch:boa_offset_applied"] = applied
    bands = [] if declared is None else [{"scale": 0.0001, "offset": declared}]
    return {"id": name, "properties": properties, "assets": {"red": {"raster:bands": bands}}}


@pytest.mark.parametrize(
    ("made", "offset", "applied"),
    [
        (item("03.01"), 0, False),
        (item("02.14", 0.0), 0, False),
        (item("04.00"), -1000, False),
        (item("05.11", -0.1), -1000, False),
        (item("05.11", -0.1, True), 0, True),
        (item("05.09", 0, True), 0, True),
        (item("02.08", None, False), 0, False),
        (item(None, -0.1), -1000, False),
        (item(None, 0), 0, False),
        (item(name="S2A_MSIL2A_20180101T000001_N0500_R116_T58UFE_20220101T000000"), -1000, False),
    ],
)
def test_the_signals_decide(made, offset, applied):
    found = decide(made)
    assert (found.offset, found.already_applied, found.quarantined) == (offset, applied, False)
    assert found.reasons


@pytest.mark.parametrize(
    "made", [item(), item("03.01", -0.1), item("05.00", 0.0), item("05.00", -0.2), item("03.01", None, True)]
)
def test_contradictions_are_quarantined(made):
    assert decide(made).quarantined


# Made-up items, against the worlds that could be


PROVIDER_FILES = {
    "": "https://files.example/{}.tif",
    "pc": "https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/{}.tif",
    "c1": "https://e84-earth-search-sentinel-data.s3.us-west-2.amazonaws.com/{}.tif",
    "es": "https://sentinel-cogs.s3.us-west-2.amazonaws.com/{}.tif",
}
BASELINES = {
    "s2:processing_baseline": "{}",
    "processing:version": "{}",
    "sentinel:processing_baseline": "{}",
    "s2:product_uri": "S2A_MSIL2A_20200219T112111_N{}_R037_T29RKH_20200219T123947.SAFE",
    "s2:datatake_id": "GS2A_20200219T112111_024344_N{}",
}


@st.composite
def made_items(draw):
    """An item in any provider's manner, and what was put into it: baseline, declared offset, flag, provider."""
    version = draw(st.sampled_from([None, "02.14", "03.01", "04.00", "05.11"]))
    declared = draw(st.sampled_from([None, 0.0, -0.1]))
    applied = draw(st.sampled_from([None, True, False]))
    provider = draw(st.sampled_from(sorted(PROVIDER_FILES)))
    properties = {}
    if version:
        for key in draw(st.lists(st.sampled_from(sorted(BASELINES)), min_size=1, unique=True)):
            properties[key] = BASELINES[key].format(version.replace(".", "") if "uri" in key else version)
    if applied is not None:
        properties[draw(st.sampled_from(["earthsearch:boa_offset_applied", "sentinel:boa_offset_applied"]))] = applied
    bands = draw(st.sampled_from([["B04", "B08"], ["red", "nir"], ["B04_10m", "B04_20m", "B08_10m"]]))
    where = draw(st.sampled_from(["raster:bands", "bands", "asset", "properties"]))
    assets = {key: {"href": PROVIDER_FILES[provider].format(key)} for key in bands}
    put(declared, where, properties, assets)
    return {"id": "x", "properties": properties, "assets": assets}, (version, declared, applied, provider)


def put(declared, where, properties, assets):
    """Writes a declared offset where STAC 1.0 or 1.1 has it."""
    if declared is None:
        return
    short, prefixed = {"scale": 0.0001, "offset": declared}, {"raster:scale": 0.0001, "raster:offset": declared}
    if where == "properties":
        properties.update(prefixed)
    for asset in assets.values():
        if where != "properties":
            asset.update(prefixed if where == "asset" else {where: [short if where == "raster:bands" else prefixed]})


def possible_offsets(version, declared, applied, provider):
    """The offsets of all worlds that the signals allow.

    A world is whether ESA put the offset in and whether the provider took it out.
    """
    worlds = [(False, False), (True, False), (True, True)]
    if version:
        worlds = [w for w in worlds if w[0] == (version >= "04.00")]
    worlds = [w for w in worlds if w[1] == bool(applied)]
    if provider == "pc":
        worlds = [w for w in worlds if not w[1]]
    if declared is not None and not applied:
        worlds = [w for w in worlds if w[0] == (declared < 0)]
    return {-1000 if put_in and not taken_out else 0 for put_in, taken_out in worlds}


@given(made_items())
def test_decided_where_one_world_is_possible_and_quarantined_elsewhere(made):
    item, signals = made
    found, offsets = decide(item), possible_offsets(*signals)
    assert found.quarantined == (len(offsets) != 1)
    assert found.already_applied == (not found.quarantined and signals[2] is True)
    assert found.quarantined or {found.offset} == offsets
    assert len(found.reasons) > (0 if found.quarantined else 1), "some signal is named"


@given(made_items(), st.sampled_from(["raster:bands", "bands", "asset"]))
def test_an_agreeing_signal_changes_nothing_and_a_denying_one_quarantines(made, where):
    item, _ = made
    before = decide(item)
    if before.quarantined or before.already_applied:
        return
    agreeing = copy.deepcopy(item)
    agreeing["properties"]["s2:processing_baseline"] = "05.00" if before.offset else "03.00"
    put(before.offset / 10_000, where, agreeing["properties"], agreeing["assets"])
    after = decide(agreeing)
    assert (after.offset, after.quarantined) == (before.offset, False)
    denying = copy.deepcopy(item)
    denying["properties"]["s2:product_id"] = f"S2A_MSIL2A_N{'0301' if before.offset else '0500'}_"
    assert decide(denying).quarantined


SCALAR = st.none() | st.booleans() | st.floats() | st.sampled_from([10**400, -1, "05.00", "0214", 1e-4, -0.1, "x"])
JSON = SCALAR | st.lists(SCALAR, max_size=2) | st.dictionaries(st.sampled_from(["a", "scale"]), SCALAR, max_size=2)
KEYS = st.sampled_from([*BASELINES, "earthsearch:boa_offset_applied", "raster:scale", "raster:offset"])
BAND = st.dictionaries(st.sampled_from(["scale", "offset", "name", "raster:scale", "raster:offset"]), JSON, max_size=3)
ASSET = st.dictionaries(
    st.sampled_from(["raster:bands", "bands", "eo:bands", "gsd", "href"]), JSON | st.lists(BAND, max_size=2), max_size=3
)


@settings(max_examples=300)
@given(
    JSON | st.dictionaries(KEYS, JSON, max_size=3),
    JSON | st.dictionaries(st.sampled_from(["B04", "red", "B04_10m", "x", "SCL"]), JSON | ASSET, max_size=3),
)
def test_whatever_an_item_says_it_is_decided_or_quarantined(properties, assets):
    found = decide({"id": "x", "properties": properties, "assets": assets})
    assert found.offset in (0, -1000)
    assert found.reasons
    assert found.quarantined or len(found.reasons) > 1


@pytest.mark.parametrize("value", ["true", 1, 0.0, "yes", []])
def test_a_flag_that_is_neither_true_nor_false_is_quarantined(value):
    assert decide(item("05.00", None, value)).quarantined


def test_bands_that_contradict_each_other_are_quarantined():
    made = item("05.00", -0.1)
    made["assets"]["B08"] = {"raster:bands": [{"scale": 0.0001, "offset": 0}]}
    assert decide(made).quarantined


@pytest.mark.parametrize(
    "beside",
    [
        {"red-jp2": {"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}},
        {"aot": {"raster:bands": [{"scale": 0.001, "offset": 0}]}},
        {"scl": {"raster:bands": [{"scale": 1, "offset": 0}]}},
        {"visual": {"bands": [{"name": "B04", "raster:scale": 1, "raster:offset": 0}]}},
    ],
)
def test_only_what_is_read_counts(beside):
    made = item("05.00", 0.0, True)
    made["assets"] |= beside
    assert decide(made).already_applied
    assert not decide(made).quarantined


@pytest.mark.parametrize("told", [("eo:bands", "bands"), ("eo:bands", "raster:bands", "bands"), ("bands",)])
@pytest.mark.parametrize("case", [str, str.lower])
def test_bands_told_by_several_extensions_are_known(told, case):
    """Where the keys tell nothing; by name in any case."""
    entry = {band: {key: [{"name": case(band)}] for key in told} for band in (*BANDS, "SCL")}
    assets = {f"layer-{n}": {"href": f"https://x/{n}.tif"} | more for n, more in enumerate(entry.values())}
    assert band_assets({"assets": assets}) == dict(zip((*BANDS, "SCL"), assets, strict=True))
    assert list(band_assets({"assets": {case(band): {"href": "x"} for band in entry}})) == [*BANDS, "SCL"]


@pytest.mark.parametrize(("declared", "offset", "quarantined"), [(-0.1, -1000, False), (-1000, 0, True), (0, 0, True)])
def test_an_offset_without_a_scale_is_of_reflectance(declared, offset, quarantined):
    made = item("05.11")
    for asset in made["assets"].values():
        asset["raster:offset"] = declared
    assert (decide(made).offset, decide(made).quarantined) == (offset, quarantined)


def test_a_users_own_processing_tells_no_baseline():
    assert decide(item("99.99")).quarantined
    assert decide(item("99.99", -0.1)).offset == -1000


# Items in each archive's form, and every recorded one


@pytest.mark.parametrize("name", FORMS)
def test_the_offset_in_each_archives_form(name):
    """ESA puts it in from baseline 04.00 on, and Earth Search alone takes it off again, and says so."""
    form, all_taken = FORMS[name]
    for taken in all_taken:
        found, shifted, taken_off = decide(form(taken)), taken.baseline >= "04.00", name == "Earth Search"
        assert not found.quarantined
        assert found.offset == (-1000 if shifted and not taken_off else 0)
        assert found.already_applied == (shifted and taken_off)


@pytest.mark.parametrize("taken", [providers.OLD, providers.NEW])
def test_earth_search_that_took_nothing_off(taken):
    found = decide(providers.earth_search(taken, applied=False))
    assert (found.offset, found.already_applied) == (-1000 if taken is providers.NEW else 0, False)


def test_the_recorded_items_of_each_provider(recorded_items):
    assert {name: len(items) for name, items in recorded_items.items()} == {
        "Digital Earth Africa": 1,
        "Planetary Computer": 1137,
        "Earth Search, Collection 1": 10,
        "Earth Search": 4,
    }
    table = {
        (name, f"{baseline(i)[0]:02d}.{baseline(i)[1]:02d}", *astuple(decide(i))[:2], decide(i).quarantined)
        for name, items in recorded_items.items()
        for i in items
    }
    assert table == {
        ("Digital Earth Africa", "05.10", -1000, False, False),
        ("Planetary Computer", "02.12", 0, False, False),
        ("Planetary Computer", "05.10", -1000, False, False),
        ("Planetary Computer", "05.11", -1000, False, False),
        ("Earth Search, Collection 1", "05.10", -1000, False, False),
        ("Earth Search", "02.12", 0, False, False),
        ("Earth Search", "02.14", 0, False, False),
    }


def test_every_band_of_every_item_has_its_asset(items):
    """Against the file that the asset names, which ends in the band's own name at every provider."""
    for real in itertools.chain.from_iterable(items.values()):
        keys = band_assets(real)
        assert list(keys) == [*BANDS, "SCL"]
        for band, key in keys.items():
            assert re.search(rf"[/_]{band}(_\d\dm)?\.(tif|jp2)$", real["assets"][key]["href"]), (real["id"], band, key)


def test_tile_and_acquisition_of_every_item(items):
    """Against the product's own name, which each provider keeps somewhere."""
    for real in itertools.chain.from_iterable(items.values()):
        properties = real["properties"]
        name = properties.get("s2:product_uri") or properties.get("sentinel:product_id") or real["id"]
        satellite, _, sensed, _, _, square, *_ = name.split("_")
        assert tile(real) == square[1:]
        assert acquisition(real) == f"{satellite} {sensed} {square[1:]}"


# The numbers themselves


def test_reflectance_masks_before_it_shifts():
    dn = np.array([[[[0, 1, 1000, 1500, 20000]]]], np.uint16)
    np.testing.assert_allclose(to_reflectance(dn, -1000)[0, 0, 0], [np.nan, 0, 0, 0.05, 1], atol=1e-6)
    np.testing.assert_allclose(to_reflectance(dn, np.array([0]))[0, 0, 0], [np.nan, 1e-4, 0.1, 0.15, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("darkest", "offset", "share", "expected"),
    [
        (1010, -1000, 0.5, "agree"),
        (150, -1000, 0.5, "deny"),
        (150, -1000, 0.0, "deny"),
        (150, 0, 0.5, "agree"),
        (1200, 0, 0.5, "deny"),
        (1200, 0, 0.0, "silent"),
    ],
)
def test_the_dark_end_confirms_or_denies(darkest, offset, share, expected):
    rng = np.random.default_rng(0)
    patch = rng.integers(darkest, darkest + 3000, (4, 64, 64)).astype(np.uint16)
    patch[2] = rng.integers(darkest, darkest + 40, (64, 64))
    patch[:, :3] = 0
    dark, told = check_numbers(patch, offset, share)
    assert told == expected
    assert darkest <= dark <= darkest + 40


def test_no_numbers_tell_nothing():
    assert check_numbers(np.zeros((2, 4, 4), np.uint16), -1000, 1.0)[1] == "silent"


DARK = ["511198", "526850", "502692", "322265", "275979", "566084", "25630", "286743"]
BRIGHT = ["252161", "57755"]  # nothing in them is dark
SURFACES = {  # reflectance in blue, green, red and near infrared
    "forest": (0.025, 0.045, 0.03, 0.3),
    "lake": (0.035, 0.03, 0.015, 0.008),
    "town": (0.11, 0.12, 0.13, 0.2),
    "sand": (0.16, 0.25, 0.35, 0.42),
    "cloud": (0.6, 0.6, 0.6, 0.65),
}


def numbers(surfaces, side=64):
    """Numbers without the offset, (band, y, x): surfaces in blocks of 8 pixels, with noise and the sun on slopes."""
    rng = np.random.default_rng(len(surfaces))
    blocks = rng.integers(len(surfaces), size=(side // 8, side // 8)).repeat(8, 0).repeat(8, 1)
    blocks[:8, :8] = 0  # at least one block is of the first
    reflectance = np.array([SURFACES[name] for name in surfaces])[blocks].transpose(2, 0, 1)
    lit = rng.normal(1, 0.05, (side, side)) * reflectance + rng.normal(0, 0.002, reflectance.shape)
    return np.clip(lit * 10_000, 1, None).astype(np.uint16)


def patches(request, made, recorded):
    """Numbers without the offset: made up, or the recorded patches of these names."""
    if request.param == "made up":
        return {"-".join(surfaces): numbers(surfaces) for surfaces in made}
    folder = request.getfixturevalue("fixtures_dir") / "s2_patches"
    return {name: rasterio.open(folder / f"patch_{name}.tif").read() for name in recorded}


@pytest.fixture(params=["made up", "recorded"])
def dark(request):
    return patches(request, [("forest",), ("lake",), ("forest", "town"), ("lake", "sand", "cloud")], DARK)


@pytest.fixture(params=["made up", "recorded"])
def bright(request):
    return patches(request, [("sand",), ("cloud",), ("sand", "cloud")], BRIGHT)


def with_offset(numbers):
    """As ESA has written them since baseline 04.00."""
    return np.where(numbers > 0, numbers + np.uint16(1000), 0).astype(np.uint16)


def test_a_wrong_decision_on_a_dark_patch_is_denied_and_a_right_one_is_not(dark):
    for name, patch in dark.items():
        assert check_numbers(patch, 0, 0.5)[1] == "agree", name
        assert check_numbers(patch, -1000, 0.5)[1] == "deny", name
        assert check_numbers(with_offset(patch), -1000, 0.5)[1] == "agree", name
        assert check_numbers(with_offset(patch), 0, 0.5)[1] == "deny", name


def test_without_vegetation_and_water_only_too_dark_numbers_speak(dark):
    for name, patch in dark.items():
        assert check_numbers(patch, -1000, 0.0)[1] == "deny", name
        assert check_numbers(with_offset(patch), -1000, 0.0)[1] == "silent", name
        assert check_numbers(with_offset(patch), 0, 0.0)[1] == "silent", name


def test_a_bright_patch_tells_nothing(bright):
    for name, patch in bright.items():
        for written in (patch, with_offset(patch)):
            told = {check_numbers(written, offset, 0.0)[1] for offset in (0, -1000)}
            assert told == {"silent"}, name


@pytest.fixture(params=["made up", "recorded"])
def desert(request):
    """Numbers without the offset of a desert with some green and water, and its classification at the same pixels."""
    if request.param == "recorded":
        folder = request.getfixturevalue("fixtures_dir") / "s2_scene_29RKH"  # of baseline 02.14
        classes = rasterio.open(folder / "SCL.tif").read(1).repeat(2, 0).repeat(2, 1)
        return np.stack([rasterio.open(folder / f"{b}.tif").read(1) for b in ("B02", "B03", "B04", "B08")]), classes
    scene, classes = numbers(["sand"], 488), np.full((488, 488), 5)
    for row, column, surface, scl in [(70, 130, "forest", 4), (250, 260, "lake", 6), (400, 30, "lake", 6)]:
        scene[:, row : row + 64, column : column + 64] = numbers([surface])
        classes[row : row + 64, column : column + 64] = scl
    return scene, classes


def test_no_window_of_a_desert_says_the_opposite(desert):
    """Without the offset 0 is right, and -1000 once the offset is put in."""
    scene, classes = desert
    told, starts = Counter(), range(0, scene.shape[1] - 60, 61)
    for row, column in itertools.product(starts, repeat=2):
        window = np.s_[row : row + 61, column : column + 61]
        plain, share = scene[:, *window], float(np.isin(classes[window], (4, 6)).mean())
        for truth, written in ((0, plain), (-1000, with_offset(plain))):
            for decision in (0, -1000):
                told[truth == decision, check_numbers(written, decision, share)[1]] += 1
    assert told[True, "deny"] == told[False, "agree"] == 0
    assert told[False, "deny"] == told[True, "agree"] > 0
    assert told.total() == 4 * len(starts) ** 2
