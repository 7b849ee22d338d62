"""Publishes from a database that no worker can hold whole: every worker holds a part, and the sums of the parts add.

A tile is a task for each part, on the worker that holds it, and a tree of additions. Arrays travel only from worker to
worker. The geodesic half has one spectrum for all parts, summed once. Where a worker has died, another one reads its
part, so a dead worker costs only time.
"""

from functools import lru_cache
from itertools import pairwise
from operator import add
from typing import Any

import numpy as np
from distributed import Client, Future
from numpy.typing import NDArray

from infra.errors import UserError
from tasks.core.adaptive import Report
from tasks.core.earth.grid import Tile
from tasks.core.geodesic import Spectrum, pays
from tasks.core.methods import Head
from tasks.core.retrieval import RetrievalIndex
from tasks.core.sums import Selections, Sums
from tasks.database.heads import projected_index
from tasks.database.store import read_rows
from tasks.grid.tiles import LOADING, Job, deliver, land_cells, load_compact, load_encoder
from tasks.products import DatabaseCard
from tasks.units import RETRIES, follow

MEMORY_SHARE = 0.5  # share of a worker's memory that images may take; sums, harmonics and the program need the rest
AHEAD = 6  # tiles under way at a time: more would pile up sums where one worker is slow

Part = tuple[int, int]


def parts_of(client: Client, job: Job, card: DatabaseCard) -> dict[str, Part]:
    """Returns the part of the database that each worker holds; empty where every worker can hold all rows.

    Args:
        client: The Dask cluster.
        job: The grid.
        card: The database's card.

    Raises:
        UserError: Not even all workers together can, or the grid needs the database whole.
    """
    while not (workers := client.scheduler_info(n_workers=-1)["workers"]):
        client.wait_for_workers(1)  # an elastic cluster may have none just now, as one whose heartbeats came late
    limit = min(MEMORY_SHARE * (worker["memory_limit"] or np.inf) for worker in workers.values())
    size = card.images * (card.key_dim + card.value_dim) * 4
    if size <= limit:
        return {}
    refuse_whole(job, size)
    if size > limit * len(workers):
        raise UserError(
            f"the database {job.database} takes {size / 1e9:.3g} GB, and {len(workers)} workers hold "
            f"{limit / 1e9:.3g} GB each: start {int(np.ceil(size / limit))} workers, or give each more memory"
        )
    edges = np.linspace(0, card.images, min(len(workers), card.images) + 1).astype(int).tolist()
    return dict(zip(sorted(workers), pairwise(edges), strict=False))


def refuse_whole(job: Job, size: int) -> None:
    """Refuses a job that needs the database whole, `size` bytes, where no worker can hold it."""
    if job.params.tolerance or job.parent:
        needs, without = "interpolation and updates need", "without --tolerance and --parent"
    elif not all(head.is_additive for head in job.method.heads):
        needs, without = "the bandwidth of the k-th nearest image needs", "heads geodesic:T in place of nearest:K"
    elif job.params.evidence or job.params.dtype != "float32":
        needs, without = "evidence and the scales of a smaller dtype need", "float32 without evidence"
    else:
        return
    raise UserError(
        f"the database {job.database} takes {size / 1e9:.3g} GB, which no worker can hold, and {needs} it whole: "
        f"publish {without}, or give each worker more memory"
    )


def publish_in_parts(client: Client, job: Job, parts: dict[str, Part], tiles: list[Tile], there: int) -> list[Report]:
    """Publishes tiles from a database in parts, by worker; `there` tiles were made before."""
    spectra = _spectra(client, job, parts)
    made: list[Future] = []
    for i, tile in enumerate(tiles):
        earlier = made[i - AHEAD] if i >= AHEAD else None
        far = _submit(client, far_cells, job, tile, spectra, earlier)
        sums = [_submit(client, part_sums, job, part, tile, far, workers=[w]) for w, part in parts.items()]
        made.append(_submit(client, finish_tile, job, tile, _added(client, sums), far, spectra))
    return follow(client, made, tiles, label="publish", there=there)


def _spectra(client: Client, job: Job, parts: dict[str, Part]) -> dict[float, Future]:
    """Computes the spectrum of each geodesic head that has one over the whole database: parts need not sum these."""
    images = sum(b - a for a, b in parts.values())
    made: dict[float, Future] = {}
    for head in job.method.heads:
        if head.kind == "geodesic" and pays(head.at, images):
            of_parts = [_submit(client, part_spectrum, job, part, head.at, workers=[w]) for w, part in parts.items()]
            made[head.at] = _added(client, of_parts)
    return made


def _submit(client: Client, *call: Any, workers: list[str] | None = None) -> Future:
    return client.submit(*call, workers=workers, allow_other_workers=bool(workers), pure=False, retries=RETRIES)


def _added(client: Client, sums: list[Future]) -> Future:
    """Adds sums in a tree, so that no worker holds the sums of more than two parts."""
    while len(sums) > 1:
        pairs = [sums[i : i + 2] for i in range(0, len(sums), 2)]
        sums = [_submit(client, add, *pair) if len(pair) > 1 else pair[0] for pair in pairs]
    return sums[0]


def part_spectrum(job: Job, part: Part, temperature: float) -> Spectrum:
    """Computes the spectrum of a temperature over one part."""
    return _part(job, part).spectrum(temperature)


Far = dict[float, NDArray[np.bool_]]  # by temperature: which land cells of a tile are too far from all images, (m,)


def far_cells(job: Job, tile: Tile, spectra: dict[float, Spectrum], _: Report | None) -> Far:
    """Tells which land cells of a tile are too far from all images for each spectrum: the parts sum these.

    It waits until an earlier tile is written."""
    places = land_cells(job.spec, tile).lonlat
    return {at: spectrum.weights.sums(places)[1] for at, spectrum in spectra.items()}


def part_sums(job: Job, part: Part, tile: Tile, far: Far) -> Selections:
    """Computes the sums of a tile's land cells over a part of the database, what has a spectrum for far cells alone."""
    places, index = land_cells(job.spec, tile).lonlat, _part(job, part)
    queries = load_encoder(job.checkpoint).embed(places)

    def of(head: Head) -> Sums:
        if head.kind == "semantic":
            return index.by_likeness(queries, head.at)
        return index.by_nearness(places[far.get(head.at, slice(None))], head.at)

    return Selections(tuple(of(head) for head in job.method.heads))


def finish_tile(job: Job, tile: Tile, sums: Selections, far: Far, spectra: dict[float, Spectrum]) -> Report:
    """Writes a tile from its sums over all parts."""
    places = land_cells(job.spec, tile).lonlat

    def whole(head: Head, found: Sums) -> Sums:
        if head.kind == "geodesic" and head.at in spectra:
            return spectra[head.at].sums(places)[0].replaced(far[head.at], found)
        return found

    selections = Selections(tuple(map(whole, job.method.heads, sums.sums)))
    return deliver(job, tile, load_encoder(job.checkpoint).embed(places), selections.scaled(), len(places))


def _part(job: Job, part: Part) -> RetrievalIndex:
    with LOADING:
        return load_part(job.database, part, job.projected_by)


@lru_cache(maxsize=1)
def load_part(database: str, part: Part, projected_by: str | None) -> RetrievalIndex:
    """Reads a worker's part, once per process."""
    return projected_index(read_rows(database, slice(*part)), load_compact(projected_by))
