"""Reads what a STAC item of Sentinel-2 L2A says of itself, whichever provider wrote it.

Items are plain dictionaries here. Earth Search names bands by colour (`red`), Planetary Computer by number (`B04`),
Copernicus by number and pixel size (`B04_10m`); baseline, tile and acquisition stand in properties or only in a name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = {
    "B01": "coastal",
    "B02": "blue",
    "B03": "green",
    "B04": "red",
    "B05": "rededge1",
    "B06": "rededge2",
    "B07": "rededge3",
    "B08": "nir",
    "B8A": "nir08",
    "B09": "nir09",
    "B11": "swir16",
    "B12": "swir22",
    "SCL": "scl",
}
COMMON = {common: band for band, common in NAMES.items()}
BASELINE_KEYS = ("s2:processing_baseline", "processing:version", "sentinel:processing_baseline")
PRODUCT_KEYS = ("s2:product_uri", "s2:datatake_id", "sentinel:product_id", "s2:product_id")
TILE = re.compile(r"(?<![0-9A-Z])T?(\d{1,2})([C-HJ-NP-X][A-HJ-NP-Z]{2})(?![0-9A-Z])")
SENSED = re.compile(r"(S2[A-Z])_(?:MSIL2A_)?(\d{8}T\d{6})")
SIZED = re.compile(r"(\w+)_(\d+)m")
TEST_BASELINE = (99, 99)  # written by Sen2Cor in a user's own run; says nothing of the format


def properties(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the item's properties; empty where they are no mapping."""
    found = item.get("properties")
    return found if isinstance(found, Mapping) else {}


def _names(item: Mapping[str, Any]) -> list[str]:
    """Returns the names of the product, the most informative first, the item's id last."""
    return [str(properties(item).get(key, "")) for key in PRODUCT_KEYS] + [str(item.get("id", ""))]


def baselines(item: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns every processing baseline in the properties and then in the product's names."""
    stated = [str(properties(item).get(key, "")) for key in BASELINE_KEYS]
    found = [re.fullmatch(r"(\d\d)\.?(\d\d)", text) for text in stated]
    found += [re.search(r"_N(\d\d)\.?(\d\d)(?:_|\.SAFE|$)", name) for name in _names(item)]
    versions = [(int(match[1]), int(match[2])) for match in found if match]
    return [version for version in versions if version != TEST_BASELINE]


def baseline(item: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the processing baseline from a property, else from the product's name, else None."""
    return next(iter(baselines(item)), None)


def tile(item: Mapping[str, Any]) -> str:
    """Returns the MGRS tile, such as `06VVN`, or the item's id where none is stated."""
    stated = [str(properties(item).get(key, "")) for key in ("s2:mgrs_tile", "grid:code")]
    for text in [*stated, *(name.replace("_", " ") for name in _names(item))]:
        if match := TILE.search(text):
            return match[1].zfill(2) + match[2]
    return str(item.get("id", ""))


def acquisition(item: Mapping[str, Any]) -> str:
    """Returns the overpass and tile as text, the same for every processing of an acquisition at every provider.

    The datatake's own id will not do, since it ends in the baseline.
    """
    for name in _names(item):
        if match := SENSED.search(name):
            return f"{match[1]} {match[2]} {tile(item)}"
    day = str(properties(item).get("datetime") or properties(item).get("start_datetime"))[:10]
    return f"{str(properties(item).get('platform', '')).lower()} {day} {tile(item)}"


def band_assets(item: Mapping[str, Any]) -> dict[str, str]:
    """Returns asset keys by band name, `B04` or `SCL`.

    A band is recognised by the key, by its common name, or by what the asset says of its bands.
    """
    listed = item.get("assets")
    best: dict[str, tuple[int, str]] = {}
    for key, asset in (listed if isinstance(listed, Mapping) else {}).items():
        if isinstance(asset, Mapping) and (fit := _fit(key, asset)):
            band, rank = fit
            best[band] = min(best.get(band, (rank, key)), (rank, key))
    return {band: best[band][1] for band in NAMES if band in best}


def _fit(key: str, asset: Mapping[str, Any]) -> tuple[str, int] | None:
    """Returns the band of an asset and a rank: 0 for the exact key, then the common name, then the finest pixels."""
    if key in NAMES:
        return key, 0
    if band := _band(key):
        return band, 1
    if (match := SIZED.fullmatch(key)) and (band := _band(match[1])):
        return band, 1 + int(match[2])
    named = {str(entry["name"]).upper() for entry in entries(asset) if entry.get("name")}  # alike in each extension
    if len(named) == 1 and named <= NAMES.keys() and "visual" not in key:
        return named.pop(), 2 + _pixel(asset)
    return None


def _band(name: str) -> str | None:
    """Returns the band of a name, in any case, or of a common name."""
    if name.upper() in NAMES:
        return name.upper()
    return COMMON.get(name.lower())


def _pixel(asset: Mapping[str, Any]) -> int:
    return round(number(asset.get("gsd")) or 0)


def number(value: Any) -> float | None:
    """Returns a finite number, or None: JSON can hold true, NaN and integers beyond any float."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            found = float(value)
        else:
            found = math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def entries(asset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields what an asset says of its bands, in STAC 1.0's `eo:bands` and `raster:bands`, and STAC 1.1's `bands`."""
    for key in ("eo:bands", "raster:bands", "bands"):
        listed = asset.get(key)
        yield from (entry for entry in (listed if isinstance(listed, list) else []) if isinstance(entry, Mapping))
