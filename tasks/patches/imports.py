"""Imports a folder of images that others made (`tasks.patches.chips`) as a patch store that every step takes.

1. Images are *looked at*, one unit per block of them: each is read, and refused with a reason where it is no patch.
2. The offset of each is settled: by what its row or name tells of its processing, else by its pixels, else as most
   others of the folder have it. The manifest says for each how (`offset_reason`), the card how many (`offsets`).
3. The good ones are *read* again, one unit per shard of the store.

Each unit stores its part, as those of a sample do, so that a run that was killed goes on.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from distributed import Client

from infra import storage
from infra.addresses import as_url, name_of, shown
from infra.errors import UserError
from tasks.artifacts import keep_picture, keep_table
from tasks.cards import fingerprint, is_finished, product_url, write_card
from tasks.core.sentinel2 import radiometry
from tasks.core.sentinel2.items import baseline
from tasks.core.sentinel2.radiometry import OFFSET
from tasks.newest import enter
from tasks.params import ImportParams
from tasks.patches import store
from tasks.patches.chips import Chip, Refused, open_folder, read_chip
from tasks.patches.reading import nodata_fraction
from tasks.patches.reasons import Reason, counts
from tasks.patches.skew import skew_of, table
from tasks.plots.maps import sample_map
from tasks.products import PatchesCard
from tasks.units import log, run_units

ATTRIBUTION = "Contains modified Copernicus Sentinel data"
NO_CONTENT = {"line", "max_failed_fraction"}
LOOKED = store.MANIFEST | {  # columns of what looking at an image finds
    "reason": "str",  # why it is no patch; empty where it is one
    "told": "float64",  # the offset that its row or name tells; NaN where it tells none
    "seen": "float64",  # the offset that its pixels show; NaN where they show none
}
EMPTY: dict[str, Any] = {name: {"str": "", "int64": 0}.get(kind, np.nan) for name, kind in LOOKED.items()}
GIVEN, TOLD, SEEN, LIKELY = "as given", "told by row or name", "shown by the pixels", "as most others of the folder"
WHY = {
    0: "the pixels are darker than 1000 added to them allows",
    OFFSET: "the pixels of vegetation and water are as bright as 1000 added to them makes them",
}


Unit = tuple[int, list[Chip]]  # number of a block or of a shard, and its images


@dataclass(frozen=True)
class Job:
    """An import."""

    url: str
    """URL of the patch store."""
    folder: str
    """URL of the images."""
    params: ImportParams
    """Which of them, and how."""


def import_patches(client: Client, place: str, params: ImportParams) -> str:
    """Imports the images of a folder as patches, and resumes what an earlier run began.

    Args:
        client: The Dask cluster.
        place: Path or URL of the folder.
        params: Which images, and how.

    Returns:
        The URL of the patch store.

    Raises:
        UserError: The folder has no images that can be patches, or nothing tells their offset.
    """
    folder = open_folder(as_url(place))
    made_of = {"files": fingerprint(folder.tags), **params.model_dump(exclude=NO_CONTENT)}
    job = Job(product_url("patches", made_of), folder.url, params)
    if is_finished(job.url):
        log().info("%s is there already", job.url)
        enter(job.url, params.line)
        return job.url
    rows = settled(look(client, job, folder.chips), params)
    good = rows[rows["reason"] == ""]
    good = good.assign(position=range(len(good)))
    refused = folder.refused + Counter(rows.loc[rows["reason"] != "", "reason"])
    if good.empty:
        raise UserError(
            f"none of the images in {shown(folder.url)} can be a patch ({counts(refused)}): set --bands, "
            "--patch-pixels and --resolution-m to what they have"
        )
    shape = len(good), params.bands, params.patch_pixels, params.resolution_m, params.shard_patches
    store.create(job.url, *shape)
    read(client, job, good, folder.chips)
    _finish(job, made_of, good, refused)
    return job.url


def look(client: Client, job: Job, chips: list[Chip]) -> pd.DataFrame:
    """Returns what was found at each image: columns `LOOKED`."""
    size = job.params.shard_patches
    blocks = [(i, chips[start : start + size]) for i, start in enumerate(range(0, len(chips), size))]
    _run(client, look_at, job, "screen", blocks, "look at images")
    parts = [store.read_part(job.url, "screen", 0, block) for block, _ in blocks]
    return pd.concat(parts, ignore_index=True)


def look_at(job: Job, unit: Unit) -> None:
    """Looks at a block of images, and stores the verdicts."""
    block, chips = unit
    table = pd.DataFrame([_row(job, chip) for chip in chips]).astype(LOOKED)
    store.create_part(job.url, "screen", 0, block, table)


def _row(job: Job, chip: Chip) -> dict[str, Any]:
    """Returns what is found at an image."""
    href = shown(storage.join(job.folder, next(iter(chip.files))))
    row = EMPTY | {"row_id": chip.row, "href": href, "catalog": shown(job.folder), **_scene(chip)}
    try:
        patch, (lon, lat) = read_chip(job.folder, chip, job.params)
        if (empty := nodata_fraction(patch)) > job.params.max_nodata_fraction:
            raise Refused(Reason.NODATA)
        if radiometry.beyond_format(patch):
            raise Refused(Reason.BEYOND_FORMAT)
    except Refused as error:
        return row | {"reason": str(error)}
    dark, share = radiometry.darkest(patch), radiometry.dark_share(patch, job.params.bands)
    seen = {None: np.nan, True: OFFSET, False: 0}[radiometry.looks_shifted(dark, share)]
    row |= {"lon": lon, "lat": lat, "nodata_fraction": empty, "sha256": store.digest(patch)}
    return row | {"dark_dn": dark, "seen": seen}


def _scene(chip: Chip) -> dict[str, Any]:
    """Returns the columns that an image's row or name tells."""
    told, version, found = chip.facts["properties"], baseline(chip.facts), radiometry.decide(chip.facts)
    row = {"item_id": chip.facts["id"], "datetime": told.get("datetime", ""), "platform": told.get("platform", "")}
    row["baseline"] = f"{version[0]:02d}.{version[1]:02d}" if version else ""
    if radiometry.UNTOLD in found.reasons:
        return row
    if found.quarantined:
        return row | {"reason": Reason.QUARANTINED, "offset_reason": "; ".join(found.reasons)}
    return row | {"told": found.offset, "offset_reason": "; ".join(found.reasons)}


