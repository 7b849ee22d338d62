"""Screens places: one unit finds the scenes of a grid-zone cell's candidates, and judges them until one is good.

A part has a row for each scene of each place, the first to be tried first (`rank`). The one whose `reason` is empty is
to be read; those before it were tried in vain, and say why; those after it are `UNTRIED`, and serve where it cannot be
read.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra import metrics
from infra.addresses import shown
from infra.imagery import assets
from infra.imagery.assets import Asset
from infra.imagery.cogs import RefusedAsset, Traffic, UnreadableAsset, read_scene
from infra.imagery.ranges import is_gone
from infra.imagery.signing import signs
from infra.stac.items import UsableItem
from tasks.core.sentinel2.composite import NOT_CLEAR
from tasks.core.sentinel2.radiometry import decide
from tasks.params import SampleParams
from tasks.patches import reuse, store
from tasks.patches.estimate import THREADS, Meter
from tasks.patches.reasons import Reason
from tasks.patches.scenes import assets_of, find_items, rank_scenes, version

NO_DATA, SATURATED, DARK = (0,), (1,), (4, 6)  # SCL: no data; saturated or defective; vegetation, water
JUDGED = ["reason", "clear_fraction", "saturated_fraction", "dark_share"]  # columns that a scene classification tells


def screen_cell(
    url: str, params: SampleParams, unit: tuple[int, int, NDArray[np.float64]], sources: Sequence[str] = ()
) -> None:
    """Judges the candidates of one cell, and stores the verdicts.

    Args:
        url: The patch store.
        params: How to choose and judge.
        unit: Round, cell, and its candidates: (n, 5), see `tasks.patches.places.draw`.
        sources: Other samples, whose verdicts are taken over.
    """
    number, cell, candidates = unit
    meter = Meter()
    tables = reuse.screened(sources, cell, candidates[:, 0])
    known = [row for table in tables for row in table["row_id"]]
    new = candidates[~np.isin(candidates[:, 0], known)]
    if len(new):
        tables.append(_screen(new, params, meter.traffic))
    table = pd.concat(tables).sort_values(["row_id", "rank"], ignore_index=True).assign(round=number, cell=cell)
    store.create_part(url, "screen", number, cell, meter.stamp(table))


def _screen(candidates: NDArray[np.float64], params: SampleParams, traffic: Traffic) -> pd.DataFrame:
    """Returns the rows of candidates, by asking the catalog and the archive."""
    items = find_items(candidates[:, 1:3], params)
    ranked = rank_scenes(items, candidates, params)
    chosen = {scene.id: scene for scenes, _ in ranked for scene in scenes}
    facts = {name: _facts(scene) for name, scene in chosen.items()}
    table = pd.DataFrame(
        [row for candidate, choice in zip(candidates, ranked, strict=True) for row in _rows(candidate, *choice, facts)]
    )
    judge_in_order(table, {item.id: assets_of(item) for item in items}, params, traffic)
    metrics.count(metrics.PLACES, by_place(table)["reason"])
    return table


def _rows(
    candidate: NDArray[np.float64], scenes: list[UsableItem], reason: str, facts: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns a place's rows: one per scene, with the scene's facts, or one that says why it has none."""
    place = {"row_id": int(candidate[0]), "lon": candidate[1], "lat": candidate[2], "rank": 0, "item_id": ""}
    place |= {"reason": reason} | dict.fromkeys(JUDGED[1:], np.nan)
    return [place | {"rank": rank} | facts[scene.id] for rank, scene in enumerate(scenes)] or [place]


def _facts(scene: UsableItem) -> dict[str, Any]:
    found, number, full = decide(scene.to_dict(transform_hrefs=False)), version(scene), assets_of(scene)
    return {
        "item_id": scene.id,
        "reason": Reason.UNTRIED,
        "catalog": scene.extra_fields.get("catalog", ""),
        "collection": scene.collection_id or "",
        "assets": {band: shown(asset.href) for band, asset in full.items()} or None,  # Parquet has no empty mapping
        "sources": assets.to_text(full),
        "passing": any(shown(asset.href) != asset.href and not signs(asset.href) for asset in full.values()),
        "datetime": str(scene.properties.get("datetime")),
        "platform": str(scene.properties.get("platform", "")),
        "baseline": f"{number[0]:02d}.{number[1]:02d}",
        "offset": found.offset,
        "offset_reason": "; ".join(found.reasons),
    }


