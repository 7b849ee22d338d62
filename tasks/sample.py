"""The sample step: from a STAC catalog to a patch store.

1. Places are drawn from the seed's stream: uniformly by area on land, or as `places` says.
2. They are *screened*, one unit per grid-zone cell: search the catalog, choose a scene that holds the patch,
   decide its radiometry, read the scene classification around it.
3. The plan (the first clear places in stream order, with spares) is frozen in `plan.parquet`, so that a rerun
   goes on with it even where the catalog has changed since.
4. Pixels are *read*, one unit per shard, with one open per asset and scene. A patch whose pixels cannot be read
   is replaced by one of its shard's spares.
"""

import hashlib
import io
import itertools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pystac
from distributed import Client
from numpy.typing import NDArray

from infra import storage
from infra.catalogs import ask, collection_title, unsigned
from infra.cogs import UnreadableAsset, read_windows
from infra.errors import UserError
from infra.settings import settings
from tasks import patches as store
from tasks.artifacts import keep_picture, keep_table
from tasks.cards import fingerprint, is_finished, product_url, write_card
from tasks.core.radiometry import NODATA, check_numbers, decide
from tasks.core.sampling import grid_zone
from tasks.estimate import SPARES, THREADS, beside, estimate
from tasks.params import SampleParams
from tasks.pictures import sample_map
from tasks.places import draw, source_digest
from tasks.scenes import asset_keys, choose, find_items, version
from tasks.units import log, run_units

SATURATED, DARK = (1,), (4, 6)  # SCL: saturated or defective; vegetation, water
CLOUDY = (0, 1, 3, 8, 9, 10)  # SCL: no data, saturated, shadow, cloud (medium, high), cirrus


def sample_patches(client: Client, params: SampleParams) -> str:
    """Samples patches, resuming what an earlier run began.

    Args:
        client: The Dask cluster.
        params: Where, when and how many.

    Returns:
        The URL of the patch store.

    Raises:
        UserError: The catalog does not answer, has nothing that fits, or storage cannot be written.
    """
    where = settings()
    made_of = {"collection": where.collection, **params.model_dump(), **source_digest(params)}
    url = product_url("patches", made_of)
    if is_finished(url):
        log().info("%s is there already", url)
        return url
    began = time.monotonic()
    storage.check_writable(where.storage_url)
    source = attribution()
    planned = estimate(params, where.workers)
    plan, rejected = read_plan(url) or make_plan(client, url, params)
    store.create(url, params.patches, params.bands, params.patch_pixels, params.resolution_m, params.shard_patches)
    shards = sorted(plan["shard"].unique())
    left = [int(s) for s in shards if not storage.exists(_part(url, s))]
    run_units(client, partial(read_shard, url, params), left, label="read patches", name=_shard_name)
    rows = pd.concat([_read_parquet(_part(url, s)) for s in shards], ignore_index=True)
    store.write_manifest(url, rows)
    picture = sample_map(rows[["lon", "lat"]].to_numpy(), f"{len(rows):,} patches, uniform by area on land", source)
    keep_picture(storage.join(url, "samples.png"), picture, "sample-map", "Where the patches were taken")
    rejected |= {"unreadable": int(rows["replaced"].sum())}
    actual = actuals(url, params, rows, rejected) | {"seconds": f"{time.monotonic() - began:,.0f}"}
    keep_table(storage.join(url, "run.md"), beside(planned, actual), "sample-run", "Planned and actual cost")
    write_card(
        url,
        "patches",
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        attribution=source,
        rejected=rejected,
        offset_checks=rows["offset_check"].value_counts().to_dict(),
    )
    return url


def actuals(url: str, params: SampleParams, rows: pd.DataFrame, rejected: dict[str, int]) -> dict[str, str]:
    """What the run took, by the names of its estimate."""
    scenes, tried = rows["item_id"].nunique(), len(rows) + sum(rejected.values())
    counts = {
        "places": tried,
        "cells": len(np.unique(grid_zone(rows[["lon", "lat"]].to_numpy()))),
        "scenes": scenes,
        "requests": scenes * (len(params.bands) + 1) + tried + len(rows) * len(params.bands),
    }
    stored = storage.size(storage.join(url, "patches.zarr"))
    return {name: f"{count:,}" for name, count in counts.items()} | {"bytes stored": f"{stored / 1e9:,.2f} GB"}


def attribution() -> str:
    """The source's line: the catalog's own where it is a stand-in, else Copernicus'."""
    title = ask(collection_title)
    return title if "standing in" in title else "Contains modified Copernicus Sentinel data"


