"""Runs the sample step: from a STAC catalog to a patch store.

1. Places are drawn from the seed's stream: evenly by area on land, or as `places` says.
2. Places are *screened*, one unit per grid-zone cell (`tasks.patches.screening`): search the catalog, choose a scene
   that holds the patch, decide its radiometry, read the scene classification around it.
3. Pixels are *read*, one unit per shard (`tasks.patches.reading`).
4. A patch that cannot be read, or has no data, is replaced by the next clear place of the stream, in a further
   round of reading, until all patches are read or the tries are spent.

So the sample is the first good places of the stream. Everything that decides it is stored in files that never change
once they are written. So a run that resumes, or two runs at a time, make the same store, even if the catalog changed.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from distributed import Client
from numpy.typing import NDArray

from infra import storage, workers
from infra.addresses import shown
from infra.errors import Unavailable, UserError
from infra.imagery.cogs import RefusedAsset, UnreadableAsset, read_scene
from infra.settings import settings
from infra.stac.catalogs import ask, catalogs, collection_title
from infra.stac.items import UsableItem
from tasks.artifacts import keep_picture, keep_table
from tasks.cards import fingerprint, is_finished, product_url, write_card
from tasks.core.earth.region import Region
from tasks.core.earth.sampling import grid_zone
from tasks.newest import enter
from tasks.params import SampleParams
from tasks.patches import store
from tasks.patches.estimate import Cost, beside, estimate, spent
from tasks.patches.places import counted, draw, source_digest
from tasks.patches.reading import read_shard, shape
from tasks.patches.reasons import Reason, counts
from tasks.patches.reuse import WHERE, places_read, siblings
from tasks.patches.scenes import assets_of, find_items, unread_bands
from tasks.patches.screening import by_place, screen_cell
from tasks.patches.skew import Skew, poor, skew_of, table
from tasks.plots.maps import sample_map
from tasks.products import PatchesCard
from tasks.tables.regions import REGION, card_of, decides, find_region, keep_region
from tasks.units import log, run_units

PLACES = {
    "even": "even by area on land",
    "area": "uniform by area on land",
    "tile": "uniform by tile",
    "class": "by class in turn",
    "list": "from a list",
}
LOOKS = 32  # places at which scenes are looked for, to learn the catalog's bands
OPENED = 5  # scenes opened until one is readable: a single one may be deleted or refused
READABLE = "GeoTIFF, JPEG 2000 and Zarr"
ELSEWHERE = "Set RANGEGRID_COLLECTION or RANGEGRID_STAC_URL to a catalog that has them"
SCREENED = ["row_id", "item_id", "reason", "round", "cell"]  # columns kept in memory of each place tried
PLANNED = ["position", "row_id", "round", "cell"]  # columns that lead a unit of reading to a place's verdict
READ = [*store.MANIFEST, "position", "reason"]
FIRST_CLEAR, LEAST_CLEAR = 0.8, 0.05  # shares of candidates taken to be clear: before any is tried, and at least


def sample_patches(client: Client, params: SampleParams) -> str:
    """Samples patches, and resumes what an earlier run began.

    Args:
        client: The Dask cluster.
        params: Where, when and how many.

    Returns:
        The URL of the patch store.

    Raises:
        UserError: The catalog does not answer or has no fitting scenes, or the storage cannot be written.
    """
    params, region = counted(params), find_region(params.region, params.buffer_km)
    made_of = decisive(params) | decides(region)
    url = product_url("patches", made_of)
    if is_finished(url):
        log().info("%s is there already", url)
        enter(url, params.line)
        return url
    planned = estimate(params, settings().workers)
    source = attribution()
    check(client, params, planned)
    store.create(url, *shape(params))
    if region:
        keep_region(url, region)
        params = params.model_copy(update={"region": (storage.join(url, REGION),), "buffer_km": 0.0})  # as it is now
    units, lost = Units(client, url, params, siblings(made_of)), Counter[str]()
    places = ClearPlaces(units)
    rows = read_patches(units, places, lost)
    digest = store.write_manifest(url, rows)
    where = f" in {region.name}" if region else ""
    title = f"{len(rows):,} patches, {PLACES[params.places]}{where}"
    picture = sample_map(rows[["lon", "lat"]].to_numpy(), title, source)
    keep_picture(storage.join(url, "samples.png"), picture, "sample-map", "Where the patches were taken")
    rejected = places.rejected + lost
    skew = tell_skew(url, rows, params, region)
    tell_cost(url, planned, cost(units, places.screened), rejected)
    storage.delete(storage.join(url, "held"))
    card = PatchesCard(
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        line=params.line,
        manifest_sha256=digest,
        attribution=source,
        tried=len(places.screened),
        rejected=rejected,
        passed_over=places.passed_over,
        offset_checks=rows["offset_check"].value_counts().to_dict(),
        skew=skew,
        **card_of(region),
    )
    write_card(url, card)
    return url


def decisive(params: SampleParams) -> dict[str, Any]:
    """Returns everything that decides a sample, as its fingerprint hashes it, except its region."""
    sources = [[shown(c.url), c.collection] for c in catalogs()]
    untold = {"line", "region", "buffer_km", "spacing_km"}  # a spacing is a number of patches now
    if params.scene != "composite":
        untold.add("composite_scenes")
    return {"catalogs": sources, **params.model_dump(exclude=untold), **source_digest(params)}


def tell_skew(url: str, rows: pd.DataFrame, params: SampleParams, region: Region | None) -> Skew:
    """Tells how the patches are spread over years, seasons and latitudes, beside an even spread."""
    skew = skew_of(rows, params.datetime, params.south, params.north, region)
    keep_table(storage.join(url, "skew.md"), table(skew), "sample-skew", "Patches by year, season and latitude")
    for group in poor(skew):
        log().warning("few patches of %s", group)
    return skew


def tell_cost(url: str, planned: Cost, actual: Cost, rejected: Mapping[str, int]) -> None:
    """Tells what the run took, beside what was planned."""
    took = ", ".join(f"{name} {value}" for name, value in actual.lines().items())
    log().info("took: %s; %s", took, counts(rejected))
    keep_table(storage.join(url, "run.md"), beside(planned, actual, rejected), "sample-run", "Planned and actual cost")


def check(client: Client, params: SampleParams, planned: Cost) -> None:
    """Refuses, before any work, a run that cannot end well.

    Raises:
        UserError: There are too few places, there is too little memory, or storage or catalog do not fit.
    """
    available = len(draw(params.patches, params))
    if available < params.patches:
        raise UserError(
            f"{params.source} offers {available} places for {params.patches} patches: ask for fewer patches, or "
            "give a longer list"
        )
    room = workers.room(client)
    if planned.worker_bytes > room:
        raise UserError(
            f"a shard of {params.shard_patches} patches needs {planned.worker_bytes / 1e9:.1f} GB on a worker that has "
            f"{room / 1e9:.1f} GB for each of its threads: lower --shard-patches, or give the workers more"
        )
    storage.check_writable(settings().storage_url, planned.bytes_stored)
    places = draw(LOOKS, params)[:, 1:3]
    client.submit(check_bands, params, places, pure=False).result()  # on a worker, where scenes will be read


def check_bands(params: SampleParams, places: NDArray[np.float64]) -> None:
    """Refuses bands that the catalog does not have or that cannot be read, by opening one file of each.

    Args:
        params: The parameters, with the bands.
        places: (n, 2) places, at which scenes are looked for.

    Raises:
        UserError: A band is unknown to the catalog, or unreadable in all scenes that were opened.
    """
    problems: dict[str, UserError] = {}
    for place in places:
        items = find_items(place[None], params)
        if not items:
            continue
        wanted = set(_wanted(items, params))
        whole = [item for item in items if wanted <= set(assets_of(item)) and item.id not in problems]
        for item in whole[:: max(1, len(whole) // OPENED)][: OPENED - len(problems)]:
            try:
                _open_bands(item, params)
                return
            except (RefusedAsset, UnreadableAsset) as error:
                problems[item.id] = error
        if len(problems) == OPENED:
            break
    if problems:
        raise _unreadable(list(problems.values()))


def _wanted(items: list[UsableItem], params: SampleParams) -> list[str]:
    """Returns the bands to read, after a check that some item has each.

    Raises:
        UserError: A band is unknown to the catalog.
    """
    known = {band for item in items for band in assets_of(item)}
    wanted = [*params.bands, "SCL"]
    lacking = [band for band in wanted if band not in known]
    other = {band: kind for item in items for band, kind in unread_bands(item).items()}
    if lacking and lacking[0] in other:
        raise UserError(
            f"the catalog's {lacking[0]} is {other[lacking[0]]}, which is not read: {READABLE} are. {ELSEWHERE}"
        )
    if known and lacking:
        raise UserError(
            f"the catalog's items have no {lacking[0]}: give --bands of {', '.join(sorted(known - {'SCL'}))}, or "
            "set RANGEGRID_COLLECTION to one of Sentinel-2 L2A"
        )
    if lacking:
        there = [f"{key} ({asset.media_type or 'no media type'})" for key, asset in items[0].assets.items()]
        raise UserError(
            f"the catalog's items have no asset that is a band of Sentinel-2 L2A as {READABLE}: {items[0].id} has "
            f"{', '.join(there[:6])}. {ELSEWHERE}"
        )
    return wanted


def _open_bands(item: UsableItem, params: SampleParams) -> None:
    """Reads the headers of a scene's bands and of its scene classification."""
    full = assets_of(item)
    wanted = {band: full[band] for band in (*params.bands, "SCL")}
    read_scene(wanted, np.empty((0, 2)), params.patch_pixels, params.resolution_m)


