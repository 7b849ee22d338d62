"""Reading: one unit reads the pixels of one shard's places, and judges them by what is found in them.

A shard that lacks patches is not written to the store: its pixels are *held* until a later round has read what
replaces them. So the store's shards are whole from the first byte on, and no patch is ever silently nodata.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra import metrics, storage
from infra.cogs import Traffic, UnreadableAsset, read_scene
from tasks import patches as store
from tasks.core import radiometry
from tasks.estimate import THREADS, Meter
from tasks.params import SampleParams
from tasks.screening import EDGE, NODATA, UNREADABLE
from tasks.units import log


def read_shard(url: str, params: SampleParams, unit: tuple[int, int]) -> None:
    """Reads the places that a round plans for a shard, and stores the shard if they complete it.

    Args:
        url: The patch store.
        params: How to read and judge.
        unit: Round and shard.
    """
    number, shard = unit
    if storage.exists(store.part(url, "parts", number, shard)):
        return
    start = shard * params.shard_patches
    meter = Meter()
    plan = _planned(url, number, shard)
    plan.index = plan["position"] - start
    pixels = _held(url, params, number, shard)
    plan["reason"] = pd.Series(read_scenes(plan, pixels, params, meter.traffic))
    plan["href"] = [assets[params.bands[0]] for assets in plan["assets"]]
    metrics.count(metrics.PATCHES, plan["reason"])
    good = plan[plan["reason"] == ""]
    found = pd.DataFrame([_numbers(good.loc[i], pixels[i]) for i in good.index], good.index, FOUND)
    target = url if len(good) == len(plan) else store.held(url, number)
    store.create(target, *shape(params))
    store.write_shard(target, start, pixels)
    store.create_part(url, "parts", number, shard, meter.stamp(plan.join(found)))


FOUND = ["sha256", "nodata_fraction", "dark_dn", "offset_check"]  # columns that a read adds


def shape(params: SampleParams) -> tuple[int, tuple[str, ...], int, float, int]:
    """The store's shape, as `tasks.patches.create` takes it."""
    return params.patches, params.bands, params.patch_pixels, params.resolution_m, params.shard_patches


def _planned(url: str, number: int, shard: int) -> pd.DataFrame:
    """The verdicts on the places that a plan names."""
    plan = store.read_part(url, "plan", number, shard)
    parts = np.unique(plan[["round", "cell"]], axis=0).tolist()
    screened = [store.read_part(url, "screen", *part) for part in parts]
    return plan[["position", "row_id"]].merge(pd.concat(screened), on="row_id")


def _held(url: str, params: SampleParams, number: int, shard: int) -> NDArray[np.uint16]:
    """A shard's pixels (patch, band, y, x) as the rounds before left them, 0 where patches are lacking."""
    start = shard * params.shard_patches
    count = min(params.shard_patches, params.patches - start)
    if number == 0:
        return np.zeros((count, len(params.bands), params.patch_pixels, params.patch_pixels), np.uint16)
    pixels = store.read_rows(store.held(url, number - 1), slice(start, start + count))
    earlier = pd.concat([store.read_part(url, "parts", n, shard) for n in range(number)])
    good = earlier[earlier["reason"] == ""]
    for position, digest in zip(good["position"], good["sha256"], strict=True):
        if _digest(pixels[position - start]) != digest:
            raise RuntimeError(f"the pixels held for shard {shard} are gone: another run has finished the store")
    return pixels


def read_scenes(
    plan: pd.DataFrame, pixels: NDArray[np.uint16], params: SampleParams, traffic: Traffic
) -> dict[int, str]:
    """Reads patches into their rows of `pixels`, scene by scene.

    Args:
        plan: Places by row of `pixels`.
        pixels: (patch, band, y, x), written where a patch is good.
        params: Bands, size, threshold.
        traffic: Counts requests and bytes.

    Returns:
        By row, why there is no patch, or nothing where there is one.

    Raises:
        UnavailableAsset: An asset cannot be had now, so nothing is known of its patches.
    """
    groups = [group for _, group in plan.groupby("item_id")]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(partial(_read_scene, pixels, params, traffic), groups))
    return {row: reason for reasons in found for row, reason in reasons.items()}


def _read_scene(
    pixels: NDArray[np.uint16], params: SampleParams, traffic: Traffic, group: pd.DataFrame
) -> dict[int, str]:
    hrefs = {band: group["assets"].iloc[0][band] for band in params.bands}
    places = group[["lon", "lat"]].to_numpy()
    try:
        layers = read_scene(hrefs, places, params.patch_pixels, params.resolution_m, traffic)
    except UnreadableAsset as error:
        log().warning("%s; its %d patches are replaced", error, len(group))
        return dict.fromkeys(group.index, UNREADABLE)
    return {
        row: _keep(pixels, row, windows, params.max_nodata_fraction)
        for row, windows in zip(group.index, zip(*layers.values(), strict=True), strict=True)
    }


def _keep(pixels: NDArray[np.uint16], row: int, windows: tuple[NDArray | None, ...], max_nodata: float) -> str:
    """Puts the bands' windows into a row of `pixels`, or tells why not."""
    if any(window is None for window in windows):
        return EDGE
    patch = np.stack(windows)  # type: ignore[arg-type]
    if nodata_fraction(patch) > max_nodata:
        return NODATA
    pixels[row] = patch
    return ""


def nodata_fraction(patch: NDArray[np.uint16]) -> float:
    """Share of the pixels of a (band, y, x) patch without data in some band."""
    return float((patch == radiometry.NODATA).any(0).mean())


def _numbers(row: pd.Series, patch: NDArray[np.uint16]) -> list[Any]:
    """The manifest's columns (`FOUND`) that only the pixels tell."""
    dark, check = radiometry.check_numbers(patch, row["offset"], row["dark_share"])
    return [_digest(patch), nodata_fraction(patch), dark, check]


def _digest(patch: NDArray[np.uint16]) -> str:
    return hashlib.sha256(patch.astype("<u2").tobytes()).hexdigest()
