"""The sample step: from a STAC catalog to a patch store.

1. Places are drawn from the seed's stream, uniformly by area on land.
2. They are *screened*, one unit per grid-zone cell: search the catalog, choose the least cloudy scene that
   holds the patch, decide its radiometry, read the scene classification around it.
3. The plan (the first clear places in stream order, with spares) is frozen in `plan.parquet`, so that a rerun
   goes on with it even where the catalog has changed since.
4. Pixels are *read*, one unit per shard, with one open per asset and scene. A patch whose pixels cannot be read
   is replaced by one of its shard's spares.
"""

import hashlib
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pystac
import shapely
from distributed import Client
from numpy.typing import NDArray

from infra import storage
from infra.catalogs import open_catalog, search, unsigned
from infra.cogs import UnreadableAsset, read_windows
from infra.errors import UserError
from infra.settings import settings
from tasks import patches as store
from tasks.artifacts import keep_picture
from tasks.cards import fingerprint, is_finished, product_url, write_card
from tasks.core.radiometry import baseline, decide
from tasks.core.sampling import draw_land, grid_zone
from tasks.params import SampleParams
from tasks.pictures import sample_map
from tasks.units import log, run_units

CLOUDY = (0, 1, 3, 8, 9, 10)  # SCL: no data, saturated, shadow, cloud (medium, high), cirrus
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
}
SPARES = 0.05  # of a shard's patches, to replace what cannot be read
ROUNDS = 4
THREADS = 8  # reads at a time in one unit: they wait for the network


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
    made_of = {"collection": where.collection, **params.model_dump()}
    url = product_url("patches", made_of)
    if is_finished(url):
        log().info("%s is there already", url)
        return url
    storage.check_writable(where.storage_url)
    open_catalog(where.stac_url, where.collection)
    plan, rejected = read_plan(url) or make_plan(client, url, params)
    store.create(url, params.patches, params.bands, params.patch_pixels, params.resolution_m, params.shard_patches)
    shards = sorted(plan["shard"].unique())
    left = [int(s) for s in shards if not storage.exists(_part(url, s))]
    run_units(client, partial(read_shard, url, params), left, label="read patches", name=_shard_name)
    rows = pd.concat([_read_parquet(_part(url, s)) for s in shards], ignore_index=True)
    store.write_manifest(url, rows)
    source = attribution(where.stac_url, where.collection)
    picture = sample_map(rows[["lon", "lat"]].to_numpy(), f"{len(rows):,} patches, uniform by area on land", source)
    keep_picture(storage.join(url, "samples.png"), picture, "sample-map", "Where the patches were taken")
    write_card(
        url,
        "patches",
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        attribution=source,
        rejected=rejected | {"unreadable": int(rows["replaced"].sum())},
    )
    return url


def attribution(url: str, collection: str) -> str:
    """The source's line: the catalog's own where it is a stand-in, else Copernicus'."""
    title = open_catalog(url, collection).get_collection(collection).title or ""
    return title if "standing in" in title else "Contains modified Copernicus Sentinel data"


