"""Decides how pixel values of a Sentinel-2 L2A item become reflectance: (DN + offset) / 10000.

The offset is -1000 from processing baseline 04.00 on (older scenes that were reprocessed included, so the
date decides nothing), unless the provider has already taken it off. Several signals tell, and they can contradict
each other; every decision keeps its reasons, and a contradiction that no rule resolves is quarantined.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.sentinel2.items import band_assets, baselines, entries, number, properties

NODATA_DN = 0  # DN of nodata, before and after the shift: mask first, then shift
MOST = 32_767  # largest DN, of 15 bits; larger ones are negative values that wrapped around at 65,535
OFFSET = -1000
SCALE = 1e-4
BASELINE_WITH_OFFSET = (4, 0)
UNTOLD = "neither baseline nor bands tell the offset"
APPLIED_KEYS = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")
PROVIDERS = {
    "sentinel2l2a01.blob.core.windows.net": "Planetary Computer never takes the offset off",
    "e84-earth-search-sentinel-data": "Earth Search's Collection 1 leaves the offset in and declares it",
    "sentinel-cogs": "Earth Search takes the offset off these files where boa_offset_applied says so; "
    "some say false and are without it, which only the pixels tell",  # its issues 66 and 71
}
NEVER_APPLIES = "sentinel2l2a01.blob.core.windows.net"
DARK_SHARE = 0.1  # share of vegetation and water from which a patch's darkest hundredth is dark in some band
TOLERANCE = 300  # DN: how far noise and an overdone atmospheric correction reach below zero reflectance
DENSE, DARK_WATER = 0.3, 1500  # NDVI of the numbers as they are; largest DN of water beyond the visible
HAZY = 2000  # DN: reflectance 0.1 above the offset; darker surfaces than that show in every clear patch that has them


@dataclass(frozen=True)
class Radiometry:
    """How an item's pixel values become reflectance, and why."""

    offset: int
    """DN to add after masking nodata: -1000 or 0."""
    already_applied: bool
    """Whether the provider has added the offset to the stored numbers."""
    reasons: tuple[str, ...]
    """Reasons of the decision, in order."""
    quarantined: bool = False
    """Whether the signals contradict each other beyond any documented rule."""
    scale: float = SCALE
    """Reflectance per DN."""
    nodata: int = NODATA_DN
    """The DN that means no data."""


@dataclass(frozen=True)
class Signal:
    """What one source says of an item's offset."""

    value: bool | None
    """The answer; None where the source says nothing clear."""
    said: tuple[str, ...]
    """The answer in words."""
    against: tuple[str, ...]
    """Why it cannot be believed; empty where it can."""


def decide(item: Mapping[str, Any]) -> Radiometry:
    """Decides an item's offset from all signals.

    Args:
        item: The STAC item as a dictionary.

    Returns:
        The decision with its reasons; `quarantined` where the signals cannot be reconciled.
    """
    assets = [item["assets"][key] for band, key in band_assets(item).items() if band != "SCL"]
    shifted, declared, applied = ask_baseline(item), ask_bands(item, assets), ask_flag(item)
    signals = (shifted, declared, applied, ask_provider(assets))
    said = tuple(text for signal in signals for text in signal.said)
    against = tuple(text for signal in signals for text in signal.against)
    against += tuple(_conflicts(*(signal.value for signal in signals)))
    if not (against or applied.value) and shifted.value is None and declared.value is None:
        against = (UNTOLD,)
    if against:
        return Radiometry(0, False, (*said, *against), quarantined=True)
    if applied.value:
        return Radiometry(0, True, (*said, "taken off already: a declared offset would be taken off twice"))
    if shifted.value or declared.value:
        return Radiometry(OFFSET, False, (*said, "the offset is still in the numbers"))
    return Radiometry(0, False, (*said, "no offset in the numbers"))


def _conflicts(
    shifted: bool | None, declared: bool | None, applied: bool | None, never_applied: bool | None
) -> Iterator[str]:
    """Yields what no documented rule reconciles."""
    if applied and shifted is False:
        yield "it was never in the numbers, and cannot have been taken off"
    if applied and never_applied:
        yield "the provider never takes it off"
    if not applied and {shifted, declared} == {True, False}:
        yield "baseline and bands contradict each other"


def ask_baseline(item: Mapping[str, Any]) -> Signal:
    """Returns whether ESA's processing added the offset."""
    versions = baselines(item)
    if not versions:
        return Signal(None, (), ())
    told = ", ".join(dict.fromkeys(f"{major:02d}.{minor:02d}" for major, minor in versions))
    said = (f"processing baseline {told}",)
    shifted = {version >= BASELINE_WITH_OFFSET for version in versions}
    if len(shifted) > 1:
        return Signal(None, said, ("the baselines are from before and after the offset",))
    return Signal(shifted.pop(), said, ())


def ask_bands(item: Mapping[str, Any], assets: list[Mapping[str, Any]]) -> Signal:
    """Returns whether the bands declare that the offset is to be added.

    Only the assets that are read count: Earth Search's original JPEG 2000 files beside them are not shifted.
    """
    pairs = [pair for asset in assets for pair in _declarations(asset, properties(item))]
    declared = {_dn(scale, offset) for scale, offset in pairs if offset is not None}
    if not declared:
        return Signal(None, (), ())
    told = sorted("no number" if offset is None else str(offset) for offset in declared)
    said = (f"the bands declare an offset of {', '.join(told)}",)
    if declared not in ({0}, {OFFSET}):
        return Signal(None, said, ("the bands contradict each other or the format",))
    return Signal(declared == {OFFSET}, said, ())


