"""A database that no worker can hold whole: every worker holds a part, and the sums of the parts add.

A tile is a task for each part, on the worker that holds it, and a tree of additions; arrays travel from worker to
worker alone. A part that a worker lost or never had is read by the one that does its work, so a dead worker costs
time alone.
"""

from functools import lru_cache
from itertools import pairwise
from operator import add
from typing import Any

import numpy as np
from distributed import Client, Future

from infra.errors import UserError
from tasks.core.adaptive import Report
from tasks.core.grid import Tile
from tasks.core.retrieval import RetrievalIndex
from tasks.core.sums import Halves
from tasks.database import read_rows
from tasks.tiles import LOADING, Job, deliver, index_of, land_cells, load_encoder
from tasks.units import RETRIES, follow

MEMORY_SHARE = 0.5  # of a worker's memory that images may take; sums, harmonics and the program need the rest
AHEAD = 3  # tiles in the making: more would pile up sums where one worker is slow

Part = tuple[int, int]


def parts_of(client: Client, job: Job, card: dict[str, Any]) -> dict[str, Part]:
    """The rows that each worker is to hold a part of; empty where any worker can hold all.

    Args:
        client: The Dask cluster.
        job: The grid.
        card: The database's card.

    Raises:
        UserError: Not even all workers together can, or the grid needs the database whole.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"]
    limit = min(MEMORY_SHARE * (worker["memory_limit"] or np.inf) for worker in workers.values())
    size = card["images"] * (card["key_dim"] + card["value_dim"]) * 4
    if size <= limit:
        return {}
    if job.tolerance or job.parent:
        raise UserError(
            f"the database {job.database} takes {size / 1e9:.3g} GB, which no worker can hold, and interpolation and "
            "updates need it whole: publish without --tolerance and --parent, or give each worker more memory"
        )
    if size > limit * len(workers):
        raise UserError(
            f"the database {job.database} takes {size / 1e9:.3g} GB, and {len(workers)} workers hold "
            f"{limit / 1e9:.3g} GB each: start {int(np.ceil(size / limit))} workers, or give each more memory"
        )
    edges = np.linspace(0, card["images"], min(len(workers), card["images"]) + 1).astype(int).tolist()
    return dict(zip(sorted(workers), pairwise(edges), strict=False))


def publish_in_parts(client: Client, job: Job, parts: dict[str, Part], tiles: list[Tile]) -> list[Report]:
    """Publishes tiles from a database in parts, by worker."""
    made: list[Future] = []
    for i, tile in enumerate(tiles):
        earlier = made[i - AHEAD] if i >= AHEAD else None
        sums = [_submit(client, part_sums, job, part, tile, earlier, workers=[w]) for w, part in parts.items()]
        made.append(_submit(client, finish_tile, job, tile, _added(client, sums)))
    return follow(client, made, tiles, label="publish")


def _submit(client: Client, *call: Any, workers: list[str] | None = None) -> Future:
    return client.submit(*call, workers=workers, allow_other_workers=bool(workers), pure=False, retries=RETRIES)


def _added(client: Client, sums: list[Future]) -> Future:
    """Their total, by a tree: no worker holds the sums of more than two parts."""
    while len(sums) > 1:
        pairs = [sums[i : i + 2] for i in range(0, len(sums), 2)]
        sums = [_submit(client, add, *pair) if len(pair) > 1 else pair[0] for pair in pairs]
    return sums[0]


def part_sums(job: Job, part: Part, tile: Tile, _: Report | None) -> Halves:
    """The sums of a tile's land cells over one part of the database, once an earlier tile is written."""
    places = land_cells(job.spec, tile).lonlat
    with LOADING:
        index, encoder = load_part(job.database, part, job.projected_by), load_encoder(job.checkpoint)
    return index.halves(encoder.embed(places), places, job.method)


@lru_cache(maxsize=1)
def load_part(database: str, part: Part, projected_by: str | None) -> RetrievalIndex:
    """A worker's part, read once per process."""
    return index_of(read_rows(database, slice(*part)), projected_by)


def finish_tile(job: Job, tile: Tile, sums: Halves) -> Report:
    """Writes a tile from its sums over all parts."""
    places = land_cells(job.spec, tile).lonlat
    return deliver(job, tile, load_encoder(job.checkpoint).embed(places), sums.scaled(), len(places))
