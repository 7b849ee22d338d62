"""Which offset, and why."""

import json

import numpy as np
import pytest

from tasks.core.radiometry import baseline, decide, to_reflectance


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
