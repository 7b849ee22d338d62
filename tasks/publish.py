"""The publish step: RANGE+ at every land cell of a grid, tile by tile on Dask.

A grid may keep the sums behind it. A later grid, of the database as it has become since, then takes them as its
parent's, and computes only the images that came and went (`tasks.grid.updates`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import zarr
from distributed import Client

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.artifacts import keep_table, opening, show_places
from tasks.cards import FORMER_LAND, GRID, fingerprint, home_of, is_finished, product_url, read_card, write_card
from tasks.core.adaptive import Report
from tasks.core.compact import Projection
from tasks.core.earth.grid import Tile
from tasks.core.earth.land import land_mask
from tasks.core.quantize import DType
from tasks.core.retrieval import Method
from tasks.database.store import read_pair, stored_values
from tasks.grid import conventions, store
from tasks.grid.overviews import publish_overviews
from tasks.grid.parts import Part, parts_of, publish_in_parts
from tasks.grid.previews import draw, write_page
from tasks.grid.seas import fill_seas
from tasks.grid.survey import Survey, kernels, survey
from tasks.grid.tiles import Job, land_tiles, publish_tile
from tasks.grid.updates import kept_sums, read_parent, update_tile, write_changes
from tasks.params import PublishParams
from tasks.release import versions
from tasks.release.lines import Layout
from tasks.release.promotion import promote_unless_withdrawn
from tasks.release.stac import ITEM, write_item
from tasks.release.validation import refuse, validate_grid
from tasks.units import Work, counted, log, run_units

INT8 = (
    "int8 is for maps, likeness and classes: a probe for the latitude scores {float32} in float32 and {stored} as "
    "stored (R², blocks held out), and others may lose more; `rangegrid evaluate --grid` tells it per task"
)


def publish_grid(client: Client, checkpoint: str, database: str, params: PublishParams) -> str:
    """Publishes the grid of one database, resuming what an earlier run began, and makes it the latest of its line.

    Args:
        client: The Dask cluster.
        checkpoint: URL of the location encoder.
        database: URL of the database that was encoded with it.
        params: What to publish.

    Returns:
        The URL of the grid's Zarr.

    Raises:
        UserError: The two (or the parent) do not belong together, a tile could not be made, the grid is not good, or
            another run moved `latest` meanwhile.
    """
    card = read_pair(checkpoint, database)
    check_compact(params, card)
    params = settled(params, card)
    spec = params.spec
    tiles = land_tiles(spec)
    if not tiles:
        raise UserError(f"the box {spec.box} in {spec.crs} has no land in any cell: give another one")
    kept = kept_sums(card, params)
    parent = read_parent(params.parent, kept) if params.parent else {}
    decides = decisive(params)
    made_of = {"database": card["fingerprint"], **decides, "parent": parent.get("fingerprint")}
    job = Job(
        home=product_url("grids", made_of),
        checkpoint=checkpoint,
        database=database,
        spec=spec,
        method=Method(params.method, params.beta),
        tolerance=params.tolerance,
        compact_dims=params.compact_dims,
        keep_sums=params.keep_sums,
        parent=home_of(params.parent) if params.parent else None,
        parent_database=parent.get("database"),
        evidence=params.evidence,
    )
    layout = Layout.of(made_of, (params.compact_dims or card["value_dim"]) + card["key_dim"])
    since = versions.begin(job.grid, params.line, layout)
    parts = parts_of(client, job, card)
    if parts and (params.evidence or params.dtype != "float32"):
        raise UserError(
            f"the database {database} is larger than a worker can hold, and evidence and the scales of a smaller dtype "
            "need it whole: publish float32 without evidence, or give each worker more memory"
        )
    look = unmeasured if parts else partial(measure, client, job, params.dtype)
    attrs = provenance(job, card, made_of) | {"rangegrid:line": since.line}
    prepare(job, card, attrs, look, params.overviews)
    done = store.written(job.grid, job.spec, tiles)
    log().info("%s: %d tiles of land, %d already there", job.grid, len(tiles), len(done))
    publish_tiles(client, job, parts, tiles, done)
    publish_overviews(client, job, params.overviews)
    for url in [job.grid, *store.level_urls(job.grid), *([job.sums] if job.keep_sums else [])]:
        fill_seas(url)
    made = {"fingerprint": fingerprint(made_of), "made_of": made_of, "database": database, "checkpoint": checkpoint}
    refuse(job.grid, validate_grid(client, job.grid, made))
    if not is_finished(job.home):  # its time is the version's age
        told = {"line": since.line, "dims": layout.dims} | warn_of_loss(job)
        write_card(job.home, "grid", **made, **told, sums=kept if job.keep_sums else None)
    versions.confirm(job.grid, since)
    show(client, job, card["attribution"])
    versions.confirm(job.grid, since)  # again: to draw takes a while
    if params.promote:
        promote_unless_withdrawn(job.grid, since, params.drift_alert)
    return job.grid


def check_compact(params: PublishParams, card: dict[str, Any]) -> None:
    """Refuses more components than a database's values have."""
    most = min(card["images"], card["value_dim"])
    if params.compact_dims and not params.parent and params.compact_dims > most:
        raise UserError(f"--compact-dims {params.compact_dims}: the database's values have {most} components")


