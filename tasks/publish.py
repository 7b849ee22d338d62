"""Runs the publish step: RANGE+ at every land cell of a grid, tile by tile on Dask.

A grid may keep the sums behind it. A later grid of the changed database can then be updated from this one as its
parent, and computes only the images that were added or removed (`tasks.grid.updates`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import zarr
from distributed import Client

from infra import storage
from infra.errors import UserError
from infra.explorer.bundle import place_page
from infra.settings import settings
from tasks.artifacts import keep_table, markdown_table, opening, show_places
from tasks.cards import fingerprint, home_of, is_finished, name_of, product_url, read_card, write_card
from tasks.core.adaptive import Report
from tasks.core.compact import Compact
from tasks.core.earth.grid import GridSpec, Tile, around
from tasks.core.earth.land import land_mask
from tasks.core.earth.plane import Plane
from tasks.core.earth.region import Region
from tasks.database import heads
from tasks.database.store import read_pair
from tasks.grid import conventions, store
from tasks.grid.beside import check_beside, dims_beside
from tasks.grid.companion import publish_companion
from tasks.grid.geotiff import publish_geotiff
from tasks.grid.overviews import publish_overviews
from tasks.grid.parts import Part, parts_of, publish_in_parts
from tasks.grid.previews import draw, write_page
from tasks.grid.seas import fill_seas
from tasks.grid.survey import Survey, kernels, survey
from tasks.grid.tiles import Job, Parent, land_tiles, publish_tile
from tasks.grid.updates import kept_sums, read_parent, update_tile, write_changes
from tasks.params import AUTO, PublishParams
from tasks.products import DatabaseCard, GridCard, PatchesCard, told_land
from tasks.release import versions
from tasks.release.lines import Layout
from tasks.release.promotion import promote_unless_withdrawn
from tasks.release.stac import ITEM, write_item
from tasks.release.validation import refuse, validate_grid
from tasks.tables.regions import card_of, decides, find_region, keep_region
from tasks.units import Work, counted, log, run_units

INHERITED = ("tile_cells", "land", "with_")  # the parent's, unless given
INHERITED_HEADS = ("heads", "compact_dims", "location_dims")  # the same where both grids are multi-head
INT8 = (
    "int8 is for maps, likeness and classes: a probe for the latitude scores {float32} in float32 and {stored} as "
    "stored (R², blocks held out), and others may lose more; `rangegrid evaluate --grid` tells it per task"
)


def publish_grid(client: Client, checkpoint: str, database: str, params: PublishParams) -> str:
    """Publishes the grid of one database, resumes what an earlier run began, and makes it the latest of its line.

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
    plan = GridPlan.of(checkpoint, database, params)
    job = plan.job
    since = versions.begin(job.grid, params.line, plan.layout)
    if plan.region:
        keep_region(job.home, plan.region)
    parts = parts_of(client, job, plan.database)
    prepare(client, job, plan.database, plan.attrs | {"rangegrid:line": since.line}, whole=not parts)
    fill(client, job, parts, plan.tiles)
    refuse(job.grid, validate_grid(client, job.grid, plan.card))
    finish(plan, since)
    show(client, job, plan.database.attribution)
    versions.confirm(job.grid, since)  # again: to draw takes a while
    if params.promote:
        promote_unless_withdrawn(job.grid, since, params.drift_alert)
    return job.grid


@dataclass(frozen=True)
class GridPlan:
    """The plan of a run, settled and checked before any work."""

    job: Job
    """The job: what every tile needs."""
    database: DatabaseCard
    """The database's card."""
    card: GridCard
    """The grid's card, as far as it is known before the grid is made."""
    tiles: list[Tile]
    """The tiles with land."""
    sums: dict[str, Any]
    """What sums must have in common with these to update them."""
    region: Region | None = None
    """The region that the grid is cut to."""

    @classmethod
    def of(cls, checkpoint: str, database: str, params: PublishParams) -> "GridPlan":
        """Settles what the parameters left open.

        Raises:
            UserError: The inputs do not belong together, or there is nothing to make.
        """
        images = read_pair(checkpoint, database)
        region = find_region(params.region, params.buffer_km)
        params = settled(placed(params, region), checkpoint, database, region)
        tiles = land_tiles(replace(params.spec, region=region))
        if not tiles:
            raise UserError(f"the box {params.box} in {params.crs} has no land in any cell: give another one")
        sums = kept_sums(images, params) | {"region": region.digest if region else None}
        parent = read_parent(params.parent, sums) if params.parent else None
        made_of = decisive(images, params, parent) | decides(region)
        made = {"fingerprint": fingerprint(made_of), "made_of": made_of, "database": database, "checkpoint": checkpoint}
        job = Job(product_url("grids", made_of), checkpoint, database, params, parent)
        return cls(job, images, GridCard(**made, **card_of(region)), tiles, sums, region)

    @property
    def dims(self) -> int:
        """Returns the length of a vector."""
        return dims_of(self.database, self.job.params)

    @property
    def layout(self) -> Layout:
        """Returns the layout that the grid's readers will rely on."""
        return Layout.of(self.card.recipe, self.dims)

    @property
    def attrs(self) -> dict[str, Any]:
        """Returns the attributes of provenance: source and period, encoder, database, code, kernels."""
        images, job, card = self.database, self.job, self.card
        made = {"made_of": card.made_of, "fingerprint": card.fingerprint}
        made |= {"checkpoint": images.checkpoint, "database": images.fingerprint}
        attrs = conventions.provenance(images.attribution) | period(images) | kernels(job)
        return attrs | {f"rangegrid:{name}": value for name, value in made.items()}