def _unreadable(problems: list[UserError]) -> UserError:
    """Returns the error for scenes that all cannot be read; where all were refused, it may pass."""
    refused = all(isinstance(problem, RefusedAsset) for problem in problems)
    return (Unavailable if refused else UserError)(
        f"none of {len(problems)} scenes can be read: {problems[0]}. Read are {READABLE} of one band of 8 or 16 bits. "
        + ("Keys of an archive are told by RANGEGRID_ARCHIVES" if refused else ELSEWHERE)
    )


def attribution() -> str:
    """Returns the attribution of the images: Copernicus', or the catalog's title where that says `standing in`."""
    title = ask(collection_title)
    if "standing in" in title:
        return title
    return "Contains modified Copernicus Sentinel data"


@dataclass
class Units:
    """Runs the units of a sample on Dask, and reads the parts that they store: these may be of another process."""

    client: Client
    """The Dask cluster."""
    url: str
    """The patch store."""
    params: SampleParams
    """Where, when and how many."""
    sources: list[str]
    """URLs of other samples of the same parameters, from which places are copied."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """Cost of each unit."""

    def there(self, kind: str, number: int) -> set[int]:
        """Returns which parts of a round are stored."""
        return {int(name.partition(".")[0]) for name in storage.names(storage.join(self.url, kind, str(number)))}

    def run(self, function: Callable, units: list, label: str, there: int, named: str) -> None:
        """Runs a function on units, (round, cell or shard, ...), each of which stores its part."""
        run_units(
            self.client,
            partial(function, self.url, self.params),
            units,
            label=label,
            there=there,
            name=lambda unit: f"{named} {unit[1]}",
            max_failed_fraction=self.params.max_failed_fraction,
        )

    def collect(self, kind: str, number: int, parts: list[int], columns: list[str]) -> pd.DataFrame:
        """Returns the rows of a round's parts, and keeps what they cost."""
        tables = store.read_parts(self.url, kind, number, parts, columns)
        self.costs += [dict(table.attrs) for table in tables]  # type: ignore[arg-type]
        return pd.concat(tables, ignore_index=True)


