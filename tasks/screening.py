"""Screening: one unit finds and judges the scene of every candidate of one grid-zone cell."""

from typing import Any

import numpy as np
import pandas as pd
import pystac
from numpy.typing import NDArray

from infra import metrics
from infra.catalogs import unsigned
from infra.cogs import Traffic, UnreadableAsset, read_scene
from tasks import patches as store
from tasks.core.radiometry import decide
from tasks.estimate import Meter
from tasks.params import SampleParams
from tasks.scenes import asset_keys, choose, find_items, version

NO_DATA, SATURATED, DARK = (0,), (1,), (4, 6)  # SCL: no data; saturated or defective; vegetation, water
CLOUDY = (0, 1, 3, 8, 9, 10)  # SCL: no data, saturated, shadow, cloud (medium, high), cirrus
UNREADABLE, EDGE, NODATA = "unreadable", "crosses the scene's edge", "nodata"


def screen_cell(url: str, params: SampleParams, unit: tuple[int, int, NDArray[np.float64]]) -> None:
    """Judges the candidates of one cell, and stores the verdicts.

    Args:
        url: The patch store.
        params: How to choose and judge.
        unit: Round, cell, and its candidates: (n, 5), see `tasks.places.draw`.
    """
    number, cell, candidates = unit
    meter = Meter()
    chosen = choose(find_items(candidates[:, 1:3], params), candidates, params)
    verdicts = [_verdict(row, *choice) for row, choice in zip(candidates, chosen, strict=True)]
    table = pd.DataFrame(verdicts).assign(round=number, cell=cell)
    for _, group in table[table["reason"] == ""].groupby("item_id"):
        judge(table, group, params, meter.traffic)
    metrics.count(metrics.PLACES, table["reason"])
    store.create_part(url, "screen", number, cell, meter.stamp(table))


def _verdict(row: NDArray[np.float64], scene: pystac.Item | None, reason: str) -> dict[str, Any]:
    verdict = {"row_id": int(row[0]), "lon": row[1], "lat": row[2], "item_id": "", "reason": reason}
    verdict |= dict.fromkeys(("clear_fraction", "saturated_fraction", "dark_share"), np.nan)
    if scene is None:
        return verdict
    found, number = decide(scene.to_dict(transform_hrefs=False)), version(scene)
    hrefs = {band: unsigned(scene.assets[key].href) for band, key in asset_keys(scene).items()}
    return verdict | {
        "item_id": scene.id,
        "catalog": scene.extra_fields.get("catalog", ""),
        "collection": scene.collection_id or "",
        "assets": hrefs or None,  # Parquet has no empty mapping
        "datetime": str(scene.properties.get("datetime")),
        "platform": str(scene.properties.get("platform", "")),
        "baseline": f"{number[0]:02d}.{number[1]:02d}",
        "offset": found.offset,
        "offset_reason": "; ".join(found.reasons),
    }


def judge(table: pd.DataFrame, group: pd.DataFrame, params: SampleParams, traffic: Traffic) -> None:
    """Reads the scene classification around the places of one scene, and rejects what is not clear."""
    assets = group["assets"].iloc[0] or {}
    missing = [band for band in (*params.bands, "SCL") if band not in assets]
    if missing:
        table.loc[group.index, "reason"] = "missing asset " + missing[0]
        return
    hrefs, places = {"SCL": assets["SCL"]}, group[["lon", "lat"]].to_numpy()
    try:
        windows = read_scene(hrefs, places, params.patch_pixels, params.resolution_m, traffic)["SCL"]
    except UnreadableAsset:
        table.loc[group.index, "reason"] = "unreadable scene classification"
        return
    for i, window in zip(group.index, windows, strict=True):
        if window is None:
            table.loc[i, "reason"] = EDGE
            continue
        clear, saturated = 1 - _share(window, CLOUDY), _share(window, SATURATED)
        table.loc[i, ["clear_fraction", "saturated_fraction", "dark_share"]] = clear, saturated, _share(window, DARK)
        table.loc[i, "reason"] = _reason(_share(window, NO_DATA), clear, saturated, params)


def _reason(nodata: float, clear: float, saturated: float, params: SampleParams) -> str:
    """Why a window of the scene classification with these shares is rejected; empty where it is good."""
    if nodata > params.max_nodata_fraction:
        return NODATA
    if clear < params.min_clear_fraction:
        return "not clear"
    return "saturated" if saturated > params.max_saturated_fraction else ""


def _share(window: NDArray, classes: tuple[int, ...]) -> float:
    return float(np.isin(window, classes).mean())
