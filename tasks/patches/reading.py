"""Reads patches: one unit reads the pixels of one shard's places, and checks them.

A shard that lacks patches is not written to the store: its pixels are *held* until a later round has read what
replaces them. So the store's shards are whole from the first byte on, and no patch is ever silently nodata.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra import metrics, storage
from infra.imagery import assets
from infra.imagery.assets import Asset
from infra.imagery.cogs import RefusedAsset, Traffic, UnreadableAsset, read_scene
from tasks.core.sentinel2 import radiometry
from tasks.core.sentinel2.composite import composite
from tasks.params import SampleParams
from tasks.patches import reuse, store
from tasks.patches.estimate import COMPOSED, THREADS, Meter
from tasks.patches.reasons import Reason
from tasks.patches.scenes import assets_of, find_items
from tasks.patches.screening import JUDGED, judge, settle
from tasks.units import log

FOUND = ["sha256", "nodata_fraction", "dark_dn", "offset_check"]  # columns that a read adds


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
    choices = _planned(url, number, shard)
    pixels = _held(url, params, number, shard)
    copied = reuse.copy(store.read_part(url, "plan", number, shard), pixels, start)
    if len(copied):
        choices = choices[~choices["position"].isin(copied["position"])]
    tables = [copied, _read(choices, Reader(params, pixels, start, meter.traffic))]
    table = pd.concat([table for table in tables if len(table)]).sort_values("position", ignore_index=True)
    if (table["reason"] == "").all():
        target = url
    else:
        target = store.held(url, number)
    store.create(target, *shape(params))
    store.write_shard(target, start, pixels)
    store.create_part(url, "parts", number, shard, meter.stamp(table))


def _read(choices: pd.DataFrame, reader: "Reader") -> pd.DataFrame:
    """Reads the places of a shard that come from the archive, and returns their rows."""
    if not len(choices):
        return choices
    plan = reader.compose(choices) if reader.params.scene == "composite" else reader.read(choices)
    plan.index = plan["position"] - reader.start
    plan["href"] = [assets[reader.params.bands[0]] for assets in plan["assets"]]
    metrics.count(metrics.PATCHES, plan["reason"])
    good = plan[plan["reason"] == ""]
    told = zip(good.index, good["offset"], good["dark_share"], strict=True)
    numbers = [_numbers(reader.pixels[i], offset, dark_share) for i, offset, dark_share in told]
    found = pd.DataFrame(numbers, good.index, FOUND)
    return plan.join(found).reset_index(drop=True)


def shape(params: SampleParams) -> tuple[int, tuple[str, ...], int, float, int]:
    """Returns the store's shape, as `tasks.patches.store.create` takes it."""
    return params.patches, params.bands, params.patch_pixels, params.resolution_m, params.shard_patches


def _planned(url: str, number: int, shard: int) -> pd.DataFrame:
    """Returns the scenes of the planned places: the good one of the screening first, then those not tried yet."""
    plan = store.read_part(url, "plan", number, shard)
    parts = np.unique(plan[["round", "cell"]], axis=0).tolist()
    screened = pd.concat([store.read_part(url, "screen", *part) for part in parts])
    scenes = screened[screened["reason"].isin(["", Reason.UNTRIED])]
    return plan[["position", "row_id"]].merge(scenes, on="row_id")


def _held(url: str, params: SampleParams, number: int, shard: int) -> NDArray[np.uint16]:
    """Returns a shard's pixels, (patch, band, y, x), as earlier rounds left them, 0 where patches are missing."""
    start = shard * params.shard_patches
    count = min(params.shard_patches, params.patches - start)
    if number == 0:
        return np.zeros((count, len(params.bands), params.patch_pixels, params.patch_pixels), np.uint16)
    pixels = store.read_rows(store.held(url, number - 1), slice(start, start + count))
    earlier = pd.concat([store.read_part(url, "parts", n, shard) for n in range(number)])
    good = earlier[earlier["reason"] == ""]
    for position, digest in zip(good["position"], good["sha256"], strict=True):
        if store.digest(pixels[position - start]) != digest:
            raise RuntimeError(f"the pixels held for shard {shard} are gone: another run has finished the store")
    return pixels


class Part(NamedTuple):
    """What one scene adds to a composite."""

    item: str
    """Id of the item."""
    pixels: NDArray[np.uint16]
    """Raw numbers, (band, y, x)."""
    classes: NDArray[np.uint8]
    """Scene classification, (y, x)."""
    offset: int
    """DN to add."""