def settled(rows: pd.DataFrame, params: ImportParams) -> pd.DataFrame:
    """Returns the rows of images with their offset and how it was decided (`how`), or why they are no patch.

    What a row or a name tells of the processing is not what was done afterwards: numbers below the offset deny that it
    is still in them, whatever is told.

    Args:
        rows: As `look` returns them.
        params: What to do where nothing tells.

    Raises:
        UserError: Nothing tells the offset of any image.
    """
    good = rows["reason"] == ""
    again = good & rows["sha256"].where(good).duplicated()
    rows = rows.assign(reason=rows["reason"].mask(again, Reason.SAME_PIXELS), how="")
    good &= ~again
    if params.offset != "auto":
        return _decided(rows, good, GIVEN, int(params.offset), GIVEN)
    denied = (rows["told"] == OFFSET) & (rows["seen"] == 0)
    told = good & rows["told"].notna() & ~denied
    seen = good & rows["seen"].notna() & ~told
    rows = _decided(rows, told, TOLD, rows["told"], rows["offset_reason"])
    rows = _decided(rows, seen, SEEN, rows["seen"], rows["seen"].map(WHY))
    return _likeliest(rows, good & ~told & ~seen, params)


def _decided(rows: pd.DataFrame, which: pd.Series, how: str, offset: Any, reason: Any) -> pd.DataFrame:
    """Returns the rows with the decision on some of them."""
    check = np.select([rows["seen"].isna(), rows["seen"] == offset], ["silent", "agree"], "deny")
    values = {"offset": offset, "offset_reason": reason, "offset_check": check, "how": how}
    decided = {name: rows[name].mask(which, value) for name, value in values.items()}
    return rows.assign(**decided).astype({"offset": "int64"})


