"""Stores the two-resolution database that retrieval reads.

========== ============= ======= =====================================================================
array      dims          dtype   meaning
========== ============= ======= =====================================================================
keys       image, key    float32 unit vectors in the location encoder's space
values     image, value  float32 features of the image encoder, not normalised
locations  image, 2      float64 longitude and latitude in degrees
row_ids    image         int64   row of the patches' manifest; -1 in an imported database
weights    image         float64 how much an image counts, beside others of its database; absent, each 1
========== ============= ======= =====================================================================

`database.zarr` holds the arrays, with one object per array and shard of images. `card.json` names the checkpoint that
made the keys.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from infra import storage
from infra.bounds import EXPANSION
from infra.errors import UserError
from tasks import arrays
from tasks.cards import read_card, write_card
from tasks.core.bandwidths import Curve
from tasks.products import CheckpointCard, DatabaseCard

Measure = Callable[[arrays.Rows, arrays.Rows, NDArray, NDArray | None], list[Curve]]
CHECKED = 16_384  # images checked at a time
READ_ROWS = 1024  # rows read at a time: reading all at once takes a quarter more memory than the database
NAMES = ("keys", "values", "locations", "row_ids")
WEIGHTS = "weights"
LINEAGE = ("origins", "origin_rows", "held_by")  # of a joined database (`tasks.database.join`)
MISSING = {"f4": math.nan, "f8": math.nan, "i8": -1}  # what an array has where nothing is written
UNIT_TOLERANCE = 1e-4  # largest deviation of a key's length from 1


@dataclass(frozen=True)
class Database:
    """A database in memory."""

    keys: NDArray[np.float32]
    """(n, key) unit vectors."""
    values: NDArray[np.float32]
    """(n, value)."""
    locations: NDArray[np.float64]
    """(n, 2) longitude and latitude in degrees."""
    row_ids: NDArray[np.int64]
    """(n,) rows of the patches' manifest."""
    card: DatabaseCard
    """What the database is and how it was made."""
    weights: NDArray[np.float64] | None = None
    """(n,) how much each image counts, above 0; none where each counts 1."""


def create_database(
    url: str, images: int, key: int, value: int, rows: int, *, weighted: bool = False, joined: bool = False
) -> None:
    """Writes the metadata of an empty database, unless it exists.

    Args:
        url: Directory of the database.
        images: Number of images.
        key: Length of a key.
        value: Length of a value.
        rows: Images per shard, which is one unit of work.
        weighted: Whether images have weights.
        joined: Whether images tell of which database they were.
    """
    shapes: dict[str, tuple[tuple[int, ...], str]]
    shapes = {"keys": ((images, key), "f4"), "values": ((images, value), "f4")}
    shapes |= {"locations": ((images, 2), "f8"), "row_ids": ((images,), "i8")}
    if weighted:
        shapes[WEIGHTS] = ((images,), "f8")
    if joined:
        shapes |= dict.fromkeys(LINEAGE, ((images,), "i8"))
    for name, (shape, dtype) in shapes.items():
        chunks = (min(rows, images), *shape[1:])
        _table(url, name).create(shape, dtype=dtype, chunks=chunks, fill_value=MISSING[dtype])


def _table(url: str, name: str) -> arrays.Table:
    return arrays.Table(storage.join(url, "database.zarr", name))


def write_rows(url: str, start: int, data: dict[str, NDArray]) -> None:
    """Writes one shard of every array, from image `start`, with the keys last as completion marker.

    Raises:
        UserError: The rows are not one whole shard.
    """
    beside = [name for name in (WEIGHTS, *LINEAGE) if name in data]  # what is not here is written of all at once
    for name in reversed([*NAMES, *beside]):
        _table(url, name).write(start, data[name])


def write_weights(url: str, weights: NDArray[np.float64]) -> None:
    """Writes how much each image counts, (n,), of all images."""
    table = _table(url, WEIGHTS)
    rows = table.open().chunks[0]
    for start in range(0, len(weights), rows):
        table.write(start, weights[start : start + rows])


def written_shards(url: str) -> set[int]:
    """Returns the numbers of the shards that were written."""
    return _table(url, "keys").written()


def finish_database(url: str, measure: Measure | None = None, **told: Any) -> DatabaseCard:
    """Checks the whole database, writes its card, and returns the card.

    Args:
        url: Directory of the database.
        measure: Measures on keys, values, locations and weights how well heads restore images, for the card; None:
            nothing.
        **told: More entries of the card, `weighted` among them where images have weights.

    Raises:
        UserError: The database is not sound.
    """
    keys, values, locations = (arrays.Rows(_table(url, name).open()) for name in NAMES[:3])
    weights = read_array(url, WEIGHTS) if told.get("weighted") else None
    for start in range(0, max(1, keys.shape[0]), CHECKED):
        rows = slice(start, start + CHECKED)
        counts = None if weights is None else weights[rows]
        check(keys[rows], values[rows], locations[rows], url, counts, start)
    if measure:
        told["heads"] = [curve.told for curve in measure(keys, values, read_array(url, "locations"), weights)]
    card = DatabaseCard(images=keys.shape[0], key_dim=keys.shape[1], value_dim=values.shape[1], **told)
    write_card(url, card)
    return card


def open_database(url: str) -> Database:
    """Reads a finished database into memory.

    Raises:
        UserError: There is no database, or its metadata claims more than its stored bytes can hold.
    """
    card = _card(url)
    return Database(**_read(url, names_of(card.weighted)), card=card)


def read_rows(url: str, rows: slice | list[int]) -> Database:
    """Reads some images of a finished database into memory: a part of a large one, or chosen rows."""
    card = _card(url)
    return Database(**{name: _table(url, name).read(rows) for name in names_of(card.weighted)}, card=card)