def by_place(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per place: its good scene, else the one that it had rather had."""
    last = table.assign(bad=table["reason"] != "").sort_values(["row_id", "bad"], kind="stable")
    return last.drop_duplicates("row_id").drop(columns="bad")


def judge_in_order(
    table: pd.DataFrame, full: Mapping[str, Mapping[str, Asset]], params: SampleParams, traffic: Traffic
) -> None:
    """Judges the scenes of each place until one is good; the verdicts are put into the table.

    Args:
        table: Rows of places and scenes.
        full: Assets that can be read now, by item and band.
        params: How to judge.
        traffic: Counts requests and bytes.

    Raises:
        RefusedAsset: A scene is refused, and so is all else.
        UnavailableAsset: A scene cannot be had now, so nothing is known of its places.
    """
    refused: list[RefusedAsset] = []
    for rank in range(int(table["rank"].max()) + 1):
        served = table.loc[table["reason"] == "", "row_id"]
        turn = table[(table["rank"] == rank) & (table["reason"] == Reason.UNTRIED) & ~table["row_id"].isin(served)]
        groups = [(group, full[str(item)]) for item, group in turn.groupby("item_id")]
        with ThreadPoolExecutor(THREADS) as pool:
            verdicts = list(pool.map(lambda job: judge(job[0], job[1], params, traffic, refused), groups))
        if verdicts:
            table.loc[turn.index, JUDGED] = pd.concat(verdicts)
    settle(refused)


def judge(
    group: pd.DataFrame, full: Mapping[str, Asset], params: SampleParams, traffic: Traffic, refused: list[RefusedAsset]
) -> pd.DataFrame:
    """Returns the verdict (`JUDGED`) on the places of one scene, by the scene classification around them.

    What access is refused to is added to `refused`: the caller settles whether it is gone.
    """
    verdict = group[JUDGED].copy()
    missing = [band for band in (*params.bands, "SCL") if band not in full]
    if missing:
        return verdict.assign(reason=f"{Reason.MISSING_ASSET} {missing[0]}")
    places = group[["lon", "lat"]].to_numpy()
    try:
        found = read_scene({"SCL": full["SCL"]}, places, params.patch_pixels, params.resolution_m, traffic)
    except UnreadableAsset:
        return verdict.assign(reason=Reason.UNREADABLE_CLASSES)
    except RefusedAsset as error:
        refused.append(error)
        return verdict.assign(reason=Reason.REFUSED)
    inside = np.array([window is not None for window in found["SCL"]])
    verdict.loc[~inside, "reason"] = Reason.EDGE
    if inside.any():
        windows = np.stack([window for window in found["SCL"] if window is not None])
        verdict.loc[inside, JUDGED] = _verdicts(windows, params).set_axis(verdict.index[inside])
    return verdict


def settle(refused: list[RefusedAsset]) -> None:
    """Lets pass what was refused where its neighbours are served: it is gone, from where nothing may be listed.

    Raises:
        RefusedAsset: All is refused: the server lets us in no more.
    """
    for error in refused:
        if not is_gone(error):
            raise error


def _verdicts(windows: NDArray, params: SampleParams) -> pd.DataFrame:
    """Returns the verdicts (`JUDGED`) on windows of the scene classification, (place, y, x)."""
    clear, saturated = 1 - _shares(windows, NOT_CLEAR), _shares(windows, SATURATED)
    faults = {
        Reason.NODATA: _shares(windows, NO_DATA) > params.max_nodata_fraction,
        Reason.NOT_CLEAR: clear < params.min_clear_fraction,
        Reason.SATURATED: saturated > params.max_saturated_fraction,
    }
    reasons = np.select(list(faults.values()), list(faults), "")  # the first fault counts
    return pd.DataFrame(dict(zip(JUDGED, (reasons, clear, saturated, _shares(windows, DARK)), strict=True)))


def _shares(windows: NDArray, classes: tuple[int, ...]) -> NDArray[np.float64]:
    """Returns the share of each window's pixels that have one of the classes."""
    return np.isin(windows, classes).mean((1, 2))
