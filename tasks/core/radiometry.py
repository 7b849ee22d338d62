"""What the numbers of a Sentinel-2 L2A item mean: reflectance = (DN + offset) / 10000.

The offset is -1000 from processing baseline 04.00 on (older scenes that were reprocessed included, so the
date decides nothing), unless the provider has already taken it off. Three signals tell, and they can contradict
each other; every decision keeps its reasons, and a contradiction that no rule resolves is quarantined.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NODATA = 0  # before and after the shift: mask first, then shift
OFFSET = -1000
SCALE = 1e-4
BASELINE_WITH_OFFSET = (4, 0)
BASELINE_KEYS = ("s2:processing_baseline", "processing:version", "sentinel:processing_baseline")


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


def baseline(item: Mapping[str, Any]) -> tuple[int, int] | None:
    """The processing baseline from a property, else from the product's name, else nothing."""
    properties = item.get("properties", {})
    for key in BASELINE_KEYS:
        if match := re.fullmatch(r"(\d\d)\.?(\d\d)", str(properties.get(key, ""))):
            return int(match[1]), int(match[2])
    names = [properties.get(key, "") for key in ("s2:product_uri", "sentinel:product_id", "s2:product_id")]
    for name in [*map(str, names), str(item.get("id", ""))]:
        if match := re.search(r"_N(\d\d)(\d\d)_", name):
            return int(match[1]), int(match[2])
    return None


def declared_offsets(item: Mapping[str, Any]) -> set[int]:
    """Offsets in DN that the reflectance assets declare in `raster:bands` or, in STAC 1.1, `bands`."""
    found = set()
    for asset in item.get("assets", {}).values():
        for band in asset.get("raster:bands") or asset.get("bands") or []:
            scale = band.get("scale", band.get("raster:scale"))
            offset = band.get("offset", band.get("raster:offset"))
            if scale == SCALE and offset is not None:
                found.add(round(offset / scale))
    return found


def decide(item: Mapping[str, Any]) -> Radiometry:
    """Decides an item's offset from all signals.

    Args:
        item: The STAC item as a dictionary.

    Returns:
        The decision with its reasons; `quarantined` where the signals cannot be reconciled.
    """
    version, declared = baseline(item), declared_offsets(item)
    applied = item.get("properties", {}).get("earthsearch:boa_offset_applied")
    reasons = []
    if version is not None:
        reasons.append(f"processing baseline {version[0]:02d}.{version[1]:02d}")
    if declared:
        reasons.append("the bands declare an offset of " + ", ".join(map(str, sorted(declared))))
    if applied is not None:
        reasons.append(f"earthsearch:boa_offset_applied is {str(bool(applied)).lower()}")
    return _resolve(version, declared, applied, reasons)


def _resolve(
    version: tuple[int, int] | None, declared: set[int], applied: bool | None, reasons: list[str]
) -> Radiometry:
    if declared - {0, OFFSET} or len(declared) > 1:
        return _quarantine(reasons, "the bands contradict each other or the format")
    if version is None and not declared:
        return _quarantine(reasons, "neither baseline nor bands tell the offset")
    shifted = version >= BASELINE_WITH_OFFSET if version else declared == {OFFSET}
    if applied and shifted:
        note = "applied by the provider: a declared offset would be taken off twice"
        return Radiometry(0, True, (*reasons, note))
    if declared and shifted != (declared == {OFFSET}):
        return _quarantine(reasons, "baseline and bands contradict each other")
    note = "offset still in the numbers" if shifted else "made before the offset existed"
    return Radiometry(OFFSET if shifted else 0, False, (*reasons, note))


def _quarantine(reasons: list[str], why: str) -> Radiometry:
    return Radiometry(0, False, (*reasons, why), quarantined=True)


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


def check_numbers(dn: NDArray[np.uint16], offset: int, dark_share: float) -> tuple[float, str]:
    """Whether a patch's numbers deny the decided offset.

    With the offset still in the numbers nothing is darker than about 1000; without it, the darkest pixels of
    vegetation and water are well below that in some band.

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
    if offset:
        return dark, "deny" if dark < -offset - TOLERANCE else "agree"
    if dark < -OFFSET - TOLERANCE:
        return dark, "agree"
    return dark, "deny" if dark_share >= DARK_SHARE and dark >= -OFFSET else "silent"