def make_plan(client: Client, url: str, params: SampleParams) -> tuple[pd.DataFrame, dict[str, int]]:
    """Screens candidates in rounds until enough are clear, and freezes the plan."""
    wanted = params.patches + _spares(params.shard_patches) * -(-params.patches // params.shard_patches)
    screened = pd.DataFrame()
    candidates = 0
    for number in range(ROUNDS):
        accepted = int((screened["reason"] == "").sum()) if len(screened) else 0
        if accepted >= wanted:
            break
        rate = max(accepted / candidates, 0.05) if candidates else 0.8
        start, candidates = candidates, candidates + int((wanted - accepted) / rate * 1.1) + 16
        screened = pd.concat([screened, screen(client, url, params, number, start, candidates)])
    clear = screened[screened["reason"] == ""].sort_values("row_id")
    rejected = dict(Counter(screened.loc[screened["reason"] != "", "reason"]))
    if len(clear) < params.patches:
        raise UserError(
            f"only {len(clear)} of {params.patches} patches were found among {len(screened)} places "
            f"({_counts(rejected)}): widen --datetime, raise --max-cloud-percent or ask for fewer"
        )
    plan = assign(clear, params)
    buffer = io.BytesIO()
    plan.attrs = {}
    plan.to_parquet(buffer)
    storage.write_json(storage.join(url, "rejected.json"), rejected)
    storage.create(storage.join(url, "plan.parquet"), buffer.getvalue())
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


def screen(client: Client, url: str, params: SampleParams, number: int, start: int, stop: int) -> pd.DataFrame:
    """Screens the candidates from `start` to `stop`, one unit per grid-zone cell."""
    places = draw_land(stop, params.seed, params.south, params.north)[start:]
    rows = np.column_stack([np.arange(start, stop), places])
    cells = grid_zone(places)
    home = storage.join(url, "screen", str(number))
    there = set(storage.names(home))
    units = [(int(cell), rows[cells == cell]) for cell in np.unique(cells)]
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
    """Finds and judges the scene of each place of one cell, and stores the verdicts."""
    cell, rows = unit
    items = find_items(rows[:, 1:], params)
    scenes = choose(items, rows[:, 1:], params.patch_pixels * params.resolution_m)
    verdicts = [_verdict(row, scene) for row, scene in zip(rows, scenes, strict=True)]
    table = pd.DataFrame(verdicts).assign(cell=cell)
    for _, group in table[table["reason"] == ""].groupby("item_id"):
        judge(table, group, params)
    storage.write(storage.join(home, f"{cell}.parquet"), _parquet(table))


def find_items(lonlat: NDArray[np.float64], params: SampleParams) -> list[pystac.Item]:
    """The items that may hold any of the places."""
    where = settings()
    geometry = {"type": "MultiPoint", "coordinates": lonlat.tolist()}
    return search(where.stac_url, where.collection, params.datetime, geometry, params.max_cloud_percent)


def choose(items: list[pystac.Item], lonlat: NDArray[np.float64], side_m: float) -> list[pystac.Item | None]:
    """For each place, the least cloudy item that holds its whole patch; the newest baseline among duplicates.

    Args:
        items: Candidates.
        lonlat: Places, (n, 2) in degrees.
        side_m: Side of a patch in metres.
    """
    corners = patch_corners(lonlat, side_m)
    holds = [_holds(item, corners) for item in items]
    chosen: list[pystac.Item | None] = []
    for place in range(len(lonlat)):
        newest: dict[str, pystac.Item] = {}
        for item in (item for item, held in zip(items, holds, strict=True) if held[place]):
            best = newest.setdefault(_acquisition(item), item)
            newest[_acquisition(item)] = max(best, item, key=_version)
        chosen.append(min(newest.values(), key=lambda i: (i.properties.get("eo:cloud_cover", 0), i.id), default=None))
    return chosen


def patch_corners(lonlat: NDArray[np.float64], side_m: float) -> NDArray[np.float64]:
    """Corners of the patches and their centres, (n, 5, 2) in degrees, a little outside for safety."""
    half = 0.5 * 1.1 * side_m / 111_200
    lat = lonlat[:, None, 1] + half * np.array([1, 1, -1, -1, 0])
    width = half / np.cos(np.radians(np.clip(np.abs(lat), 0, 89)))
    lon = lonlat[:, None, 0] + width * np.array([-1, 1, -1, 1, 0])
    return np.stack([(lon + 180) % 360 - 180, lat], axis=-1)


def _holds(item: pystac.Item, corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    geometry = shapely.geometry.shape(item.geometry)
    shapely.prepare(geometry)
    return shapely.intersects_xy(geometry, corners[..., 0], corners[..., 1]).all(1)


def _acquisition(item: pystac.Item) -> str:
    return f"{item.properties.get('s2:datatake_id', '')} {_tile(item)} {item.datetime}"


def _version(item: pystac.Item) -> tuple[int, int]:
    return baseline({"id": item.id, "properties": item.properties}) or (0, 0)


def _tile(item: pystac.Item) -> str:
    return str(item.properties.get("s2:mgrs_tile") or item.properties.get("grid:code") or item.id)


def _verdict(row: NDArray[np.float64], scene: pystac.Item | None) -> dict[str, Any]:
    verdict = {"row_id": int(row[0]), "lon": row[1], "lat": row[2], "item_id": "", "reason": ""}
    if scene is None:
        return verdict | {"reason": "no scene", "clear_fraction": np.nan}
    found = decide(scene.to_dict(transform_hrefs=False))
    reason = "radiometry quarantined" if found.quarantined else ""
    version = _version(scene)
    return verdict | {
        "item_id": scene.id,
        "assets": {band: unsigned(scene.assets[key].href) for band, key in asset_keys(scene).items()},
        "datetime": str(scene.properties.get("datetime")),
        "platform": str(scene.properties.get("platform", "")),
        "baseline": f"{version[0]:02d}.{version[1]:02d}",
        "offset": found.offset,
        "offset_reason": "; ".join(found.reasons),
        "clear_fraction": np.nan,
        "reason": reason,
    }


def asset_keys(item: pystac.Item) -> dict[str, str]:
    """Asset key by band name (`B04`) and `SCL`: by key, by common name, or by what the asset says of its band."""
    found: dict[str, str] = {}
    for band, common in [*NAMES.items(), ("SCL", "scl")]:
        for key, asset in item.assets.items():
            bands = asset.extra_fields.get("eo:bands") or asset.extra_fields.get("bands") or []
            named = len(bands) == 1 and bands[0].get("name") == band
            if key in (band, common) or (named and key != "visual"):
                found.setdefault(band, key)
    return found


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
        clear = 1 - float(np.isin(window, CLOUDY).mean())
        table.loc[i, "clear_fraction"] = clear
        if clear < params.min_clear_fraction:
            table.loc[i, "reason"] = "not clear"


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
        if all(w is not None and w.any() for w in windows):
            found[i] = np.stack(windows).astype(np.uint16)  # type: ignore[arg-type]
    return found


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