def _declarations(asset: Mapping[str, Any], item: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Returns scale and offset as declared for each band of an asset, else for the asset, else for the whole item."""
    listed = [entry for entry in entries(asset) if {"offset", "raster:offset"} & set(entry)]
    return [(_told("scale", e, asset, item), _told("offset", e, asset, item)) for e in listed or [{}]]


def _told(name: str, band: Mapping[str, Any], *wider: Mapping[str, Any]) -> Any:
    """Returns a value of the raster extension: STAC 1.0's bands call it `offset`, STAC 1.1 `raster:offset`."""
    values = (band.get(name), *(place.get(f"raster:{name}") for place in (band, *wider)))
    return next((value for value in values if value is not None), None)


def _dn(scale: Any, offset: Any) -> int | None:
    """Returns an offset of reflectance in DN; none where scale or offset is not the format's. An untold scale is."""
    per_dn, told = SCALE if scale is None else number(scale), number(offset)
    if not per_dn or told is None or not math.isclose(per_dn, SCALE):
        return None
    return round(told / SCALE)


def ask_flag(item: Mapping[str, Any]) -> Signal:
    """Returns whether the provider says that the offset is taken off."""
    told = {key: properties(item)[key] for key in APPLIED_KEYS if properties(item).get(key) is not None}
    said = tuple(f"{key} is {str(value).lower()}" for key, value in told.items())
    values = list(told.values())
    if any(not isinstance(value, bool) for value in values) or len(set(values)) > 1:
        return Signal(None, said, ("boa_offset_applied is neither true nor false",))
    return Signal(values[0] if values else None, said, ())


def ask_provider(assets: list[Mapping[str, Any]]) -> Signal:
    """Returns whether the provider, known by the address of the files, never takes the offset off."""
    hrefs = [str(asset.get("href", "")) for asset in assets]
    providers = [name for name in PROVIDERS if any(name in href for href in hrefs)]
    said = tuple(PROVIDERS[name] for name in providers)
    if len(providers) > 1:
        return Signal(None, said, ("the bands are files of several providers",))
    return Signal(providers == [NEVER_APPLIES], said, ())


def to_reflectance(dn: NDArray[np.uint16], offset: NDArray[np.int64] | int) -> NDArray[np.float32]:
    """Returns the reflectance of raw numbers; nodata, and numbers that the format has not, become NaN.

    Args:
        dn: Raw numbers, first axis one patch each.
        offset: DN to add, one for all or one per patch.

    Returns:
        float32 of the same shape, clipped to 0 to 1.
    """
    shift = np.reshape(offset, (-1,) + (1,) * (dn.ndim - 1)).astype(np.float32)
    values = np.clip((dn.astype(np.float32) + shift) * np.float32(SCALE), 0, 1)
    return np.where((dn == NODATA_DN) | (dn > MOST), np.float32(np.nan), values)


def beyond_format(dn: NDArray[np.uint16]) -> bool:
    """Returns whether some number is one that the format has not: nobody knows what it means."""
    return bool((dn > MOST).any())


def check_numbers(dn: NDArray[np.uint16], offset: int, dark_share: float) -> tuple[float, str]:
    """Returns whether a patch's numbers deny the decided offset.

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
    dark = darkest(dn)
    if beyond_format(dn):
        return dark, "deny"
    shifted = looks_shifted(dark, dark_share)
    if shifted is None:
        return dark, "silent"
    return dark, "agree" if shifted == (offset != 0) else "deny"


def darkest(dn: NDArray[np.uint16]) -> float:
    """Returns the first percentile of each pixel's darkest band, in DN; NaN where no pixel has all bands."""
    known = ((dn != NODATA_DN) & (dn <= MOST)).all(0)
    if not known.any():
        return float("nan")
    return float(np.percentile(dn[:, known].min(0), 1))


def dark_share(dn: NDArray[np.uint16], bands: Sequence[str]) -> float:
    """Returns the share of vegetation and water by the numbers alone, for images without a scene classification.

    Both are told as they are, with the offset in the numbers or without: taking it off would only raise NDVI, and
    leaves the sign of NDWI.

    Args:
        dn: Raw numbers, (band, y, x).
        bands: Names of the bands; 0 is returned without B03, B04, B08 and B11.
    """
    if not {"B03", "B04", "B08", "B11"} <= set(bands):
        return 0.0
    green, red, nir, swir = (dn[bands.index(band)].astype(np.float64) for band in ("B03", "B04", "B08", "B11"))
    vegetation = nir - red > DENSE * (nir + red)
    water = (green > nir) & (np.maximum(nir, swir) < DARK_WATER)
    return float((vegetation | water).mean())


def looks_shifted(dark: float, dark_share: float) -> bool | None:
    """Returns whether the dark end of the numbers has the offset in it; none where it does not tell."""
    if dark < -OFFSET - TOLERANCE:
        return False
    if dark_share >= DARK_SHARE and -OFFSET <= dark < HAZY:
        return True
    return None
