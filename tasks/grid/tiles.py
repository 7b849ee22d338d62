"""Makes one tile of a grid, the unit of publication: embeds its cells, and writes them as one shard."""

import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from infra import storage
from infra.metrics import CELLS
from tasks.cards import GRID, SUMS
from tasks.core.adaptive import Cells, Report, embed_cells
from tasks.core.compact import Compact, project
from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.earth.land import land_mask, land_of
from tasks.core.encoders.location import LocationEncoder
from tasks.core.evidence import evidence
from tasks.core.retrieval import Method, RetrievalIndex
from tasks.core.sums import Selections
from tasks.database.heads import projected_index
from tasks.database.store import open_database
from tasks.grid import store
from tasks.grid.beside import embed_beside
from tasks.model.checkpoint import load_checkpoint
from tasks.params import PublishParams

LOADING = threading.Lock()  # threads of one process share what is loaded, and do not load it twice


@dataclass(frozen=True)
class Parent:
    """A grid that another one is updated from."""

    home: str
    """URL of its directory."""
    database: str
    """URL of its database."""
    fingerprint: str
    """Fingerprint of the grid."""

    @property
    def grid(self) -> str:
        """Returns the URL of its Zarr."""
        return storage.join(self.home, GRID)

    @property
    def sums(self) -> str:
        """Returns the URL of the Zarr of its sums."""
        return storage.join(self.home, SUMS)


@dataclass(frozen=True)
class Job:
    """What every tile of one grid needs; small, so that it can travel to the workers with each unit."""

    home: str
    """URL of the product's directory."""
    checkpoint: str
    """URL of the checkpoint."""
    database: str
    """URL of the database."""
    params: PublishParams
    """Parameters of the grid, with nothing left open."""
    parent: Parent | None = None
    """The grid that this one is updated from, if any."""

    @property
    def spec(self) -> GridSpec:
        """Returns the grid's cells and tiles."""
        return store.spec_at(self.home, self.params.spec, is_cut=bool(self.params.region))

    @property
    def method(self) -> Method:
        """Returns the retrieval method."""
        return self.params.retrieval

    @property
    def grid(self) -> str:
        """Returns the URL of the grid's Zarr."""
        return storage.join(self.home, GRID)

    @property
    def sums(self) -> str:
        """Returns the URL of the Zarr of the sums that are kept."""
        return storage.join(self.home, SUMS)

    @property
    def projected_by(self) -> str | None:
        """Returns the URL of the Zarr with the projections in use, if there are any."""
        if self.params.is_compact:
            return self.grid
        return None


def load(
    checkpoint: str, database: str, projected_by: str | None = None, queries: int | None = None
) -> tuple[LocationEncoder, RetrievalIndex]:
    """Loads the encoder and the index, once per worker process.

    Args:
        checkpoint: URL of the checkpoint.
        database: URL of the database.
        projected_by: URL of the grid's Zarr with the projections; unset, values and location part are as they are.
        queries: Places that will be asked for altogether; unset, many.
    """
    with LOADING:
        return load_encoder(checkpoint), load_index(database, projected_by, queries)


@lru_cache(maxsize=2)
def load_encoder(checkpoint: str) -> LocationEncoder:
    """Loads the location encoder, once per worker process."""
    return load_checkpoint(checkpoint).location


@lru_cache(maxsize=2)
def load_index(database: str, projected_by: str | None, queries: int | None) -> RetrievalIndex:
    """Loads the whole database, once per worker process."""
    return projected_index(open_database(database), load_compact(projected_by), queries=queries)


@lru_cache(maxsize=2)
def load_compact(projected_by: str | None) -> Compact:
    """Reads a grid's projections, once per worker process."""
    return store.read_compact(projected_by) if projected_by else Compact()


def land_tiles(spec: GridSpec) -> list[Tile]:
    """Returns the tiles with a land cell, in the grid's order."""
    land = land_mask(spec)
    return [tile for tile in spec.tiles() if land[tile.window].any()]


def land_cells(spec: GridSpec, tile: Tile) -> Cells:
    """Returns the cells of a tile, with those on land marked as wanted."""
    rows, columns = tile.window
    return Cells(spec.x[columns], spec.y[rows], land_of(spec, tile), spec.plane)


def publish_tile(job: Job, tile: Tile) -> Report:
    """Embeds the land cells of one tile, writes it as one shard, and reports how it was computed."""
    encoder, index = load(job.checkpoint, job.database, job.projected_by)
    cells = land_cells(job.spec, tile)
    if job.params.evidence:
        write_evidence(job, tile, cells, encoder, index)
    if not job.params.keep_sums:
        vectors, report = embed_cells(encoder, index, cells, job.method, job.params.tolerance)
        write_vectors(job, tile, cells, vectors)
        return report
    places, location = cells.lonlat, encoder.embed(cells.lonlat)
    return deliver(job, tile, location, index.select(location, places, job.method).scaled(), len(places))


def write_evidence(job: Job, tile: Tile, cells: Cells, encoder: LocationEncoder, index: RetrievalIndex) -> None:
    """Writes the evidence of the cells, in a layer each, before their vectors, which are the completion marker."""
    found = evidence(index, encoder.embed(cells.lonlat), cells.lonlat, job.method)
    layers: dict[str, NDArray] = {
        "effective_images": found.images,
        "largest_weight": found.largest,
        "distance_km": found.distance_km,
    }
    for name, values in layers.items():
        write_cells(job.grid, tile, cells, values[:, None].astype(np.float32), name)


def deliver(job: Job, tile: Tile, queries: NDArray[np.float32], selections: Selections, evaluated: int) -> Report:
    """Writes a tile from its sums, and keeps them where asked for. The grid's shard comes last, as completion marker.

    Args:
        job: The grid.
        tile: The tile.
        queries: Location embeddings of its land cells, (m, d).
        selections: Their sums, scaled.
        evaluated: Cells that were retrieved for it.
    """
    cells = land_cells(job.spec, tile)
    if job.params.keep_sums:
        write_cells(job.sums, tile, cells, selections.pack(), store.SUMS)
    location = project(load_compact(job.projected_by).location, queries)
    write_vectors(job, tile, cells, np.concatenate([selections.visual(job.method), location], axis=1))
    return Report(len(queries), evaluated, 0, 0.0)


def write_vectors(job: Job, tile: Tile, cells: Cells, vectors: NDArray[np.float32]) -> None:
    """Writes the vectors of the wanted cells, (m, dim), and beside them those of other encoders."""
    whole = np.concatenate([vectors, embed_beside(job.params.with_, cells.lonlat)], axis=1)
    write_cells(job.grid, tile, cells, whole, store.VARIABLE)


def write_cells(url: str, tile: Tile, cells: Cells, vectors: NDArray[np.float32], variable: str) -> None:
    """Writes one shard of a variable from the vectors of the wanted cells, (m, dim); NaN elsewhere."""
    values = np.full((vectors.shape[1], tile.rows, tile.columns), np.nan, np.float32)
    values[:, cells.wanted] = vectors.T
    store.write_tile(url, tile, values[0] if variable in store.EVIDENCE else values, variable)
    if variable == store.VARIABLE:
        CELLS.inc(len(vectors))
