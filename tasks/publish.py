"""The publish step: RANGE+ at every land cell of a global grid, tile by tile on Dask."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import zarr
from distributed import Client

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks import grids
from tasks.artifacts import keep_picture
from tasks.cards import fingerprint, product_url, read_card, write_card
from tasks.checkpoint import load_checkpoint
from tasks.core.adaptive import Cells, Report, embed_cells
from tasks.core.grid import GridSpec, Tile
from tasks.core.land import land_mask
from tasks.core.location import LocationEncoder
from tasks.core.retrieval import Method, RetrievalIndex
from tasks.database import open_database
from tasks.params import PublishParams
from tasks.pictures import world_map
from tasks.units import log, run_units


@dataclass(frozen=True)
class Job:
    """What every tile of one grid needs; small, so that it travels to the workers with each unit."""

    grid: str
    """URL of the grid's Zarr."""
    checkpoint: str
    """URL of the checkpoint."""
    database: str
    """URL of the database."""
    spec: GridSpec
    """The grid."""
    method: Method
    """The retrieval."""
    tolerance: float
    """Relative error that interpolation may leave; 0: every cell exactly."""


def publish_grid(client: Client, checkpoint: str, database: str, params: PublishParams) -> str:
    """Publishes the grid of one database, resuming what an earlier run began.

    Args:
        client: The Dask cluster.
        checkpoint: URL of the location encoder.
        database: URL of the database that was encoded with it.
        params: What to publish.

    Returns:
        The URL of the grid's Zarr.

    Raises:
        UserError: The two do not belong together, or a tile could not be made.
    """
    card = read_pair(checkpoint, database)
    made_of = {"database": card["fingerprint"], **params.model_dump()}
    home = product_url("grids", made_of)
    job = Job(
        grid=storage.join(home, "grid.zarr"),
        checkpoint=checkpoint,
        database=database,
        spec=GridSpec(params.step_degrees, params.tile_cells),
        method=Method(params.method, beta=params.beta),
        tolerance=params.tolerance,
    )
    prepare(job, {"rangegrid:made_of": made_of, "attribution": card["attribution"]})
    tiles = land_tiles(job.spec)
    done = grids.written(job.grid, job.spec, tiles)
    log().info("%s: %d tiles of land, %d already there", job.grid, len(tiles), len(done))
    reports = run_units(client, partial(publish_tile, job), [t for t in tiles if t not in done], label="publish")
    log().info("%d places retrieved for %d cells", sum(r.evaluated for r in reports), sum(r.cells for r in reports))
    validate(job.grid, job.spec, tiles)
    show(home, job, card["attribution"])
    write_card(home, "grid", fingerprint=fingerprint(made_of), made_of=made_of, database=database)
    storage.write_json(storage.join(settings().storage_url, "grids", "latest.json"), {"grid": job.grid})
    return job.grid


def read_pair(checkpoint: str, database: str) -> dict[str, Any]:
    """The database's card, after checking that its keys live in the checkpoint's space."""
    ours = read_card(checkpoint, "checkpoint")["fingerprint"]
    card = read_card(database, "database")
    if card["checkpoint"] != ours:
        raise UserError(
            f"the database {database} was encoded with checkpoint {card['checkpoint']}, not with {ours}: "
            "its keys mean nothing to this encoder. Encode the patches with this checkpoint first"
        )
    return card


def prepare(job: Job, attrs: dict[str, Any]) -> None:
    """Writes the grid's template unless it is there."""
    if storage.exists(storage.join(job.grid, "zarr.json")):
        return
    encoder, index = load(job.checkpoint, job.database)
    grids.create(job.grid, job.spec, grids.template(job.spec, index.values.shape[1], encoder.dim, attrs))


@lru_cache(maxsize=2)
def load(checkpoint: str, database: str) -> tuple[LocationEncoder, RetrievalIndex]:
    """The encoder and the index, loaded once per worker process."""
    data = open_database(database)
    index = RetrievalIndex(data.keys, data.values, data.locations)
    return load_checkpoint(checkpoint).location, index


def land_tiles(spec: GridSpec) -> list[Tile]:
    """The tiles with a land cell, in the grid's order."""
    land = land_mask(spec.lon, spec.lat)
    return [tile for tile in spec.tiles() if land[tile.window].any()]


def publish_tile(job: Job, tile: Tile) -> Report:
    """Embeds the land cells of one tile and writes it as one shard; tells how."""
    encoder, index = load(job.checkpoint, job.database)
    rows, columns = tile.window
    lon, lat = job.spec.lon[columns], job.spec.lat[rows]
    land = land_mask(lon, lat)
    vectors, report = embed_cells(encoder, index, Cells(lon, lat, land), job.method, job.tolerance)
    values = np.full((vectors.shape[1], tile.rows, tile.columns), np.nan, np.float32)
    values[:, land] = vectors.T
    grids.write_tile(job.grid, tile, values)
    return report


def show(home: str, job: Job, attribution: str) -> None:
    """Keeps the world in embedding colours beside the grid."""
    vectors = zarr.open_array(storage.zarr_store(storage.join(job.grid, grids.VARIABLE)), mode="r")
    title = f"The world in {job.method.name.upper()} colours, {job.spec.step:g} degree"
    caption = f"First three principal components of the embeddings. {attribution}."
    picture = world_map(vectors, job.spec.lat, job.spec.lon, title, caption)
    keep_picture(storage.join(home, "world.png"), picture, "world-map", title)


def validate(url: str, spec: GridSpec, tiles: list[Tile]) -> None:
    """Refuses a grid with a missing tile, or whose values are not there exactly where land is.

    Raises:
        UserError: The grid is not whole.
    """
    missing = set(tiles) - grids.written(url, spec, tiles)
    if missing:
        raise UserError(f"{url} lacks {len(missing)} tiles, for example {min(map(str, missing))}: run again")
    first = zarr.open_array(storage.zarr_store(storage.join(url, grids.VARIABLE)), mode="r")[0]
    if not np.array_equal(np.isfinite(first), land_mask(spec.lon, spec.lat)):
        raise UserError(f"{url} has values where there is no land, or none where there is: delete it and run again")