def settled(params: PublishParams, checkpoint: str, database: str, region: Region | None = None) -> PublishParams:
    """Settles heads and dimensions, tile size and rule of land: the parent's, or the database's and by SHARD_BYTES.

    Heads are those that its images in a region choose, where it is one's and has enough of them.

    Raises:
        UserError: More components are asked for than there are, or the weights of another encoder are not there.
    """
    card = read_card(database, DatabaseCard)
    if params.parent:
        parent = read_card(home_of(params.parent), GridCard).recipe
        names: tuple[str, ...] = INHERITED
        if parent.method == params.method == "multi-head":
            names += INHERITED_HEADS
        params = params.model_copy(update={n: getattr(parent, n) for n in names if not getattr(params, n)})
    params = heads.in_region(params, checkpoint, database, region)
    params = heads.settled(params, card, partial(heads.measured_at, checkpoint, database))
    check_beside(params.with_)
    tile = params.tile_cells or store.tile_cells(dims_of(card, params), params.dtype)
    return params.model_copy(update={"tile_cells": tile, "land": params.land or "any"})


def placed(params: PublishParams, region: Region | None) -> PublishParams:
    """Returns the parameters with the CRS and the box of the region, where they are left open.

    Raises:
        UserError: No box of these steps is around it.
    """
    if region is None or not params.is_open:
        return params
    plane = region.plane if params.crs == AUTO else Plane(params.crs)
    try:
        box = around(region, plane, params.step, params.overviews)
        edges = dict(zip(("west", "south", "east", "north"), box, strict=True))
        GridSpec(params.step, box=box, crs=plane.name)
    except ValueError as error:
        raise UserError(f"the region {region.name}: {error}") from None
    return params.model_copy(update=edges | {"crs": plane.name})


def dims_of(database: DatabaseCard, params: PublishParams) -> int:
    """Returns the length of a vector."""
    visual = params.retrieval.width * (params.compact_dims or database.value_dim)
    return visual + (params.location_dims or database.key_dim) + sum(dims_beside(params.with_).values())


def decisive(database: DatabaseCard, params: PublishParams, parent: Parent | None) -> dict[str, Any]:
    """Returns everything that decides a grid, as its fingerprint hashes it."""
    untold = {"promote", "drift_alert", "line", "land"} - told_land(params.land).keys()
    untold |= {"region", "buffer_km"}  # told by its polygons
    if params.retrieval.is_side_by_side:
        untold.add("beta")
    else:
        untold |= {"heads", "location_dims"}  # so that grids of before are found again
    if not params.with_:
        untold.add("with_")  # as above
    decides = {"database": database.fingerprint} | params.model_dump(mode="json", exclude=untold)
    return decides | {"parent": parent.fingerprint if parent else None}


def period(database: DatabaseCard) -> dict[str, str]:
    """Returns the time window of a database's images, where the samples that it was made from still exist and agree."""
    samples = [database.patches, *(origin.patches for origin in database.origins)]
    windows = {_window(patches) for patches in samples if patches}
    if len(windows) == 1 and None not in windows:
        return {"rangegrid:datetime": str(windows.pop())}
    return {}


def _window(patches: str) -> str | None:
    """Returns the time window of a sample by its fingerprint; none where it is gone."""
    try:
        card = read_card(storage.join(settings().storage_url, PatchesCard.directory, patches), PatchesCard)
    except UserError:
        return None
    return card.recipe.datetime


def prepare(client: Client, job: Job, database: DatabaseCard, attrs: dict[str, Any], *, whole: bool) -> None:
    """Writes what the tiles need, unless it exists: the changed images, the empty sums, and last the empty grid.

    Args:
        client: The Dask cluster, on which the field is measured.
        job: The grid.
        database: The database's card.
        attrs: Attributes of the grid: what made it.
        whole: Whether a worker can hold the database: else the field is not measured.
    """
    if storage.exists(storage.join(job.grid, "zarr.json")):
        return
    if job.parent:
        write_changes(job, job.parent, database.images)
    params, spec, values = job.params, job.spec, job.params.compact_dims or database.value_dim
    if params.keep_sums:
        store.create(job.sums, spec, store.sums_template(spec, values, len(job.method.heads), attrs))
    compact = find_compact(job)
    found = measure(client, job, compact) if whole else Survey({})
    visual, location = values * job.method.width, params.location_dims or database.key_dim
    beside = dims_beside(params.with_)
    content = store.Content(visual, location, found.dtype, found.scales, params.evidence, job.method.blocks, beside)
    store.create_levels(job.grid, spec, content, attrs, params.overviews)
    store.create(job.grid, spec, store.template(spec, content, attrs | found.attrs, compact))