def read_blocks(url: str, size: int) -> Iterator[Database]:
    """Yields a finished database, `size` images at a time."""
    card = _card(url)
    stored = {name: _table(url, name).open() for name in names_of(card.weighted)}
    for start in range(0, card.images, size):
        rows = slice(start, start + size)
        yield Database(**{name: arrays.read(array, rows) for name, array in stored.items()}, card=card)


def _card(url: str) -> DatabaseCard:
    """Returns the card, and refuses arrays that claim more than their objects can hold, since memory follows claims."""
    card = read_card(url, DatabaseCard)
    claimed = sum(_table(url, name).open().nbytes for name in NAMES)
    if claimed > EXPANSION * (stored := storage.size(storage.join(url, "database.zarr"))):
        raise UserError(
            f"{url} claims {claimed:,} bytes and stores {stored:,}: it is damaged or forged. Encode the patches again, "
            "or import it again"
        )
    return card


def stored_keys(url: str) -> arrays.Rows:
    """Returns the keys of a database, (n, d), to be read in blocks."""
    return arrays.Rows(_table(url, "keys").open())


def stored_values(url: str) -> arrays.Rows:
    """Returns the values of a database, (n, v), to be read in blocks."""
    return arrays.Rows(_table(url, "values").open())


def read_weights(url: str) -> NDArray[np.float64] | None:
    """Returns how much each image of a finished database counts, (n,); none where each counts 1."""
    return read_array(url, WEIGHTS) if _card(url).weighted else None


def read_array(url: str, name: str) -> NDArray:
    """Returns all of an array of a database that holds one or two numbers for each image."""
    return _whole(_table(url, name).open())


def names_of(weighted: bool = False) -> tuple[str, ...]:
    """Returns the names of a database's arrays."""
    return (*NAMES, WEIGHTS) if weighted else NAMES


def _read(url: str, names: tuple[str, ...]) -> dict[str, NDArray]:
    return {name: _whole(_table(url, name).open()) for name in names}


def _whole(array: zarr.Array) -> NDArray:
    """Reads all of an array, some whole shards at a time."""
    data, rows = np.empty(array.shape, array.dtype), max(1, READ_ROWS // array.chunks[0]) * array.chunks[0]
    for start in range(0, len(data), rows):
        data[start : start + rows] = arrays.read(array, slice(start, start + rows))
    return data


def check(
    keys: NDArray,
    values: NDArray,
    locations: NDArray,
    source: str,
    weights: NDArray | None = None,
    start: int = 0,
) -> None:
    """Refuses unsound arrays, which retrieval would use without a sign of it.

    Args:
        keys: (n, key).
        values: (n, value).
        locations: (n, 2) degrees.
        source: Where they are from, for messages.
        weights: (n,) how much each image counts; unset, 1.
        start: Number of the first row, for messages.

    Raises:
        UserError: Lengths differ, a value is not finite, a place is not on Earth, or a key has length zero.
    """
    if keys.ndim != 2 or values.ndim != 2 or locations.shape[1:] != (2,) or not keys.size or not values.size:
        raise UserError(
            f"{source} has keys {keys.shape}, values {values.shape} and places {locations.shape}: all are "
            "tables with one row per image, places with longitude and latitude"
        )
    if weights is not None and weights.shape != (len(keys),):
        raise UserError(f"{source} has weights {weights.shape} for {len(keys)} images: give one for each, or none")
    if not len(keys) == len(values) == len(locations):
        raise UserError(
            f"{source} has {len(locations)} places, {len(keys)} keys and {len(values)} values: every image "
            "needs one of each"
        )
    for name, array in (("places", locations), ("keys", keys), ("values", values)):
        refuse_rows(~np.isfinite(array).all(1), source, f"{name} that are not finite", start)
    refuse_rows(np.abs(locations[:, 1]) > 90, source, "latitudes beyond the poles; columns are (lon, lat)", start)
    refuse_rows((locations[:, 0] < -180) | (locations[:, 0] > 360), source, "longitudes outside -180 to 360", start)
    refuse_rows(np.linalg.norm(keys, axis=1) < 1e-8, source, "keys of length zero, which have no direction", start)
    if weights is not None:
        refuse_rows(~(np.isfinite(weights) & (weights > 0)), source, "weights that are not above 0", start)


def refuse_rows(wrong: NDArray[np.bool_], source: str, what: str, start: int = 0) -> None:
    """Refuses a source with any wrong row; the message has the number of wrong rows and the first."""
    if wrong.any():
        raise UserError(f"{source} has {wrong.sum()} {what} (first in row {start + wrong.argmax()}): mend the file")


def repeated(locations: NDArray, values: NDArray) -> NDArray[np.bool_]:
    """Tells which images are in an earlier row already, with the same place and value, (n,)."""
    rows = np.column_stack([locations, values]).view(f"V{8 * (2 + values.shape[1])}").ravel()
    _, first = np.unique(rows, return_index=True)
    again = np.ones(len(rows), bool)
    again[first] = False
    return again


def read_pair(checkpoint: str, database: str) -> DatabaseCard:
    """Returns the database's card, after a check that its keys were made by the checkpoint."""
    ours = read_card(checkpoint, CheckpointCard).fingerprint
    card = read_card(database, DatabaseCard)
    if card.checkpoint != ours:
        raise UserError(
            f"the database {database} was encoded with checkpoint {card.checkpoint}, not with {ours}: "
            "its keys mean nothing to this encoder. Encode the patches with this checkpoint first"
        )
    return card