def settled(params: PublishParams, card: dict[str, Any]) -> PublishParams:
    """The parameters with what was left open: the parent's tile size and land, or shards large enough and any land."""
    if params.parent:
        made = read_card(home_of(params.parent), "grid")["made_of"]
        tile, land = made["tile_cells"], made.get("land", FORMER_LAND)
    else:
        tile = store.tile_cells((params.compact_dims or card["value_dim"]) + card["key_dim"], params.dtype)
        land = "any"
    return params.model_copy(update={"tile_cells": params.tile_cells or tile, "land": params.land or land})


def decisive(params: PublishParams) -> dict[str, Any]:
    """The parameters that decide what a grid is; the rule of land is named where it is not that of the first grids."""
    aside = {"promote", "drift_alert", "line"} | ({"land"} if params.land == FORMER_LAND else set())
    return params.model_dump(mode="json", exclude=aside)


def publish_tiles(client: Client, job: Job, parts: dict[str, Part], tiles: list[Tile], done: set[Tile]) -> list[Report]:
    """Makes the tiles that are not done by the way that fits: in parts, as an update, or each from all the database."""
    mask = land_mask(job.spec)
    land = {tile: int(mask[tile.window].sum()) for tile in tiles}
    left, there = [tile for tile in tiles if tile not in done], len(done)
    with counted(Work("land cells", sum(land.values()), sum(land[tile] for tile in done))) as cells:
        if parts:
            reports = publish_in_parts(client, job, parts, left, there)
        else:
            make = partial(update_tile if job.parent else publish_tile, job)
            reports = run_units(client, make, left, label="publish", there=there)
        cells.done = sum(report.cells for report in reports)
    log().info("%d places retrieved for %d cells", sum(report.evaluated for report in reports), cells.done)
    return reports


def unmeasured(_: Projection | None) -> Survey:
    """Nothing is known of the field."""
    return Survey({})


def prepare(
    job: Job,
    card: dict[str, Any],
    attrs: dict[str, Any],
    look: Callable[[Projection | None], Survey] = unmeasured,
    overviews: int = 0,
) -> None:
    """Writes what the tiles need, unless it is there: the changes, the empty sums, and last the empty grid.

    Args:
        job: The grid.
        card: The database's card.
        attrs: Attributes of the grid: what made it.
        look: Measures the field, once the projection of its values is known.
        overviews: Coarser levels that will be added.
    """
    if storage.exists(storage.join(job.grid, "zarr.json")):
        return
    if job.parent:
        write_changes(job, card["images"])
    visual, halves = job.compact_dims or card["value_dim"], 1 + job.method.has_geodesic
    if job.keep_sums:
        store.create(job.sums, job.spec, store.sums_template(job.spec, visual, halves, attrs))
    projection = find_projection(job) if job.compact_dims else None
    found = look(projection)
    content = store.Content(visual, card["key_dim"], found.dtype, found.scales, job.evidence)
    store.create_levels(job.grid, job.spec, content, attrs, overviews)
    store.create(job.grid, job.spec, store.template(job.spec, content, attrs | found.attrs, projection))


