"""The two-resolution database: what retrieval reads.

========== ============= ======= =====================================================================
array      dims          dtype   meaning
========== ============= ======= =====================================================================
keys       image, key    float32 unit vectors in the location encoder's space
values     image, value  float32 raw features of the image encoder, as they come
locations  image, 2      float64 longitude and latitude in degrees
row_ids    image         int64   row of the patches' manifest; -1 in an imported database
========== ============= ======= =====================================================================

`database.zarr` holds the arrays, one object per `rows_per_shard` images and array; `card.json` says which
checkpoint's space the keys live in.
"""

import hashlib
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from tasks.cards import read_card, write_card

NAMES = ("keys", "values", "locations", "row_ids")
FOREIGN = ("locs", "satclip_embeddings", "image_embeddings")
UNIT_TOLERANCE = 1e-4
IMPORTED_ROWS = 1024  # per shard of an imported database, so that parts of it can be read


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
    card: dict[str, Any]
    """What it is and how it was made."""


def create_database(url: str, images: int, key: int, value: int, rows: int) -> None:
    """Writes the metadata of an empty database, unless it is there.

    Args:
        url: Directory of the database.
        images: Number of images.
        key: Length of a key.
        value: Length of a value.
        rows: Images per shard, the unit of work.
    """
    group = zarr.open_group(storage.zarr_store(storage.join(url, "database.zarr")), mode="a")
    shapes: dict[str, tuple[tuple[int, ...], str]]
    shapes = {"keys": ((images, key), "f4"), "values": ((images, value), "f4")}
    shapes |= {"locations": ((images, 2), "f8"), "row_ids": ((images,), "i8")}
    for name, (shape, dtype) in shapes.items():
        if name not in group:
            group.create_array(
                name,
                shape=shape,
                dtype=dtype,
                chunks=(min(rows, images), *shape[1:]),
                fill_value=_missing(dtype),
            )


def _missing(dtype: str) -> float | int:
    return -1 if dtype == "i8" else math.nan


def _array(url: str, name: str, mode: Any) -> zarr.Array:
    return zarr.open_array(storage.zarr_store(storage.join(url, "database.zarr", name)), mode=mode)


def write_rows(url: str, start: int, arrays: dict[str, NDArray]) -> None:
    """Writes one shard of every array, from image `start`; the keys last, as the mark that it is done.

    Raises:
        UserError: The rows are not one whole shard.
    """
    for name in reversed(NAMES):
        target = _array(url, name, "r+")
        rows, total = target.chunks[0], target.shape[0]
        stop = start + len(arrays[name])
        if start % rows or stop != min(start + rows, total):
            raise UserError(
                f"images {start} to {stop} are not one whole shard of {rows}: two workers could write "
                "the same shard. Write whole shards"
            )
        target[start:stop] = arrays[name]


def written_shards(url: str) -> set[int]:
    """Numbers of the shards that are there."""
    there = storage.names(storage.join(url, "database.zarr", "keys", "c"))
    return {int(name) for name in there if name.isdigit()}


def finish_database(url: str, **card: Any) -> dict[str, Any]:
    """Checks the whole database and writes its card; returns the card."""
    arrays = _read(url)
    check(arrays["keys"], arrays["values"], arrays["locations"], url)
    return write_card(
        url,
        "database",
        images=len(arrays["keys"]),
        key_dim=arrays["keys"].shape[1],
        value_dim=arrays["values"].shape[1],
        **card,
    )


def open_database(url: str) -> Database:
    """Reads a finished database into memory.

    Raises:
        UserError: None is there.
    """
    card = read_card(url, "database")
    return Database(**_read(url), card=card)


def read_rows(url: str, rows: slice | list[int]) -> Database:
    """Reads some images of a finished database into memory: a worker's part of a large one, or chosen rows."""
    card = read_card(url, "database")
    return Database(**{name: np.asarray(_array(url, name, "r").oindex[rows]) for name in NAMES}, card=card)


def stored_values(url: str) -> zarr.Array:
    """The values of a database, (n, v), to be read in blocks."""
    return _array(url, "values", "r")


def _read(url: str) -> dict[str, NDArray]:
    return {name: np.asarray(_array(url, name, "r")[...]) for name in NAMES}


