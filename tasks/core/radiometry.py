"""What the numbers of a Sentinel-2 L2A item mean: reflectance = (DN + offset) / 10000.

The offset is -1000 from processing baseline 04.00 on (older scenes that were reprocessed included, so the
date decides nothing), unless the provider has already taken it off. Several signals tell, and they can contradict
each other; every decision keeps its reasons, and a contradiction that no rule resolves is quarantined.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.items import band_assets, baselines, entries, properties

NODATA = 0  # before and after the shift: mask first, then shift
OFFSET = -1000
SCALE = 1e-4
BASELINE_WITH_OFFSET = (4, 0)
APPLIED_KEYS = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")
PROVIDERS = {
    "sentinel2l2a01.blob.core.windows.net": "Planetary Computer never takes the offset off",
    "e84-earth-search-sentinel-data": "Earth Search's Collection 1 leaves the offset in and declares it",
    "sentinel-cogs": "Earth Search takes the offset off these files where boa_offset_applied says so",
}
NEVER_APPLIES = "sentinel2l2a01.blob.core.windows.net"


class Contradiction(ValueError):
    """Signals that no documented rule reconciles."""


@dataclass(frozen=True)
class Radiometry:
    """How to turn an item's numbers into reflectance, and why."""

    offset: int
    """DN to add after masking nodata: -1000 or 0."""
    already_applied: bool
    """Whether the provider has added the offset to the stored numbers."""
    reasons: tuple[str, ...]
    """What decided, in order."""
    quarantined: bool = False
    """Whether the signals contradict each other beyond any documented rule."""
    scale: float = SCALE
    """Reflectance per DN."""
    nodata: int = NODATA
    """The DN that means no data."""


def decide(item: Mapping[str, Any]) -> Radiometry:
    """Decides an item's offset from all signals.

    Args:
        item: The STAC item as a dictionary.

    Returns:
        The decision with its reasons; `quarantined` where the signals cannot be reconciled.
    """
    reasons: list[str] = []
    try:
        shifted = _by_baseline(item, reasons)
        declared = _by_bands(item, reasons)
        applied = _by_flag(item, reasons)
        return _resolve(shifted, declared, applied, _provider(item, reasons), reasons)
    except Contradiction as why:
        return Radiometry(0, False, (*reasons, str(why)), quarantined=True)


def _by_baseline(item: Mapping[str, Any], reasons: list[str]) -> bool | None:
    """Whether ESA's processing added the offset."""
    versions = baselines(item)
    told = ", ".join(dict.fromkeys(f"{major:02d}.{minor:02d}" for major, minor in versions))
    reasons += [f"processing baseline {told}"] * bool(told)
    shifted = {version >= BASELINE_WITH_OFFSET for version in versions}
    if len(shifted) > 1:
        raise Contradiction("the baselines are from before and after the offset")
    return next(iter(shifted), None)


def _by_bands(item: Mapping[str, Any], reasons: list[str]) -> bool | None:
    """Whether the bands declare that the offset is to be added."""
    declared = {_dn(*pair) for pair in declarations(item) if pair[1] is not None}
    told = ", ".join(sorted("no number" if offset is None else str(offset) for offset in declared))
    reasons += [f"the bands declare an offset of {told}"] * bool(told)
    if declared - {0, OFFSET} or len(declared) > 1:
        raise Contradiction("the bands contradict each other or the format")
    return OFFSET in declared if declared else None


