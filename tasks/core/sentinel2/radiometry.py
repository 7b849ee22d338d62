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

from tasks.core.sentinel2.items import band_assets, baselines, entries, number, properties

NODATA = 0  # before and after the shift: mask first, then shift
MOST = 32_767  # ESA writes 15 bits; above are numbers that a provider took below zero, where they begin anew at 65,535
OFFSET = -1000
SCALE = 1e-4
BASELINE_WITH_OFFSET = (4, 0)
APPLIED_KEYS = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")
PROVIDERS = {
    "sentinel2l2a01.blob.core.windows.net": "Planetary Computer never takes the offset off",
    "e84-earth-search-sentinel-data": "Earth Search's Collection 1 leaves the offset in and declares it",
    "sentinel-cogs": "Earth Search takes the offset off these files where boa_offset_applied says so; "
    "some say false and are without it, which only the pixels tell",  # its issues 66 and 71
}
NEVER_APPLIES = "sentinel2l2a01.blob.core.windows.net"
DARK_SHARE = 0.1  # of vegetation and water in a patch: then its darkest hundredth is dark in some band
TOLERANCE = 300  # DN: how far noise and an overdone atmospheric correction reach below zero reflectance
HAZY = 2000  # DN: reflectance 0.1 above the offset; darker surfaces than that show in every clear patch that has them


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
    assets = [item["assets"][key] for band, key in band_assets(item).items() if band != "SCL"]
    said: list[str] = []
    against: list[str] = []
    shifted = _by_baseline(item, said, against)
    declared = _by_bands(item, assets, said, against)
    applied = _by_flag(item, said, against)
    provider = _provider(assets, said, against)
    _compare(shifted, declared, applied, provider, against)
    if against:
        return Radiometry(0, False, (*said, *against), quarantined=True)
    if applied:
        return Radiometry(0, True, (*said, "taken off already: a declared offset would be taken off twice"))
    if shifted or declared:
        return Radiometry(OFFSET, False, (*said, "the offset is still in the numbers"))
    return Radiometry(0, False, (*said, "no offset in the numbers"))


def _by_baseline(item: Mapping[str, Any], said: list[str], against: list[str]) -> bool | None:
    """Whether ESA's processing added the offset."""
    versions = baselines(item)
    told = ", ".join(dict.fromkeys(f"{major:02d}.{minor:02d}" for major, minor in versions))
    said += [f"processing baseline {told}"] * bool(told)
    shifted = {version >= BASELINE_WITH_OFFSET for version in versions}
    against += ["the baselines are from before and after the offset"] * (len(shifted) > 1)
    return shifted.pop() if len(shifted) == 1 else None


def _by_bands(
    item: Mapping[str, Any], assets: list[Mapping[str, Any]], said: list[str], against: list[str]
) -> bool | None:
    """Whether the bands declare that the offset is to be added.

    Only the assets that are read count: Earth Search's original JPEG 2000 files beside them are not shifted.
    """
    pairs = [pair for asset in assets for pair in _declarations(asset, properties(item))]
    declared = {_dn(scale, offset) for scale, offset in pairs if offset is not None}
    told = ", ".join(sorted("no number" if offset is None else str(offset) for offset in declared))
    said += [f"the bands declare an offset of {told}"] * bool(told)
    odd = bool(declared - {0, OFFSET}) or len(declared) > 1
    against += ["the bands contradict each other or the format"] * odd
    return OFFSET in declared if declared and not odd else None


