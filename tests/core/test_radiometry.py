"""Which offset, and why."""

import json

import numpy as np
import pytest
import rasterio

from tasks.core.items import baseline
from tasks.core.radiometry import check_numbers, decide, to_reflectance


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


@pytest.mark.parametrize("made", [item(), item("03.01", -0.1), item("05.00", 0.0), item("05.00", -0.2)])
def test_contradictions_are_quarantined(made):
    assert decide(made).quarantined


def test_every_real_item_is_decided(fixtures_dir):
    found = 0
    for path in sorted((fixtures_dir / "stac_items").rglob("*.json")):
        content = json.loads(path.read_text())
        for real in content.get("features", [content]):
            if real.get("type") != "Feature" or "sentinel-2" not in json.dumps(real.get("properties", {})).lower():
                continue
            decision = decide(real)
            found += 1
            version = baseline(real)
            if not decision.quarantined and version is not None:
                expected = version >= (4, 0) and not decision.already_applied
                assert decision.offset == (-1000 if expected else 0), path
    assert found > 30


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


def test_a_real_desert_tells_nothing(fixtures_dir):
    scene = fixtures_dir / "s2_scene_29RKH"
    bands = np.stack([rasterio.open(scene / f"{name}.tif").read(1) for name in ("B02", "B03", "B04", "B08")])
    dark_share = float(np.isin(rasterio.open(scene / "SCL.tif").read(1), (4, 6)).mean())
    assert check_numbers(bands, 0, dark_share)[1] == "silent"


@pytest.mark.parametrize("name", ["511198", "526850", "502692", "322265", "275979", "566084", "25630"])
def test_real_patches_without_the_offset(fixtures_dir, name):
    with rasterio.open(fixtures_dir / "s2_patches" / f"patch_{name}.tif") as source:
        patch = source.read()
    assert check_numbers(patch, 0, 0.5)[1] == "agree"
    assert check_numbers(patch, -1000, 0.5)[1] == "deny"
    assert check_numbers(patch + np.uint16(1000) * (patch > 0), -1000, 0.5)[1] == "agree"
    assert check_numbers(patch + np.uint16(1000) * (patch > 0), 0, 0.5)[1] == "deny"
