"""The sample step: from a STAC catalog to a patch store.

1. Places are drawn from the seed's stream: uniformly by area on land, or as `places` says.
2. They are *screened*, one unit per grid-zone cell (`tasks.patches.screening`): search the catalog, choose a scene that
   holds the patch, decide its radiometry, read the scene classification around it.
3. Pixels are *read*, one unit per shard (`tasks.patches.reading`).
4. A patch that cannot be read, or has no data, is replaced by the next clear place of the stream, in a further
   round of reading, until all are there or the tries are spent.

So the sample is the first good places of the stream. All that decides it is stored in parts that never change once
they are there: a run that goes on, or two at a time, make the same store, also where the catalog has changed since.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pystac
from distributed import Client
from numpy.typing import NDArray

from infra import storage, workers
from infra.addresses import unsigned
from infra.errors import Unavailable, UserError
from infra.imagery.cogs import RefusedAsset, UnreadableAsset, read_scene
from infra.settings import settings
from infra.stac.catalogs import ask, catalogs, collection_title
from tasks.artifacts import keep_picture, keep_table
from tasks.cards import fingerprint, is_finished, product_url, write_card
from tasks.core.earth.sampling import grid_zone
from tasks.newest import enter
from tasks.params import SampleParams
from tasks.patches import store
from tasks.patches.estimate import Cost, beside, estimate, spent
from tasks.patches.places import draw, source_digest
from tasks.patches.reading import read_shard, shape
from tasks.patches.reuse import WHERE, places_read, siblings
from tasks.patches.scenes import asset_keys, find_items
from tasks.patches.screening import UNTRIED, by_place, hrefs, screen_cell
from tasks.plots.maps import sample_map
from tasks.units import log, run_units

PLACES = {
    "area": "uniform by area on land",
    "tile": "uniform by tile",
    "class": "by class in turn",
    "list": "from a list",
}
LOOKS = 32  # places looked at for scenes that tell the catalog's bands
OPENED = 5  # scenes of which one must have bands that can be read: a single one may be gone
SCREENED = ["row_id", "item_id", "reason", "round", "cell"]  # what the run keeps in memory of each place tried
PLANNED = ["position", "row_id", "round", "cell"]  # leads a unit back to the verdict
READ = [*store.MANIFEST, "position", "reason"]


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
    sources = [[unsigned(c.url), c.collection] for c in catalogs()]
    made_of = {"catalogs": sources, **params.model_dump(exclude={"line"}), **source_digest(params)}
    url = product_url("patches", made_of)
    if is_finished(url):
        log().info("%s is there already", url)
        enter(url, "patches", params.line)
        return url
    planned = estimate(params, settings().workers)
    source = attribution()
    check(client, params, planned)
    store.create(url, *shape(params))
    run = Run(client, url, params, siblings(made_of))
    rows = run.read()
    digest = store.write_manifest(url, rows)
    picture = sample_map(rows[["lon", "lat"]].to_numpy(), f"{len(rows):,} patches, {PLACES[params.places]}", source)
    keep_picture(storage.join(url, "samples.png"), picture, "sample-map", "Where the patches were taken")
    actual = run.cost()
    took = ", ".join(f"{name} {value}" for name, value in actual.lines().items())
    log().info("took: %s; %s", took, counts(run.rejected))
    table = beside(planned, actual, run.rejected)
    keep_table(storage.join(url, "run.md"), table, "sample-run", "Planned and actual cost")
    storage.delete(storage.join(url, "held"))
    write_card(
        url,
        "patches",
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        line=params.line,
        manifest_sha256=digest,
        attribution=source,
        tried=len(run.screened),
        rejected=run.rejected,
        passed_over=run.passed_over,
        offset_checks=rows["offset_check"].value_counts().to_dict(),
    )
    return url


def check(client: Client, params: SampleParams, planned: Cost) -> None:
    """Refuses, before any work, what cannot end well.

    Raises:
        UserError: Too few places, too little memory, or storage or catalog that lack what is asked.
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
    client.submit(check_bands, params, places, pure=False).result()  # where they will be read