@dataclass
class ClearPlaces:
    """The clear places of the seed's stream, screened only as far as places are asked for."""

    units: Units
    """Runs the screening."""
    screened: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=SCREENED))
    """Verdict on each place tried; columns SCREENED."""
    rounds: int = 0
    """Number of rounds of screening."""
    taken: int = 0
    """Number of clear places taken so far."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of scenes rejected at a place, by reason; another scene may have served the place."""

    @property
    def rejected(self) -> Counter[str]:
        """Returns the numbers of places that were screened in vain, by reason."""
        return Counter(self.screened.loc[self.screened["reason"] != "", "reason"])

    def take(self, count: int, lost: Counter[str]) -> pd.DataFrame:
        """Returns the next clear places of the stream.

        Args:
            count: Number of places.
            lost: Number of places taken before that could not be read, by reason, for the message.

        Raises:
            UserError: The tries are spent, or the list has ended.
        """
        wanted, params = self.taken + count, self.units.params
        while len(clear := self.screened[self.screened["reason"] == ""]) < wanted:
            candidates = self.more(len(clear), wanted)
            if not len(candidates):
                raise UserError(
                    f"only {params.patches - wanted + len(clear)} of {params.patches} patches were found among "
                    f"{len(self.screened)} places ({counts(self.rejected + lost)}): widen --datetime, raise "
                    "--max-cloud-percent or --max-tries, or ask for fewer"
                )
            self.screen(candidates)
        self.taken = wanted
        return clear.sort_values("row_id").iloc[wanted - count : wanted]

    def more(self, clear: int, wanted: int) -> NDArray[np.float64]:
        """Returns the next candidates, about as many as are needed; none where the tries are spent."""
        tried, params = len(self.screened), self.units.params
        rate = max(clear / tried, LEAST_CLEAR) if tried else FIRST_CLEAR
        needed = int((wanted - clear) / rate * 1.1) + 16
        most = int(params.patches * params.max_tries)
        return draw(min(most, tried + needed), params)[tried:]

    def screen(self, candidates: NDArray[np.float64]) -> None:
        """Screens candidates, cell by cell."""
        cells, number = grid_zone(candidates[:, 1:3]), self.rounds
        every = np.unique(cells).tolist()
        there = self.units.there("screen", number)
        left = [(number, cell, candidates[cells == cell]) for cell in every if cell not in there]
        screening = partial(screen_cell, sources=self.units.sources)
        self.units.run(screening, left, "search and screen", len(there), "cell")
        scenes = self.units.collect("screen", number, every, SCREENED)
        self.screened = pd.concat([self.screened, by_place(scenes)])
        self.passed_over.update(scenes.loc[~scenes["reason"].isin(["", Reason.UNTRIED]), "reason"])
        self.rounds += 1