@dataclass
class Reader:
    """Reads the patches of one shard, each from the first of its scenes that has it."""

    params: SampleParams
    """Bands, size, thresholds."""
    pixels: NDArray[np.uint16]
    """(patch, band, y, x), written where a patch is good."""
    start: int
    """Position of the first patch."""
    traffic: Traffic
    """Counts requests and bytes."""
    refused: list[RefusedAsset] = field(default_factory=list)
    """What access was refused to."""
    doubtful: set[int] = field(default_factory=set)
    """Positions of patches that hold numbers beyond the format: kept where no other scene serves."""

    def read(self, choices: pd.DataFrame) -> pd.DataFrame:
        """Reads the patches, scene by scene, in turns: in each the next scene of every place that lacks one.

        Args:
            choices: The places' scenes in order, as `_planned` gives them.

        Returns:
            One row per place: the scene that it was read from, with an empty reason, or its first one and why not.

        Raises:
            RefusedAsset: A scene is refused, and so is all else.
            UnavailableAsset: An asset cannot be had now, so nothing is known of its patches.
        """
        choices = choices.reset_index(drop=True)
        first = choices.drop_duplicates("position")
        found = pd.Series(first.index, first["position"])
        turns = choices.groupby("position").cumcount()
        lacking = set(found.index)
        for turn in range(int(turns.max()) + 1):
            rows = choices[(turns == turn) & choices["position"].isin(lacking)]
            if rows.empty:
                break
            verdict = self._turn(rows)
            choices.loc[verdict.index, JUDGED] = verdict
            for row, position, reason in zip(rows.index, rows["position"], verdict["reason"][rows.index], strict=True):
                if not reason:
                    found[position] = row
                if not reason and position not in self.doubtful:
                    lacking.discard(position)
        settle(self.refused)
        return choices.loc[found]

    def compose(self, choices: pd.DataFrame) -> pd.DataFrame:
        """Makes each patch of several of its scenes, some places at a time, since all their scenes are in memory.

        Args:
            choices: The places' scenes in order, as `_planned` gives them.

        Returns:
            One row per place: its first scene, with all ids; an empty reason, or why there is no patch.

        Raises:
            RefusedAsset: A scene is refused, and so is all else.
            UnavailableAsset: An asset cannot be had now.
        """
        places = choices["position"].unique()
        found = [
            self._composed(choices[choices["position"].isin(some)].reset_index(drop=True))
            for some in np.array_split(places, -(-len(places) // COMPOSED))
        ]
        settle(self.refused)
        return pd.concat(found, ignore_index=True)

    def _composed(self, choices: pd.DataFrame) -> pd.DataFrame:
        parts: dict[int, list[Part]] = {position: [] for position in choices["position"].unique()}
        first, turns = choices.drop_duplicates("position").copy(), choices.groupby("position").cumcount()
        reasons: dict[int, str] = {}
        for turn in range(int(turns.max()) + 1):
            lacking = [position for position, had in parts.items() if len(had) < self.params.composite_scenes]
            rows = choices[(turns == turn) & choices["position"].isin(lacking)]
            full = self._full(rows) if len(rows) else {}
            groups = [(group, full[str(item)]) for item, group in rows.groupby("item_id")]
            with ThreadPoolExecutor(THREADS) as pool:
                for group, windows in pool.map(lambda job: (job[0], self._parts(*job)), groups):
                    for position, part in zip(group["position"], windows, strict=True):
                        if isinstance(part, str):
                            reasons.setdefault(position, part)
                        else:
                            parts[position].append(part)
        for row, position in zip(first.index, first["position"], strict=True):
            if not parts[position]:
                first.loc[row, "reason"] = reasons[position]
                continue
            patch, offset = composite(*zip(*(part[1:] for part in parts[position]), strict=True))
            first.loc[row, ["item_id", "offset"]] = " ".join(part.item for part in parts[position]), offset
            first.loc[row, "reason"] = self._keep(position, tuple(patch))
        return first

    def _parts(self, group: pd.DataFrame, full: dict[str, Asset]) -> "list[Part | str]":
        """Returns what one scene has of each place, or why it has nothing."""
        params, wanted = self.params, (*self.params.bands, "SCL")
        if not set(wanted) <= set(full):
            return [Reason.UNREADABLE] * len(group)
        places = group[["lon", "lat"]].to_numpy()
        named = {band: full[band] for band in wanted}
        try:
            layers = read_scene(named, places, params.patch_pixels, params.resolution_m, self.traffic)
        except UnreadableAsset as error:
            log().warning("%s; %d patches are composed without it", error, len(group))
            return [Reason.UNREADABLE] * len(group)
        except RefusedAsset as error:
            self.refused.append(error)
            return [Reason.REFUSED] * len(group)
        parts: list[Part | str] = []
        of_places = zip(*layers.values(), strict=True)
        for item, offset, (*bands, scl) in zip(group["item_id"], group["offset"], of_places, strict=True):
            is_whole = all(window is not None for window in (*bands, scl))
            parts.append(Part(item, np.stack(bands), scl, offset) if is_whole else Reason.EDGE)
        return parts

    def _turn(self, rows: pd.DataFrame) -> pd.DataFrame:
        full = self._full(rows)
        groups = [(group, full[str(item)]) for item, group in rows.groupby("item_id")]
        with ThreadPoolExecutor(THREADS) as pool:
            return pd.concat(pool.map(lambda job: self._read_scene(*job), groups))

    def _full(self, rows: pd.DataFrame) -> dict[str, dict[str, Asset]]:
        """Assets that can be read now, by item; the catalog is asked again for those whose query is never stored."""
        items = rows.drop_duplicates("item_id")
        found = {str(row["item_id"]): _known(row) for row in items.to_dict("records")}
        if "passing" in rows:
            passing = rows[rows["passing"].eq(True)]
        else:
            passing = rows[:0]
        if len(passing):
            again = {item.id: assets_of(item) for item in find_items(passing[["lon", "lat"]].to_numpy(), self.params)}
            found |= {item: again.get(item, {}) for item in passing["item_id"].unique()}
        return found

    def _read_scene(self, group: pd.DataFrame, full: dict[str, Asset]) -> pd.DataFrame:
        """Returns the verdict on the places of one scene; places not screened yet are screened first."""
        verdict = group[JUDGED].copy()
        untried = group[group["reason"] == Reason.UNTRIED]
        if len(untried):
            verdict.loc[untried.index] = judge(untried, full, self.params, self.traffic, self.refused)
        clear = group[verdict["reason"] == ""]
        if len(clear):
            verdict.loc[clear.index, "reason"] = self._read_bands(clear, full)
        return verdict

    def _read_bands(self, group: pd.DataFrame, full: dict[str, Asset]) -> list[str]:
        """Returns why each place has no patch; empty where it has one."""
        places, params = group[["lon", "lat"]].to_numpy(), self.params
        if not set(params.bands) <= set(full):
            return [Reason.UNREADABLE] * len(group)
        bands = {band: full[band] for band in params.bands}
        try:
            layers = read_scene(bands, places, params.patch_pixels, params.resolution_m, self.traffic)
        except UnreadableAsset as error:
            log().warning("%s; its %d patches are read elsewhere", error, len(group))
            return [Reason.UNREADABLE] * len(group)
        except RefusedAsset as error:
            self.refused.append(error)
            return [Reason.REFUSED] * len(group)
        windows = zip(*layers.values(), strict=True)
        return [self._keep(position, patch) for position, patch in zip(group["position"], windows, strict=True)]

    def _keep(self, position: int, windows: tuple[NDArray | None, ...]) -> str:
        """Puts the bands' windows into the patch's row of `pixels`, or tells why not."""
        if any(window is None for window in windows):
            return Reason.EDGE
        patch = np.stack(windows)  # type: ignore[arg-type]
        if nodata_fraction(patch) > self.params.max_nodata_fraction:
            return Reason.NODATA
        if radiometry.beyond_format(patch):
            if position in self.doubtful:
                return Reason.BEYOND_FORMAT
            self.doubtful.add(position)
        else:
            self.doubtful.discard(position)
        self.pixels[position - self.start] = patch
        return ""


def _known(row: Mapping[Any, Any]) -> dict[str, Asset]:
    """Returns an item's own assets: Parquet gives each the bands of all, and earlier versions told hrefs alone."""
    hrefs = {band: href for band, href in row["assets"].items() if href is not None}
    told = row.get("sources")
    return assets.from_text(hrefs, told if isinstance(told, str) else "")


def nodata_fraction(patch: NDArray[np.uint16]) -> float:
    """Returns the share of a (band, y, x) patch's pixels without data in some band."""
    return float((patch == radiometry.NODATA_DN).any(0).mean())


def _numbers(patch: NDArray[np.uint16], offset: int, dark_share: float) -> list[Any]:
    """Returns the manifest's columns that come from a patch's pixels (`FOUND`)."""
    dark, check = radiometry.check_numbers(patch, offset, dark_share)
    return [store.digest(patch), nodata_fraction(patch), dark, check]