def check_bands(params: SampleParams, places: NDArray[np.float64]) -> None:
    """Refuses bands that the catalog does not have or that cannot be read, by opening one file of each.

    Args:
        params: What is asked for.
        places: (n, 2) first places of the sample, where scenes are looked for.

    Raises:
        UserError: A band is unknown to the catalog or unreadable in all scenes that were opened, or none answers.
    """
    problems: dict[str, UserError] = {}
    for place in places:
        items = find_items(place[None], params)
        if not items:
            continue
        wanted = set(_wanted(items, params))
        whole = [item for item in items if wanted <= set(asset_keys(item)) and item.id not in problems]
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


def _wanted(items: list[pystac.Item], params: SampleParams) -> list[str]:
    """The bands that are read of each scene, after checking that some item has each.

    Raises:
        UserError: A band is unknown to the catalog.
    """
    known = {band for item in items for band in asset_keys(item)}
    wanted = [*params.bands, "SCL"]
    lacking = [band for band in wanted if band not in known]
    if known and lacking:
        raise UserError(
            f"the catalog's items have no {lacking[0]}: give --bands of {', '.join(sorted(known - {'SCL'}))}, or "
            "set RANGEGRID_COLLECTION to one of Sentinel-2 L2A"
        )
    if lacking:
        there = [f"{key} ({asset.media_type or 'no media type'})" for key, asset in items[0].assets.items()]
        raise UserError(
            "the catalog's items have no asset that is a band of Sentinel-2 L2A in a GeoTIFF of its own: "
            f"{items[0].id} has {', '.join(there[:6])}. Set RANGEGRID_COLLECTION or RANGEGRID_STAC_URL to one that has "
            "them"
        )
    return wanted


def _open_bands(item: pystac.Item, params: SampleParams) -> None:
    """Reads the headers of a scene's bands and scene classification."""
    full = hrefs(item)
    wanted = {band: full[band] for band in (*params.bands, "SCL")}
    read_scene(wanted, np.empty((0, 2)), params.patch_pixels, params.resolution_m)


def _unreadable(problems: list[UserError]) -> UserError:
    """What is said where no scene that was opened could be read: a refusal of all may pass."""
    refused = all(isinstance(problem, RefusedAsset) for problem in problems)
    return (Unavailable if refused else UserError)(
        f"none of {len(problems)} scenes can be read: {problems[0]}. GeoTIFFs of one band of 8 or 16 bits are; set "
        "RANGEGRID_COLLECTION or RANGEGRID_STAC_URL to a catalog that has them"
    )


def attribution() -> str:
    """The source's line: the catalog's own where it is a stand-in, else Copernicus'; fails where no catalog answers."""
    title = ask(collection_title)
    return title if "standing in" in title else "Contains modified Copernicus Sentinel data"