def make_plan(client: Client, url: str, params: SampleParams) -> tuple[pd.DataFrame, dict[str, int]]:
    """Screens candidates in rounds until enough are clear or the tries are spent, and freezes the plan."""
    wanted = params.patches + _spares(params.shard_patches) * -(-params.patches // params.shard_patches)
    most = int(params.patches * params.max_tries) + 16
    screened, tried, clear = pd.DataFrame({"reason": []}), 0, 0
    for number in itertools.count():
        rate = max(clear / tried, 0.05) if tried else 0.8
        more = draw(min(most, tried + int((wanted - clear) / rate * 1.1) + 16), params)[tried:]
        if clear >= wanted or not len(more):
            break
        screened, tried = pd.concat([screened, screen(client, url, params, number, more)]), tried + len(more)
        clear = int((screened["reason"] == "").sum())
    rejected = dict(Counter(screened.loc[screened["reason"] != "", "reason"]))
    if clear < params.patches:
        raise UserError(
            f"only {clear} of {params.patches} patches were found among {len(screened)} places "
            f"({_counts(rejected)}): widen --datetime, raise --max-cloud-percent or --max-tries, or ask for fewer"
        )
    plan = assign(screened[screened["reason"] == ""].sort_values("row_id"), params)
    storage.write_json(storage.join(url, "rejected.json"), rejected)
    storage.create(storage.join(url, "plan.parquet"), _parquet(plan))
    return read_plan(url) or (plan, rejected)


def read_plan(url: str) -> tuple[pd.DataFrame, dict[str, int]] | None:
    """The frozen plan and the rejected by reason, if there is one."""
    if not storage.exists(storage.join(url, "plan.parquet")):
        return None
    return (
        _read_parquet(storage.join(url, "plan.parquet")),
        storage.read_json(storage.join(url, "rejected.json")),
    )


def assign(clear: pd.DataFrame, params: SampleParams) -> pd.DataFrame:
    """Gives each patch its shard, scene by scene, and spreads the spares over the shards."""
    chosen = clear.head(params.patches).sort_values(["cell", "item_id", "row_id"]).assign(spare=False)
    chosen["shard"] = np.arange(len(chosen)) // params.shard_patches
    spares = clear.iloc[params.patches :].assign(spare=True)
    spares["shard"] = np.arange(len(spares)) % (int(chosen["shard"].max()) + 1)
    return pd.concat([chosen, spares], ignore_index=True)


def screen(
    client: Client, url: str, params: SampleParams, number: int, candidates: NDArray[np.float64]
) -> pd.DataFrame:
    """Screens candidates, one unit per grid-zone cell."""
    cells = grid_zone(candidates[:, 1:3])
    home = storage.join(url, "screen", str(number))
    there = set(storage.names(home))
    units = [(int(cell), candidates[cells == cell]) for cell in np.unique(cells)]
    left = [unit for unit in units if f"{unit[0]}.parquet" not in there]
    run_units(
        client,
        partial(screen_cell, home, params),
        left,
        label="search and screen",
        name=lambda unit: f"cell {unit[0]}",
        max_failed_fraction=params.max_failed_fraction,
    )
    done = sorted(storage.names(home))
    if not done:
        raise UserError("no place could be screened: run again with more patches")
    return pd.concat([_read_parquet(storage.join(home, name)) for name in done], ignore_index=True)


def screen_cell(home: str, params: SampleParams, unit: tuple[int, NDArray[np.float64]]) -> None:
    """Finds and judges the scene of each candidate of one cell, and stores the verdicts."""
    cell, rows = unit
    chosen = choose(find_items(rows[:, 1:3], params), rows, params)
    verdicts = [_verdict(row, *choice) for row, choice in zip(rows, chosen, strict=True)]
    table = pd.DataFrame(verdicts).assign(cell=cell)
    for _, group in table[table["reason"] == ""].groupby("item_id"):
        judge(table, group, params)
    storage.write(storage.join(home, f"{cell}.parquet"), _parquet(table))


def _verdict(row: NDArray[np.float64], scene: pystac.Item | None, reason: str) -> dict[str, Any]:
    verdict = {"row_id": int(row[0]), "lon": row[1], "lat": row[2], "item_id": "", "reason": reason}
    verdict |= dict.fromkeys(("clear_fraction", "saturated_fraction", "dark_share"), np.nan)
    if scene is None:
        return verdict
    found = decide(scene.to_dict(transform_hrefs=False))
    reason = "radiometry quarantined" if found.quarantined else ""
    number = version(scene)
    return verdict | {
        "item_id": scene.id,
        "catalog": scene.extra_fields.get("catalog", ""),
        "collection": scene.collection_id or "",
        "assets": {band: unsigned(scene.assets[key].href) for band, key in asset_keys(scene).items()},
        "datetime": str(scene.properties.get("datetime")),
        "platform": str(scene.properties.get("platform", "")),
        "baseline": f"{number[0]:02d}.{number[1]:02d}",
        "offset": found.offset,
        "offset_reason": "; ".join(found.reasons),
        "reason": reason,
    }


def judge(table: pd.DataFrame, group: pd.DataFrame, params: SampleParams) -> None:
    """Reads the scene classification around the places of one scene, and rejects what is not clear."""
    assets = group["assets"].iloc[0]
    missing = [band for band in (*params.bands, "SCL") if band not in assets]
    if missing:
        table.loc[group.index, "reason"] = "missing asset " + missing[0]
        return
    try:
        windows = read_windows(
            assets["SCL"], group[["lon", "lat"]].to_numpy(), params.patch_pixels, params.resolution_m
        )
    except UnreadableAsset:
        table.loc[group.index, "reason"] = "unreadable scene classification"
        return
    for i, window in zip(group.index, windows, strict=True):
        if window is None:
            table.loc[i, "reason"] = "crosses the scene's edge"
            continue
        clear, saturated = 1 - _share(window, CLOUDY), _share(window, SATURATED)
        table.loc[i, ["clear_fraction", "saturated_fraction", "dark_share"]] = clear, saturated, _share(window, DARK)
        if clear < params.min_clear_fraction:
            table.loc[i, "reason"] = "not clear"
        elif saturated > params.max_saturated_fraction:
            table.loc[i, "reason"] = "saturated"


def _share(window: NDArray, classes: tuple[int, ...]) -> float:
    return float(np.isin(window, classes).mean())


def read_shard(url: str, params: SampleParams, shard: int) -> None:
    """Reads the patches of one shard, and stores them with their rows of the manifest."""
    plan, _ = read_plan(url) or (pd.DataFrame(), {})
    mine = plan[plan["shard"] == shard].reset_index(drop=True)
    chosen, spares = mine[~mine["spare"]], mine[mine["spare"]]
    pixels = read_scenes(chosen, params)
    rows = chosen.assign(replaced=False)
    failed = [i for i in chosen.index if i not in pixels]
    if failed:
        replace(rows, pixels, failed, spares, params, shard)
    stacked = np.stack([pixels[i] for i in chosen.index])
    rows["sha256"] = [hashlib.sha256(p.astype("<u2").tobytes()).hexdigest() for p in stacked]
    rows["nodata_fraction"] = [nodata_fraction(p) for p in stacked]
    checks = [check_numbers(*triple) for triple in zip(stacked, rows["offset"], rows["dark_share"], strict=True)]
    rows["dark_dn"], rows["offset_check"] = zip(*checks, strict=True)
    rows["href"] = [assets[params.bands[0]] for assets in rows["assets"]]
    store.write_shard(url, shard * params.shard_patches, stacked)
    storage.write(_part(url, shard), _parquet(rows[[*store.MANIFEST, "replaced"]]))


def replace(
    rows: pd.DataFrame,
    pixels: dict[int, NDArray],
    failed: list[int],
    spares: pd.DataFrame,
    params: SampleParams,
    shard: int,
) -> None:
    """Puts spares, in their order, in the place of patches that cannot be read."""
    readable = read_scenes(spares, params)
    if len(readable) < len(failed):
        raise UserError(
            f"{len(failed)} patches of shard {shard} cannot be read and only {len(readable)} spares can: check "
            "that the imagery is reachable, and run again"
        )
    for i, spare in zip(failed, sorted(readable), strict=False):
        pixels[i] = readable[spare]
        rows.loc[i, spares.columns] = spares.loc[spare]
        rows.loc[i, "replaced"] = True


def read_scenes(rows: pd.DataFrame, params: SampleParams) -> dict[int, NDArray[np.uint16]]:
    """Pixels (band, y, x) by row index; rows whose pixels are missing, corrupt or nodata are left out."""
    groups = [group for _, group in rows.groupby("item_id")]
    with ThreadPoolExecutor(THREADS) as pool:
        return {i: p for found in pool.map(partial(_read_scene, params), groups) for i, p in found.items()}


def _read_scene(params: SampleParams, group: pd.DataFrame) -> dict[int, NDArray[np.uint16]]:
    assets, places = group["assets"].iloc[0], group[["lon", "lat"]].to_numpy()
    try:
        layers = [read_windows(assets[b], places, params.patch_pixels, params.resolution_m) for b in params.bands]
    except UnreadableAsset as error:
        log().warning("%s; its %d patches are replaced", error, len(group))
        return {}
    found: dict[int, NDArray[np.uint16]] = {}
    for position, i in enumerate(group.index):
        windows = [layer[position] for layer in layers]
        if any(w is None for w in windows):
            continue
        patch = np.stack(windows).astype(np.uint16)  # type: ignore[arg-type]
        if nodata_fraction(patch) <= params.max_nodata_fraction:
            found[i] = patch
    return found


def nodata_fraction(patch: NDArray[np.uint16]) -> float:
    """Share of the pixels of a (band, y, x) patch without data in some band."""
    return float((patch == NODATA).any(0).mean())


def _spares(shard_patches: int) -> int:
    return max(1, int(SPARES * shard_patches))


def _shard_name(shard: int) -> str:
    return f"shard {shard}"


def _part(url: str, shard: Any) -> str:
    return storage.join(url, "parts", f"{shard:05d}.parquet")


def _counts(rejected: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items())) or "none rejected"


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _read_parquet(url: str) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO(storage.read(url)))