def _declarations(asset: Mapping[str, Any], item: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Scale and offset as declared for each band of an asset, else for the asset, else for the whole item."""
    listed = [entry for entry in entries(asset) if {"offset", "raster:offset"} & set(entry)]
    return [(_told("scale", e, asset, item), _told("offset", e, asset, item)) for e in listed or [{}]]


def _told(name: str, band: Mapping[str, Any], *wider: Mapping[str, Any]) -> Any:
    """A value of the raster extension: `offset` in STAC 1.0's bands, `raster:offset` everywhere in STAC 1.1."""
    values = (band.get(name), *(place.get(f"raster:{name}") for place in (band, *wider)))
    return next((value for value in values if value is not None), None)


def _dn(scale: Any, offset: Any) -> int | None:
    """An offset of reflectance in DN; nothing where scale or offset is not the format's. An untold scale is."""
    per_dn, told = SCALE if scale is None else number(scale), number(offset)
    return round(told / SCALE) if per_dn and told is not None and math.isclose(per_dn, SCALE) else None


def _by_flag(item: Mapping[str, Any], said: list[str], against: list[str]) -> bool | None:
    """Whether the provider says that the offset is taken off."""
    told = {key: properties(item)[key] for key in APPLIED_KEYS if properties(item).get(key) is not None}
    said += [f"{key} is {str(value).lower()}" for key, value in told.items()]
    odd = any(not isinstance(value, bool) for value in told.values()) or len(set(map(str, told.values()))) > 1
    against += ["boa_offset_applied is neither true nor false"] * odd
    return next(iter(told.values()), None) if not odd else None


def _provider(assets: list[Mapping[str, Any]], said: list[str], against: list[str]) -> str:
    """The provider whose files the bands are, known by their address."""
    hrefs = [str(asset.get("href", "")) for asset in assets]
    found = [name for name in PROVIDERS if any(name in href for href in hrefs)]
    said += [PROVIDERS[name] for name in found]
    against += ["the bands are files of several providers"] * (len(found) > 1)
    return found[0] if len(found) == 1 else ""


def _compare(
    shifted: bool | None, declared: bool | None, applied: bool | None, provider: str, against: list[str]
) -> None:
    """Adds what no documented rule reconciles."""
    if applied:
        against += ["it was never in the numbers, and cannot have been taken off"] * (shifted is False)
        against += ["the provider never takes it off"] * (provider == NEVER_APPLIES)
    elif shifted is None and declared is None and not against:
        against.append("neither baseline nor bands tell the offset")
    elif None not in (shifted, declared) and shifted != declared:
        against.append("baseline and bands contradict each other")


def to_reflectance(dn: NDArray[np.uint16], offset: NDArray[np.int64] | int) -> NDArray[np.float32]:
    """Reflectance of raw numbers; nodata, and numbers that the format has not, become NaN.

    Args:
        dn: Raw numbers, first axis one patch each.
        offset: DN to add, one for all or one per patch.

    Returns:
        float32 of the same shape, clipped to 0 to 1.
    """
    shift = np.reshape(offset, (-1,) + (1,) * (dn.ndim - 1)).astype(np.float32)
    values = np.clip((dn.astype(np.float32) + shift) * np.float32(SCALE), 0, 1)
    return np.where((dn == NODATA) | (dn > MOST), np.float32(np.nan), values)


def beyond_format(dn: NDArray[np.uint16]) -> bool:
    """Returns whether some number is one that the format has not: nobody knows what it means."""
    return bool((dn > MOST).any())


def check_numbers(dn: NDArray[np.uint16], offset: int, dark_share: float) -> tuple[float, str]:
    """Whether a patch's numbers deny the decided offset.

    With the offset still in the numbers nothing is darker than about 1000; without it, the darkest pixels of
    vegetation and water are well below that in some band. Bright ground and haze tell nothing. A number that the format
    has not denies it in any case: something was done to the numbers that nobody told.

    Args:
        dn: Raw numbers, (band, y, x).
        offset: The decision, -1000 or 0.
        dark_share: Share of vegetation and water by the scene classification.

    Returns:
        The first percentile of each pixel's darkest band, in DN, and `agree`, `deny` or `silent`.
    """
    known = ((dn != NODATA) & (dn <= MOST)).all(0)
    denied = beyond_format(dn)
    if not known.any():
        return float("nan"), "deny" if denied else "silent"
    dark = float(np.percentile(dn[:, known].min(0), 1))
    if denied:
        return dark, "deny"
    shifted = _looks_shifted(dark, dark_share)
    if shifted is None:
        return dark, "silent"
    return dark, "agree" if shifted == (offset != 0) else "deny"


def _looks_shifted(dark: float, dark_share: float) -> bool | None:
    """Whether the dark end of the numbers has the offset in it; nothing where it does not tell."""
    if dark < -OFFSET - TOLERANCE:
        return False
    return True if dark_share >= DARK_SHARE and -OFFSET <= dark < HAZY else None