def _likeliest(rows: pd.DataFrame, which: pd.Series, params: ImportParams) -> pd.DataFrame:
    """Returns the rows with a decision on those of which nothing tells."""
    if params.silent == "leave-out":
        return rows.assign(reason=rows["reason"].mask(which, Reason.UNTOLD))
    known = rows.loc[rows["how"] != "", "offset"].value_counts()
    if known.empty:
        if not which.any():
            return rows
        raise UserError(
            f"neither rows, names nor pixels of {int(which.sum())} images tell whether 1000 was added to their "
            "numbers: give --offset -1000 where it was, as by ESA from processing baseline 04.00 on, else --offset 0"
        )
    offset = int(known.index[0])
    reason = f"nothing tells; {known.iloc[0]:,} of {known.sum():,} others of the folder have {offset}"
    return _decided(rows, which, LIKELY, offset, reason)


def read(client: Client, job: Job, good: pd.DataFrame, chips: list[Chip]) -> None:
    """Reads the images into the store, shard by shard."""
    size, by_row = job.params.shard_patches, {chip.row: chip for chip in chips}
    plans = [good[start : start + size] for start in range(0, len(good), size)]
    for i, plan in enumerate(plans):
        store.create_part(job.url, "plan", 0, i, plan)
    shards = [(i, [by_row[row] for row in plan["row_id"]]) for i, plan in enumerate(plans)]
    _run(client, read_shard, job, "parts", shards, "import patches")


def read_shard(job: Job, unit: Unit) -> None:
    """Reads the images of a shard, and stores it."""
    shard, chips = unit
    plan = store.read_part(job.url, "plan", 0, shard)
    side = job.params.patch_pixels
    pixels = np.zeros((len(plan), len(job.params.bands), side, side), np.uint16)
    for i, (chip, digest) in enumerate(zip(chips, plan["sha256"], strict=True)):
        pixels[i], _ = read_chip(job.folder, chip, job.params)
        if store.digest(pixels[i]) != digest:
            raise UserError(f"{plan['href'][i]} has changed while it was imported: import the folder again")
    store.write_shard(job.url, shard * job.params.shard_patches, pixels)
    store.create_part(job.url, "parts", 0, shard, plan)


def _run(
    client: Client, function: Callable[[Job, Unit], None], job: Job, kind: str, units: list[Unit], label: str
) -> None:
    """Runs a function on the units whose parts are not stored yet."""
    there = {int(name.partition(".")[0]) for name in storage.names(storage.join(job.url, kind, "0"))}
    left = [unit for unit in units if unit[0] not in there]
    bound = job.params.max_failed_fraction
    options: dict[str, Any] = {"label": label, "there": len(there), "max_failed_fraction": bound}
    run_units(client, partial(function, job), left, name=lambda unit: f"{kind} {unit[0]}", **options)


def _finish(job: Job, made_of: dict[str, Any], good: pd.DataFrame, refused: Counter[str]) -> None:
    """Writes the manifest, the map and the card."""
    digest = store.write_manifest(job.url, good)
    title = f"{len(good):,} patches, imported from {name_of(job.folder)}"
    picture = sample_map(good[["lon", "lat"]].to_numpy(), title, ATTRIBUTION)
    keep_picture(storage.join(job.url, "samples.png"), picture, "sample-map", "Where the patches were taken")
    offsets = Counter(f"{how}: {offset}" for how, offset in zip(good["how"], good["offset"], strict=True))
    told = f"offsets {counts(offsets)}"
    log().info("%d of %d images are patches; %s; %s", len(good), len(good) + refused.total(), counts(refused), told)
    skew = skew_of(good, "", -90, 90)
    keep_table(storage.join(job.url, "skew.md"), table(skew), "sample-skew", "Patches by year, season and latitude")
    card = PatchesCard(
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        line=job.params.line,
        manifest_sha256=digest,
        attribution=ATTRIBUTION,
        imported_from=shown(job.folder),
        tried=len(good) + refused.total(),
        rejected=refused,
        offsets=offsets,
        offset_checks=good["offset_check"].value_counts().to_dict(),
        skew=skew,
    )
    write_card(job.url, card)