def declarations(item: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Scale and offset that each asset of a reflectance band declares, per band, for the asset or for the item.

    Only the assets that are read count: Earth Search's original JPEG 2000 files beside them are not shifted.
    """
    found = []
    for band, key in band_assets(item).items():
        asset = item["assets"][key]
        listed = [entry for entry in entries(asset) if {"offset", "raster:offset"} & set(entry)]
        for entry in listed or [{}]:
            places = (entry, asset, properties(item))
            found += [] if band == "SCL" else [tuple(_first(name, places) for name in ("scale", "offset"))]
    return found


def _first(name: str, places: tuple[Mapping[str, Any], ...]) -> Any:
    own = places[0].get(name)
    return own if own is not None else next((p[f"raster:{name}"] for p in places if f"raster:{name}" in p), None)


def _dn(scale: Any, offset: Any) -> int | None:
    """An offset of reflectance in DN; nothing where scale or offset is not the format's."""
    if isinstance(offset, int | float) and isinstance(scale, int | float) and math.isclose(scale, SCALE):
        return round(offset / SCALE) if math.isfinite(offset) else None
    return None


def _by_flag(item: Mapping[str, Any], reasons: list[str]) -> bool | None:
    """Whether the provider says that the offset is taken off."""
    told = {key: properties(item)[key] for key in APPLIED_KEYS if properties(item).get(key) is not None}
    reasons += [f"{key} is {str(value).lower()}" for key, value in told.items()]
    if any(not isinstance(value, bool) for value in told.values()) or len(set(told.values())) > 1:
        raise Contradiction("boa_offset_applied is neither true nor false")
    return next(iter(told.values()), None)


def _provider(item: Mapping[str, Any], reasons: list[str]) -> str:
    """The provider whose files the bands are, known by their address."""
    hrefs = [str(item["assets"][key].get("href", "")) for key in band_assets(item).values()]
    found = [name for name in PROVIDERS if any(name in href for href in hrefs)]
    reasons += [PROVIDERS[name] for name in found]
    if len(found) > 1:
        raise Contradiction("the bands are files of several providers")
    return found[0] if found else ""


def _resolve(
    shifted: bool | None, declared: bool | None, applied: bool | None, provider: str, reasons: list[str]
) -> Radiometry:
    if applied:
        if provider == NEVER_APPLIES or shifted is False:
            raise Contradiction("taken off, it is said, where there is nothing to take off or nobody who would")
        return Radiometry(0, True, (*reasons, "applied by the provider: a declared offset would be taken off twice"))
    if shifted is None and declared is None:
        raise Contradiction("neither baseline nor bands tell the offset")
    if declared is not None and shifted not in (None, declared):
        raise Contradiction("baseline and bands contradict each other")
    if shifted or declared:
        return Radiometry(OFFSET, False, (*reasons, "offset still in the numbers"))
    return Radiometry(0, False, (*reasons, "no offset in the numbers"))


def to_reflectance(dn: NDArray[np.uint16], offset: NDArray[np.int64] | int) -> NDArray[np.float32]:
    """Reflectance of raw numbers; nodata becomes NaN.

    Args:
        dn: Raw numbers, first axis one patch each.
        offset: DN to add, one for all or one per patch.

    Returns:
        float32 of the same shape, clipped to 0 to 1.
    """
    shift = np.reshape(offset, (-1,) + (1,) * (dn.ndim - 1)).astype(np.float32)
    values = np.clip((dn.astype(np.float32) + shift) * np.float32(SCALE), 0, 1)
    return np.where(dn == NODATA, np.float32(np.nan), values)


DARK_SHARE = 0.1  # of vegetation and water in a patch: then its darkest hundredth is dark in some band
TOLERANCE = 300  # DN: how far noise and an overdone atmospheric correction reach below zero reflectance
HAZY = 2000  # DN: reflectance 0.1 above the offset; darker surfaces than that show in every clear patch that has them


def check_numbers(dn: NDArray[np.uint16], offset: int, dark_share: float) -> tuple[float, str]:
    """Whether a patch's numbers deny the decided offset.

    With the offset still in the numbers nothing is darker than about 1000; without it, the darkest pixels of
    vegetation and water are well below that in some band. Bright ground and haze tell nothing.

    Args:
        dn: Raw numbers, (band, y, x).
        offset: The decision, -1000 or 0.
        dark_share: Share of vegetation and water by the scene classification.

    Returns:
        The first percentile of each pixel's darkest band, in DN, and `agree`, `deny` or `silent`.
    """
    known = (dn != NODATA).all(0)
    if not known.any():
        return float("nan"), "silent"
    dark = float(np.percentile(dn[:, known].min(0), 1))
    shifted = _looks_shifted(dark, dark_share)
    if shifted is None:
        return dark, "silent"
    return dark, "agree" if shifted == (offset != 0) else "deny"


def _looks_shifted(dark: float, dark_share: float) -> bool | None:
    """Whether the dark end of the numbers has the offset in it; nothing where it does not tell."""
    if dark < -OFFSET - TOLERANCE:
        return False
    return True if dark_share >= DARK_SHARE and -OFFSET <= dark < HAZY else None
