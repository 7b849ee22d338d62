"""Updates the grid of a changed database from the kept sums of an earlier grid, its parent.

Only images that were added or removed are computed. An image is the same where its row id, its place, its key and its
value are (`tasks.database.same`), whatever its position. One that counts otherwise than before went with its former
weight, and came with its new one.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from tasks.cards import home_of, read_card
from tasks.core.adaptive import Report
from tasks.core.earth.grid import Tile
from tasks.core.methods import Method
from tasks.core.retrieval import RetrievalIndex
from tasks.core.sums import Selections, updated
from tasks.database.heads import projected_index
from tasks.database.same import SAME, marks
from tasks.database.store import Database, read_blocks, read_rows
from tasks.grid import store
from tasks.grid.tiles import LOADING, Job, Parent, deliver, land_cells, load, load_compact, load_encoder
from tasks.params import PublishParams
from tasks.products import DatabaseCard, GridCard, told_land
from tasks.units import log

BLOCK = 8192  # images compared at a time
NAME = ["row_id", "lon", "lat", "copy"]
CHANGES = "changes.json"
FEW = 1000  # about how many cells of a tile an update retrieves anew: too few for a spectrum


def kept_sums(card: DatabaseCard, params: PublishParams) -> dict[str, Any]:
    """Returns what sums must have in common to be updated: everything that decides them except the images."""
    return {
        "checkpoint": card.checkpoint,
        "crs": params.crs,
        "box": list(params.box),
        "step": params.step,
        "tile_cells": params.tile_cells,
        **told_land(params.land),
        **_told_heads(params.retrieval),
        "value_dim": card.value_dim,
        "compact_dims": params.compact_dims,
    }


def _told_heads(method: Method) -> dict[str, Any]:
    """Returns the heads, by the names that cards have for them."""
    if method.is_side_by_side:
        return {"heads": [str(head) for head in method.heads]}
    semantic, *geodesic = method.heads
    return {"semantic_temperature": semantic.at, "geodesic_temperature": geodesic[0].at if geodesic else None}


def read_parent(grid: str, ours: dict[str, Any]) -> Parent:
    """Returns a grid that can be updated.

    Args:
        grid: URL of the parent's Zarr.
        ours: What its sums must have in common with this grid's.

    Raises:
        UserError: There is no such grid, it kept no sums, or they are others.
    """
    card = read_card(home_of(grid), GridCard)
    theirs = card.sums
    if theirs is None:
        raise UserError(f"the grid {grid} kept no sums: publish it with --keep-sums true before it can be a parent")
    other = [f"{name} {theirs.get(name)} and not {value}" for name, value in ours.items() if theirs.get(name) != value]
    if other:
        raise UserError(
            f"the grid {grid} has {', '.join(other)}: its sums are of no use here. Publish without --parent"
        )
    if read_card(card.database, DatabaseCard).fingerprint != card.recipe.database:
        raise UserError(f"{card.database} is no longer the database of the grid {grid}: publish without --parent")
    return Parent(home_of(grid), card.database, card.fingerprint)


def write_changes(job: Job, parent: Parent, images: int) -> None:
    """Finds the images that were added and removed since the parent, and stores which.

    Raises:
        UserError: They are as many as there are: to make the grid anew is less work.
    """
    found = changes(parent.database, job.database)
    if len(found.added) + len(found.removed) >= images:
        raise UserError(
            f"of the {images} images of {job.database}, {len(found.added)} came and {len(found.removed)} went since "
            f"{parent.home}: an update is more work than a new grid. Publish without --parent"
        )
    log().info("%d images came and %d went since %s", len(found.added), len(found.removed), parent.home)
    storage.write_json(storage.join(job.home, CHANGES), asdict(found))


@dataclass(frozen=True)
class Changes:
    """The images that were added and removed."""

    added: list[int]
    """Added images: rows of the new database, rising."""
    removed: list[int]
    """Removed images: rows of the old database, rising."""


def changes(old: str, new: str) -> Changes:
    """Compares two finished databases by their URLs, streaming through both."""
    (before, then_marks), (after, now_marks) = _images(old), _images(new)
    both = before.merge(after, on=NAME)
    then, now = both["row_x"].to_numpy(), both["row_y"].to_numpy()
    same = (np.abs(then_marks[then] - now_marks[now]) <= SAME).all(1)
    return Changes(_without(after, now[same]), _without(before, then[same]))


def _without(images: pd.DataFrame, rows: NDArray[np.int64]) -> list[int]:
    return np.setdiff1d(images["row"], rows).tolist()


def _images(url: str) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Returns the identity of each image, and its marks: those of key and value, and the log of its weight."""
    names, found = zip(*map(_named, read_blocks(url, BLOCK)), strict=True)
    table = pd.concat(names, ignore_index=True)
    table["copy"] = table.groupby(NAME[:-1]).cumcount()
    return table.rename_axis("row").reset_index(), np.concatenate(found)


def _named(data: Database) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    lon, lat = data.locations.T
    names = pd.DataFrame({"row_id": data.row_ids, "lon": lon, "lat": lat})
    weights = np.ones(len(names)) if data.weights is None else data.weights
    return names, np.column_stack([marks(data.keys), marks(data.values), np.log(weights)])


def update_tile(job: Job, parent: Parent, tile: Tile) -> Report:
    """Makes one tile from the parent's sums; cells that lost nearly all their weight are retrieved anew."""
    cells = land_cells(job.spec, tile)
    places, location = cells.lonlat, load_encoder(job.checkpoint).embed(cells.lonlat)
    kept = store.read_tile(parent.sums, tile, store.SUMS)[:, cells.wanted].T
    with LOADING:
        came, went = changed_images(job, parent)
    added = came.select(location, places, job.method) if came else None
    removed = went.select(location, places, job.method) if went else None
    after, anew = updated(Selections.unpack(kept, len(job.method.heads)), added, removed)
    if anew.any():
        _, index = load(job.checkpoint, job.database, job.projected_by, FEW)
        after = after.replaced(anew, index.select(location[anew], places[anew], job.method).scaled())
    return deliver(job, tile, location, after, int(anew.sum()))


@lru_cache(maxsize=2)
def changed_images(job: Job, parent: Parent) -> tuple[RetrievalIndex | None, RetrievalIndex | None]:
    """Reads the images that were added and removed, if any, once per worker process."""
    found = Changes(**storage.read_json(storage.join(job.home, CHANGES)))
    return _index(job, job.database, found.added), _index(job, parent.database, found.removed)


def _index(job: Job, database: str, rows: list[int]) -> RetrievalIndex | None:
    """Makes the index of some images of a database; None where no rows are asked for."""
    if rows:
        return projected_index(read_rows(database, rows), load_compact(job.projected_by))
    return None