def read_patches(units: Units, places: ClearPlaces, lost: Counter[str]) -> pd.DataFrame:
    """Reads every patch, in rounds: each round replaces the patches that the one before could not read.

    Args:
        units: Runs the reading.
        places: The clear places.
        lost: Counts the places that could not be read, by reason.

    Returns:
        The rows of the patches, in the store's order.
    """
    known = places_read(units.sources)
    rounds: list[pd.DataFrame] = []
    plan = assign(places.take(units.params.patches, lost)).join(known, on="row_id")
    if len(known):
        there = int(plan["source"].notna().sum())
        log().info("%d of %d places were read for %s: they are copied", there, len(plan), ", ".join(units.sources))
    missing = len(plan)
    while missing:
        rows = read_round(units, len(rounds), plan)
        is_good = rows["reason"] == ""
        rounds.append(rows[is_good])
        bad = rows[~is_good]
        missing = len(bad)
        if missing:
            lost.update(bad["reason"])
            log().warning("%d patches are replaced: %s", missing, counts(Counter(bad["reason"])))
            plan = places.take(missing, lost).assign(position=bad["position"].to_numpy()).join(known, on="row_id")
    return pd.concat(rounds).sort_values("position", ignore_index=True)


def read_round(units: Units, number: int, plan: pd.DataFrame) -> pd.DataFrame:
    """Reads the places of a plan, shard by shard; returns their rows in the order of positions."""
    shard = plan["position"] // units.params.shard_patches
    shards = np.unique(shard).tolist()
    there = units.there("parts", number)
    left = [(number, i) for i in shards if i not in there]
    for _, i in left:
        store.create_part(units.url, "plan", number, i, plan.loc[shard == i, [*PLANNED, *WHERE]])
    units.run(read_shard, left, "read patches", len(there), "shard")
    return units.collect("parts", number, shards, READ).sort_values("position")


def cost(units: Units, screened: pd.DataFrame) -> Cost:
    """Returns what the run took."""
    cells = len(screened[["round", "cell"]].drop_duplicates())
    stored = storage.size(storage.join(units.url, "patches.zarr"))
    return spent(units.costs, cells, screened, stored)


def assign(chosen: pd.DataFrame) -> pd.DataFrame:
    """Gives each place its position in the store, scene by scene, so that a shard needs few scenes."""
    return chosen.sort_values(["cell", "item_id", "row_id"]).assign(position=np.arange(len(chosen)))