def provenance(job: Job, card: dict[str, Any], made_of: dict[str, Any]) -> dict[str, Any]:
    """The attributes that tell what made a grid: source and period, encoder, database, parameters, code, kernels."""
    attrs = conventions.provenance(job.checkpoint, job.database, card["attribution"]) | period(card) | kernels(job)
    made = {"made_of": made_of, "fingerprint": fingerprint(made_of)}
    made |= {"checkpoint": card["checkpoint"], "database": card["fingerprint"]}
    return attrs | {f"rangegrid:{name}": value for name, value in made.items()}


def period(card: dict[str, Any]) -> dict[str, str]:
    """The time window of a database's images, where the sample it was made from is still there."""
    try:
        patches = read_card(storage.join(settings().storage_url, "patches", card.get("patches", "none")), "patches")
    except UserError:
        return {}
    return {"rangegrid:datetime": patches["made_of"]["datetime"]} if "datetime" in patches["made_of"] else {}


def measure(client: Client, job: Job, dtype: DType, projection: Projection | None) -> Survey:
    """What is known of the field: the parent's findings for an update, else what a worker measures now."""
    if job.parent:
        attrs = zarr.open_group(storage.zarr_store(storage.join(job.parent, GRID)), mode="r").attrs
        return Survey({name: attrs[name] for name in ("rangegrid:field",) if name in attrs})
    found = run_units(client, partial(survey, job, dtype), [projection], label="survey", name=lambda _: "the field")
    return found[0]


def find_projection(job: Job) -> Projection:
    """The parent's projection, whose space the sums are in, or the principal components of this database."""
    if job.parent:
        return store.read_projection(storage.join(job.parent, GRID))
    assert job.compact_dims is not None  # for the type checker
    return Projection.fit(stored_values(job.database), job.compact_dims)


def warn_of_loss(job: Job) -> dict[str, Any]:
    """What the card tells of what fewer bits lost, dimension by dimension; warns where that is much."""
    attrs = zarr.open_group(storage.zarr_store(job.grid), mode="r").attrs
    lost = attrs.get("rangegrid:loss")
    if lost and lost["dtype"] == "int8":
        log().warning("%s: %s", job.grid, INT8.format(**lost["latitude_probe_r2"]))
    if lost and "warning" in lost:
        log().warning("%s: %s", job.grid, lost["warning"])
        rows = [
            f"| {name} | {i} | {share:.0%} |" for name in store.BLOCKS for i, share in enumerate(lost[name]["lost"])
        ]
        table = "\n".join([lost["warning"], "", "| part | dimension | lost of its deviation |", "|---|---|---|", *rows])
        keep_table(storage.join(job.home, "loss.md"), table, "grid-loss", f"What {lost['dtype']} loses")
    return {"loss": lost} if lost else {}


def show(client: Client, job: Job, attribution: str) -> None:
    """Keeps beside the grid what shows it: maps, a page, and its STAC item; and tells where they are."""
    draw(client, job, attribution)
    page = write_page(job.home)
    write_item(job.home)
    places = {"page": page, "map": storage.join(job.home, "world.png"), "STAC item": storage.join(job.home, ITEM)}
    opens = opening("xarray as xr", "grid = xr.open_zarr", job.grid)
    show_places(places, opens, "grid", f"The {job.method.name.upper()} grid, {job.spec.size}")