def check(keys: NDArray, values: NDArray, locations: NDArray, source: str) -> None:
    """Refuses arrays that retrieval would silently take for good ones.

    Raises:
        UserError: Lengths differ, a value is not finite, a place is not on Earth, or a key has no direction.
    """
    if not len(keys) == len(values) == len(locations) or not len(keys):
        raise UserError(
            f"{source} has {len(locations)} places, {len(keys)} keys and {len(values)} values: every image "
            "needs one of each"
        )
    if keys.ndim != 2 or values.ndim != 2 or locations.shape[1:] != (2,):
        raise UserError(
            f"{source} has keys {keys.shape}, values {values.shape} and places {locations.shape}: all are "
            "tables with one row per image, places with longitude and latitude"
        )
    for name, array in (("places", locations), ("keys", keys), ("values", values)):
        _refuse(~np.isfinite(array).all(1), source, f"{name} that are not finite")
    _refuse(np.abs(locations[:, 1]) > 90, source, "latitudes beyond the poles; columns are (lon, lat)")
    _refuse((locations[:, 0] < -180) | (locations[:, 0] > 360), source, "longitudes outside -180 to 360")
    _refuse(np.linalg.norm(keys, axis=1) < 1e-8, source, "keys of length zero, which have no direction")


def _refuse(wrong: NDArray[np.bool_], source: str, what: str) -> None:
    if wrong.any():
        raise UserError(f"{source} has {wrong.sum()} {what} (first in row {wrong.argmax()}): mend the file")


def import_npz(path: Path, url: str, checkpoint: str) -> dict[str, Any]:
    """Imports a database in the published layout; nothing in the file is executed.

    Args:
        path: `range_db_*.npz` with `locs` (lon, lat in degrees), `satclip_embeddings`, `image_embeddings`.
        url: Directory of the new database.
        checkpoint: URL of the checkpoint whose space the keys live in.

    Returns:
        The new database's card.

    Raises:
        UserError: The file is no such database, or its numbers cannot be right.
    """
    space = read_card(checkpoint, "checkpoint")
    locations, keys, values = _load_npz(path)
    check(keys, values, locations, str(path))
    _same_dim(keys, space, path)
    _no_duplicates(locations, values, str(path))
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    create_database(url, len(keys), keys.shape[1], values.shape[1], IMPORTED_ROWS)
    rows = {"keys": keys, "values": values, "locations": locations, "row_ids": np.full(len(keys), -1)}
    for start in range(0, len(keys), IMPORTED_ROWS):
        write_rows(url, start, {name: array[start : start + IMPORTED_ROWS] for name, array in rows.items()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return finish_database(
        url,
        fingerprint=digest[:12],
        checkpoint=space["fingerprint"],
        made_of={"file": path.name, "sha256": digest},
        attribution=f"imported from {path.name}",
    )


def _load_npz(path: Path) -> list[NDArray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return [np.asarray(file[name], t) for name, t in zip(FOREIGN, ("f8", "f4", "f4"), strict=True)]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: give the path of a range_db_*.npz") from None
    except KeyError as error:
        raise UserError(f"{path} lacks an array ({error}): it needs {', '.join(FOREIGN)}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable .npz of plain numbers ({error}): give a range_db_*.npz") from error


def _same_dim(keys: NDArray, space: dict[str, Any], path: Path) -> None:
    dim = space["architecture"]["dim"]
    if keys.shape[1] != dim:
        raise UserError(
            f"{path} has keys of length {keys.shape[1]} and the checkpoint embeds to {dim}: give the "
            "checkpoint that the database was made with"
        )


def _no_duplicates(locations: NDArray, values: NDArray, source: str) -> None:
    rows = np.column_stack([locations, values]).view(f"V{8 * (2 + values.shape[1])}").ravel()
    _, first = np.unique(rows, return_index=True)
    repeated = np.ones(len(rows), bool)
    repeated[first] = False
    _refuse(repeated, source, "images that are there twice, place and value")


def export_npz(url: str, path: Path) -> None:
    """Writes a database in the published layout, which rangegeo reads."""
    data = open_database(url)
    np.savez(path, locs=data.locations, satclip_embeddings=data.keys, image_embeddings=data.values)