def find_compact(job: Job) -> Compact:
    """Returns the parent's projections, in whose space its sums are, or those of the database."""
    if job.parent:
        return store.read_compact(job.parent.grid)
    return heads.stored_compact(job.params, job.checkpoint, job.database)


def measure(client: Client, job: Job, compact: Compact) -> Survey:
    """Returns the survey of the field: the parent's for an update, else one that a worker measures now."""
    if job.parent:
        attrs = zarr.open_group(storage.zarr_store(job.parent.grid), mode="r").attrs
        return Survey({name: attrs[name] for name in ("rangegrid:field",) if name in attrs})
    look = partial(survey, job, job.params.dtype)
    return run_units(client, look, [compact], label="survey", name=lambda _: "the field")[0]


def fill(client: Client, job: Job, parts: dict[str, Part], tiles: list[Tile]) -> None:
    """Makes the missing tiles, then what is made from them: coarser levels, and empty shards of the seas."""
    done = store.written(job.grid, job.spec, tiles)
    log().info("%s: %d tiles of land, %d already there", job.grid, len(tiles), len(done))
    publish_tiles(client, job, parts, tiles, done)
    publish_overviews(client, job, job.params.overviews)
    for url in [job.grid, *store.level_urls(job.grid)]:
        fill_seas(url)
    if job.params.keep_sums:
        fill_seas(job.sums)


def publish_tiles(client: Client, job: Job, parts: dict[str, Part], tiles: list[Tile], done: set[Tile]) -> list[Report]:
    """Makes the missing tiles: from parts of the database, as an update, or each from the whole database."""
    mask = land_mask(job.spec)
    land = {tile: int(mask[tile.window].sum()) for tile in tiles}
    left, there = [tile for tile in tiles if tile not in done], len(done)
    with counted(Work("land cells", sum(land.values()), sum(land[tile] for tile in done))) as cells:
        if parts:
            reports = publish_in_parts(client, job, parts, left, there)
        else:
            if job.parent:
                make = partial(update_tile, job, job.parent)
            else:
                make = partial(publish_tile, job)
            reports = run_units(client, make, left, label="publish", there=there)
        cells.done = sum(report.cells for report in reports)
    log().info("%d places retrieved for %d cells", sum(report.evaluated for report in reports), cells.done)
    return reports


def finish(plan: GridPlan, since: versions.Pointer) -> None:
    """Writes the grid's card, unless it exists, since its time is the version's age; a prune meanwhile removes it."""
    job = plan.job
    if not is_finished(job.home):
        attrs = zarr.open_group(storage.zarr_store(job.grid), mode="r").attrs
        found = {"line": since.line, "dims": plan.dims, "sums": plan.sums if job.params.keep_sums else None}
        if lost := attrs.get("rangegrid:loss"):
            warn_of_loss(job, lost)
            found["loss"] = lost
        if resolution := attrs.get("rangegrid:field", {}).get("whole_half_km"):
            found["resolution_km"] = resolution
        write_card(job.home, plan.card.model_copy(update=found))
    versions.confirm(job.grid, since)


def warn_of_loss(job: Job, lost: dict[str, Any]) -> None:
    """Warns of what fewer bits lose, with a table of the dimensions where that is large."""
    if lost["dtype"] == "int8":
        log().warning("%s: %s", job.grid, INT8.format(**lost["latitude_probe_r2"]))
    if "warning" in lost:
        log().warning("%s: %s", job.grid, lost["warning"])
        rows = [(name, i, f"{share:.0%}") for name in store.BLOCKS for i, share in enumerate(lost[name]["lost"])]
        table = "\n\n".join([lost["warning"], markdown_table(["part", "dimension", "lost of its deviation"], rows)])
        keep_table(storage.join(job.home, "loss.md"), table, "grid-loss", f"What {lost['dtype']} loses")


def show(client: Client, job: Job, attribution: str) -> None:
    """Writes maps, the compact product, a page and the STAC item beside the grid, and shows their places."""
    draw(client, job, attribution)
    publish_geotiff(client, publish_companion(client, job.grid))
    explorer = place_page(settings().storage_url)
    page = write_page(job.home)
    write_item(job.home)
    places = {"page": page, "map": storage.join(job.home, "world.png"), "STAC item": storage.join(job.home, ITEM)}
    if explorer:
        places["explorer"] = f"{explorer}#grid={name_of(job.grid)}"
    opens = opening("xarray as xr", "grid = xr.open_zarr", job.grid)
    show_places(places, opens, "grid", f"The {job.method.title} grid, {job.spec.size}")
