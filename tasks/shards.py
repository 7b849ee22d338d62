"""A database that no worker can hold: every worker holds a part, and their sums add."""

from functools import lru_cache, reduce
from operator import add

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from tasks.cards import read_card
from tasks.core.retrieval import Halves, Method, RetrievalIndex
from tasks.database import read_rows


def halves_on_workers(
    client: Client, database: str, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method
) -> Halves:
    """Both halves over the whole database, each worker summing its part; what travels does not grow with it.

    A part that a worker lost or never had is read by the one that does its work, so a dead worker costs time alone.

    Args:
        client: The Dask cluster.
        database: URL of the database, which every worker reaches.
        queries: Unit location embeddings, (m, d); some thousand at a time.
        lonlat: The places they embed, (m, 2) in degrees.
        method: `range` or `range+`.
    """
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    images = read_card(database, "database")["images"]
    edges = np.linspace(0, images, min(len(workers), images) + 1).astype(int).tolist()
    futures = [
        client.submit(
            _halves,
            (database, edges[i], edges[i + 1]),
            queries,
            lonlat,
            method,
            workers=[worker],
            allow_other_workers=True,
            pure=False,
        )
        for i, worker in enumerate(workers[: len(edges) - 1])
    ]
    return reduce(add, client.gather(futures))


def _halves(part: tuple[str, int, int], queries: NDArray, lonlat: NDArray, method: Method) -> Halves:
    return _index(*part).halves(queries, lonlat, method)


@lru_cache(maxsize=1)
def _index(database: str, start: int, stop: int) -> RetrievalIndex:
    """A worker's part, read once per process."""
    data = read_rows(database, start, stop)
    return RetrievalIndex(data.keys, data.values, data.locations)
