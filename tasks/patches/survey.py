"""Surveys a catalog before anything is read: how many scenes there are at the places of a plan, by cell and month.

One unit asks the catalog for the scenes of the places of a grid-zone cell, as the screening of a sample does, and
stores what it counted: `months/0/<cell>.parquet` and `places/0/<cell>.parquet`. So a survey that was ended goes on, and
a finished one is not asked again. Beside them lie `survey.json`, written last, two pictures and a table.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pandas as pd
from distributed import Client
from numpy.typing import NDArray

from infra import storage
from infra.addresses import shown
from infra.intervals import Interval
from infra.stac.catalogs import ask, catalogs, collection_title
from tasks.artifacts import keep_picture, keep_table, markdown_table
from tasks.cards import product_url
from tasks.core.earth.sampling import grid_zone
from tasks.params import SampleParams
from tasks.patches import store
from tasks.patches.places import counted, draw, source_digest
from tasks.patches.scenes import SEASON, describe, find_items, holders, newest
from tasks.plots.charts import calendar_chart
from tasks.plots.maps import place_map
from tasks.tables.regions import decides, find_region
from tasks.units import log, run_units

DECISIVE = {"patches", "seed", "places", "source", "datetime", "max_cloud_percent", "scene", "patch_pixels"}
DECISIVE |= {"resolution_m", "south", "north"}
FEW = 3  # scenes of a place, fewer than which clouds may well leave it without a patch
BARE = 0.1  # share of cells without a scene in a month that is told
MONTHS = {"month": "str", "scenes": "int64"}
PLACES = {"row_id": "int64", "lon": "float64", "lat": "float64", "scenes": "int64"}


@dataclass(frozen=True)
class Survey:
    """What a survey found."""

    url: str
    """Where its table and its pictures are."""
    places: int
    """Number of places."""
    none: int
    """Those that no scene holds."""
    few: int
    """Those that fewer than `FEW` scenes hold, without those that none holds."""
    cells: int
    """Number of grid-zone cells that have places."""
    months: dict[str, list[int]]
    """By month: scenes, and cells without one."""
    warnings: list[str]
    """What to know before a sample is begun, in sentences."""


def survey(client: Client, params: SampleParams, anew: bool = False) -> Survey:
    """Counts the scenes at the places of a plan, and resumes what an earlier survey began.

    Args:
        client: The Dask cluster.
        params: Where and when, as of a sample.
        anew: Whether to ask the catalog again where it has been asked.

    Raises:
        UserError: The catalog does not answer, or the region has no land.
    """
    params, region = counted(params), find_region(params.region, params.buffer_km)
    sources = [[shown(catalog.url), catalog.collection] for catalog in catalogs()]
    made_of = {"survey": sources, **params.model_dump(include=DECISIVE), **source_digest(params), **decides(region)}
    url = product_url("surveys", made_of)
    if anew:
        storage.delete(url)
    if storage.exists(done := storage.join(url, "survey.json")):
        log().info("the catalog was asked %s: --anew asks again", f"{storage.modified(done):%Y-%m-%d %H:%M}")
        return Survey(**storage.read_json(done))
    ask(collection_title)
    places = draw(params.patches, params)
    cells = grid_zone(places[:, 1:3])
    every = np.unique(cells).tolist()
    there = {int(name.partition(".")[0]) for name in storage.names(storage.join(url, "months", "0"))}
    left = [(cell, places[cells == cell]) for cell in every if cell not in there]
    run_units(client, partial(survey_cell, url, params), left, label="survey", there=len(there), name=_named)
    months = store.read_parts(url, "months", 0, every, list(MONTHS))
    counts = pd.concat([part.assign(cell=cell) for part, cell in zip(months, every, strict=True)])
    held = pd.concat(store.read_parts(url, "places", 0, every, list(PLACES)), ignore_index=True)
    return _told(url, params, counts, held)


def _named(unit: tuple[int, NDArray[np.float64]]) -> str:
    return f"cell {zone_name(unit[0])}"


def zone_name(cell: int) -> str:
    """Returns the name of a grid-zone cell, such as 31T."""
    return f"{cell // 20 + 1:02d}{'CDEFGHJKLMNPQRSTUVWX'[cell % 20]}"


def survey_cell(url: str, params: SampleParams, unit: tuple[int, NDArray[np.float64]]) -> None:
    """Counts the scenes of a cell: acquisitions that hold the whole patch of a place and whose offset is known.

    Args:
        url: The survey.
        params: When, and how large a patch is.
        unit: Cell, and its places: (n, 5), see `tasks.patches.places.draw`.
    """
    cell, places = unit
    known = [scene for scene in newest(map(describe, find_items(places[:, 1:3], params))) if not scene.quarantined]
    holds = holders([scene.item for scene in known], places, params)
    if params.scene == "seasons":
        holds &= np.array([SEASON[scene.day.month] for scene in known]).reshape(-1, 1) == places[:, 3]
    once = pd.DataFrame(holds).groupby(np.array([scene.overpass for scene in known], object)).any()
    month = {scene.overpass: f"{scene.day:%Y-%m}" for scene in known}
    months = Counter(month[overpass] for overpass in once.index[once.any(axis=1)])
    by_place = pd.DataFrame(dict(zip(PLACES, (*places[:, :3].T, once.sum().to_numpy()), strict=True)))
    by_month = pd.DataFrame({"month": list(months.keys()), "scenes": list(months.values())})
    store.create_part(url, "places", 0, cell, by_place.astype(PLACES))
    store.create_part(url, "months", 0, cell, by_month.astype(MONTHS))


def _told(url: str, params: SampleParams, counts: pd.DataFrame, places: pd.DataFrame) -> Survey:
    """Draws and stores what was counted.

    Args:
        url: The survey.
        params: The plan.
        counts: Columns cell, month, scenes; a row for each month of a cell that has scenes.
        places: Columns `PLACES`.
    """
    places = places.assign(cell=grid_zone(places[["lon", "lat"]].to_numpy()))
    cells = np.unique(places["cell"])
    table = counts.pivot_table("scenes", "cell", "month", "sum", 0).reindex(cells, fill_value=0)
    table = table.reindex(columns=_months(params.datetime, list(table.columns)), fill_value=0).astype(int)
    months = {str(month): [int(table[month].sum()), int((table[month] == 0).sum())] for month in table}
    none, few = int((places["scenes"] == 0).sum()), int(places["scenes"].between(1, FEW - 1).sum())
    found = Survey(url, len(places), none, few, len(cells), months, _warnings(places, months, len(cells)))
    table.index = [zone_name(cell) for cell in cells]
    storage.write(storage.join(url, "scenes.csv"), table.to_csv(index_label="cell").encode())
    _draw(url, places, table, params.datetime)
    rows = [(month, f"{scenes:,}", bare) for month, (scenes, bare) in months.items()]
    text = markdown_table(("month", "scenes", f"of {len(cells)} cells without"), rows)
    lines = [f"{len(places):,} places in {len(cells)} cells", *found.warnings]
    keep_table(storage.join(url, "survey.md"), "\n\n".join([*lines, text]), "survey", "Scenes by month")
    for warning in found.warnings:
        log().warning("%s", warning)
    storage.write_json(storage.join(url, "survey.json"), asdict(found))
    return found


def _months(window: str, seen: list[str]) -> list[str]:
    """Returns the months of a window, without gaps; from the first to the last that has scenes where it is open."""
    span, known = Interval.parse(window), sorted(seen)
    first = span.start.strftime("%Y-%m") if span.start else min(known, default="")
    last = span.end.strftime("%Y-%m") if span.end else max(known, default=first)
    if not (first and last):
        return known
    return [str(month) for month in pd.period_range(first, last, freq="M")]


def _warnings(places: pd.DataFrame, months: dict[str, list[int]], cells: int) -> list[str]:
    """Returns what to know before a sample is begun."""
    found = []
    for what, which in (("no scene", places["scenes"] == 0), (f"fewer than {FEW} scenes", places["scenes"] < FEW)):
        if which.any():
            worst = places.loc[which, "cell"].value_counts().index[:5]
            found.append(
                f"{which.sum():,} of {len(places):,} places of the plan have {what}, most of them in the cells "
                f"{', '.join(map(zone_name, worst))}: widen --datetime, raise --max-cloud-percent or ask another "
                "catalog"
            )
    bare = [f"{month} ({none} of {cells})" for month, (_, none) in months.items() if none > BARE * cells]
    if bare:
        more = f" and {len(bare) - 6} more" if len(bare) > 6 else ""
        found.append(f"months in which cells have no scene at all: {', '.join(bare[:6])}{more}")
    return found


def _draw(url: str, places: pd.DataFrame, table: pd.DataFrame, window: str) -> None:
    """Draws the scenes of each place on a map, and those of each month as a calendar."""
    lonlat, scenes = places[["lon", "lat"]].to_numpy(), places["scenes"].to_numpy("f8")
    caption = (
        "From the catalog alone: acquisitions that hold the whole patch, within the cloud cover that was asked for."
    )
    picture = place_map(lonlat, scenes, f"Scenes at {len(places):,} places, {window}", caption, "scenes")
    keep_picture(storage.join(url, "survey.png"), picture, "survey-map", "Scenes at the places of the plan")
    bare = (table == 0).mean()
    chart = calendar_chart(
        table.mean(), bare, "Scenes of a cell by month", f"Numbers: % of {len(table)} cells without."
    )
    keep_picture(storage.join(url, "calendar.png"), chart, "survey-calendar", "Scenes by month")
