"""Makes coarser levels of a grid: each cell is the mean vector of the land cells among the four that it covers.

A level is a Zarr beside the grid's, `x2.zarr`, `x4.zarr` and so on, made from the level before, with the same
variables, tiles and dtype. The directory that holds them is a Zarr group, whose attribute `multiscales` lists them. A
mean of unit vectors is shorter than one: the more its cells differ, the shorter is the location part.
"""

from functools import partial

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from tasks.core.earth.grid import Tile
from tasks.core.earth.land import land_mask
from tasks.grid import store
from tasks.grid.tiles import Job
from tasks.units import run_units


def publish_overviews(client: Client, job: Job, levels: int) -> None:
    """Makes the coarser levels of a grid whose tiles are complete, and resumes what an earlier run began.

    Args:
        client: The Dask cluster.
        job: The grid.
        levels: Number of levels, each with half the rows and columns of the one before.
    """
    spec, source = job.spec, job.grid
    known = land_mask(spec)
    for level in range(1, levels + 1):
        spec, known = spec.coarser, np.asarray(pooled(known).any((1, 3)))
        target = store.level_url(job.grid, level)
        tiles = [tile for tile in spec.tiles() if known[tile.window].any()]
        done = store.written(target, spec, tiles)
        left = [tile for tile in tiles if tile not in done]
        run_units(client, partial(average_tile, source, target), left, label=f"overview {2**level}")
        source = target
    if levels and source in store.level_urls(job.grid):  # in grids of earlier versions they lie within the grid
        store.create_tree(job.grid, levels)


def average_tile(source: str, target: str, tile: Tile) -> None:
    """Makes one tile of a level from the cells that it covers in the level before."""
    rows, columns = (slice(2 * part.start, 2 * part.stop) for part in tile.window)
    store.write_tile(target, tile, averaged(store.open_vectors(source)[:, rows, columns]))


def averaged(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the mean of each two by two cells, (dim, rows / 2, columns / 2); NaN cells are left out."""
    parts = np.stack([pooled(part) for part in vectors])
    known = np.isfinite(parts)
    count = known.sum((2, 4))
    total = np.where(known, parts, 0).sum((2, 4), dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def pooled(cells: NDArray) -> NDArray:
    """Returns (rows, columns) as (rows / 2, 2, columns / 2, 2)."""
    rows, columns = cells.shape
    return cells.reshape(rows // 2, 2, columns // 2, 2)