@dataclass
class Run:
    """A run as far as it has come: all of it is read from the parts, so it may have begun in another process."""

    client: Client
    """The Dask cluster."""
    url: str
    """The patch store."""
    params: SampleParams
    """Where, when and how many."""
    sources: list[str] = field(default_factory=list)
    """Other samples of the same parameters, whose places are not read again."""
    screened: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=SCREENED))
    """The verdict on each place tried."""
    searches: int = 0
    """Rounds of screening."""
    taken: int = 0
    """Clear places that are planned to be read."""
    lost: Counter[str] = field(default_factory=Counter)
    """Of these, those that could not be read, by reason."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Scenes that were tried in vain for some place, by reason; another may have served it."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """What each unit took."""

    def read(self) -> pd.DataFrame:
        """Reads every patch, in rounds: each replaces what the one before could not read.

        Returns:
            The good rows, in the store's order.
        """
        known = places_read(self.sources)
        plan = assign(self.take(self.params.patches)).join(known, on="row_id")
        if len(known):
            there = int(plan["source"].notna().sum())
            log().info("%d of %d places were read for %s: they are copied", there, len(plan), ", ".join(self.sources))
        rounds: list[pd.DataFrame] = []
        while len(plan):
            found = self.read_round(len(rounds), plan)
            bad = found[found["reason"] != ""]
            rounds.append(found[found["reason"] == ""])
            if len(bad):
                self.lost.update(bad["reason"])
                log().warning("%d patches are replaced: %s", len(bad), counts(Counter(bad["reason"])))
            plan = self.take(len(bad)).assign(position=bad["position"].to_numpy()).join(known, on="row_id")
        return pd.concat(rounds).sort_values("position", ignore_index=True)

    def read_round(self, number: int, plan: pd.DataFrame) -> pd.DataFrame:
        """Reads the places of a plan, shard by shard; what was found, in the order of positions."""
        shard = plan["position"] // self.params.shard_patches
        shards = np.unique(shard).tolist()
        there = self._there("parts", number)
        left = [(number, i) for i in shards if i not in there]
        for _, i in left:
            store.create_part(self.url, "plan", number, i, plan.loc[shard == i, [*PLANNED, *WHERE]])
        self._do(read_shard, left, "read patches", len(there), lambda unit: f"shard {unit[1]}")
        return self._collect("parts", number, shards, READ).sort_values("position")

    def take(self, count: int) -> pd.DataFrame:
        """The next clear places of the stream.

        Raises:
            UserError: The tries are spent, or the list is at its end.
        """
        wanted = self.taken + count
        while len(clear := self.screened[self.screened["reason"] == ""]) < wanted:
            if not self.screen(len(clear), wanted):
                raise UserError(
                    f"only {self.params.patches - wanted + len(clear)} of {self.params.patches} patches were found "
                    f"among {len(self.screened)} places ({counts(self.rejected)}): widen --datetime, raise "
                    "--max-cloud-percent or --max-tries, or ask for fewer"
                )
        self.taken = wanted
        return clear.sort_values("row_id").iloc[wanted - count : wanted]

    def screen(self, clear: int, wanted: int) -> bool:
        """Screens about as many more candidates as are wanted, cell by cell; tells whether there were any."""
        tried, most = len(self.screened), int(self.params.patches * self.params.max_tries)
        rate = max(clear / tried, 0.05) if tried else 0.8
        more = draw(min(most, tried + int((wanted - clear) / rate * 1.1) + 16), self.params)[tried:]
        if not len(more):
            return False
        cells, number = grid_zone(more[:, 1:3]), self.searches
        there = self._there("screen", number)
        units = np.unique(cells).tolist()
        left = [(number, cell, more[cells == cell]) for cell in units if cell not in there]
        self._do(
            partial(screen_cell, sources=self.sources),
            left,
            "search and screen",
            len(there),
            lambda unit: f"cell {unit[1]}",
        )
        scenes = self._collect("screen", number, units, SCREENED)
        self.screened = pd.concat([self.screened, by_place(scenes)])
        self.passed_over.update(scenes.loc[~scenes["reason"].isin(["", UNTRIED]), "reason"])
        self.searches += 1
        return True

    @property
    def rejected(self) -> Counter[str]:
        """Places tried in vain, by reason."""
        return Counter(self.screened.loc[self.screened["reason"] != "", "reason"]) + self.lost

    def cost(self) -> Cost:
        """What the run took."""
        cells = len(self.screened[["round", "cell"]].drop_duplicates())
        stored = storage.size(storage.join(self.url, "patches.zarr"))
        return spent(self.costs, cells, self.screened, stored)

    def _there(self, kind: str, number: int) -> set[int]:
        return {int(name.partition(".")[0]) for name in storage.names(storage.join(self.url, kind, str(number)))}

    def _do(self, function: Callable, units: list, label: str, there: int, name: Callable[[Any], str]) -> None:
        bound = self.params.max_failed_fraction
        unit = partial(function, self.url, self.params)
        run_units(self.client, unit, units, label=label, there=there, name=name, max_failed_fraction=bound)

    def _collect(self, kind: str, number: int, units: list[int], columns: list[str]) -> pd.DataFrame:
        tables = store.read_parts(self.url, kind, number, units, columns)
        self.costs += [dict(table.attrs) for table in tables]  # type: ignore[arg-type]
        return pd.concat(tables, ignore_index=True)


def assign(chosen: pd.DataFrame) -> pd.DataFrame:
    """Gives each place its position in the store: scene by scene, so that few scenes make a shard."""
    return chosen.sort_values(["cell", "item_id", "row_id"]).assign(position=np.arange(len(chosen)))


def counts(rejected: Mapping[str, int]) -> str:
    """`3 nodata, 1 unreadable`."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items())) or "none rejected"
