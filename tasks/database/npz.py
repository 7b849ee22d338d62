"""Imports and exports databases in their published layout, one `.npz`. Nothing in a file is executed."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.addresses import as_url, name_of, shown
from infra.errors import UserError
from tasks.cards import made_before, read_card
from tasks.database.store import (
    WEIGHTS,
    check,
    create_database,
    finish_database,
    open_database,
    repeated,
    write_rows,
)
from tasks.foreign import check_free, read_file, write_file
from tasks.products import CheckpointCard, DatabaseCard
from tasks.units import log

FOREIGN = ("locs", "satclip_embeddings", "image_embeddings")
IMPORTED_ROWS = 1024  # images per shard of an imported database, so that parts of it can be read


def import_npz(source: str | Path, url: str, checkpoint: str) -> DatabaseCard:
    """Imports a database in the published layout. Nothing in the file is executed.

    Args:
        source: Path or URL of a `range_db_*.npz` with `locs` (lon, lat in degrees), `satclip_embeddings`,
            `image_embeddings`.
        url: Directory of the new database.
        checkpoint: URL of the checkpoint that made the keys.

    Returns:
        The new database's card, or that of an earlier import of the same file.

    Raises:
        UserError: The file is no such database or has unsound numbers, or another product is at `url`.
    """
    space, data = read_card(checkpoint, CheckpointCard), read_file(source, "a range_db_*.npz")
    name, digest = name_of(as_url(source)), hashlib.sha256(data).hexdigest()
    made_of = {"file": name, "sha256": digest, "checkpoint": space.fingerprint}
    if there := made_before(url, DatabaseCard, made_of):
        return there
    locations, keys, values, weights = _load_npz(data, source)
    check(keys, values, locations, str(source), weights)
    _same_dim(keys, space, source)
    if twice := int(repeated(locations, values).sum()):
        log().warning("%s has %d images twice, place and value: each counts as often as it is there", source, twice)
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    weighted = weights is not None
    told: dict[str, Any] = {"weighted": True} if weighted else {}
    create_database(url, len(keys), keys.shape[1], values.shape[1], IMPORTED_ROWS, weighted=weighted)
    rows = {"keys": keys, "values": values, "locations": locations, "row_ids": np.full(len(keys), -1)}
    if weighted:
        rows[WEIGHTS] = weights
    for start in range(0, len(keys), IMPORTED_ROWS):
        write_rows(url, start, {name: array[start : start + IMPORTED_ROWS] for name, array in rows.items()})
    return finish_database(
        url,
        fingerprint=digest[:12],
        checkpoint=space.fingerprint,
        made_of=made_of,
        attribution=f"imported from {name}",
        **told,
    )


def _load_npz(data: bytes, source: str | Path) -> tuple[NDArray, NDArray, NDArray, NDArray | None]:
    """Returns places, keys and values, and how much each image counts, where the file tells it."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            places, keys, values = (_numbers(file[n], t) for n, t in zip(FOREIGN, ("f8", "f4", "f4"), strict=True))
            return places, keys, values, _numbers(file[WEIGHTS], "f8") if WEIGHTS in file else None
    except KeyError as error:
        raise UserError(f"{shown(source)} lacks an array ({error}): it needs {', '.join(FOREIGN)}") from None
    except Exception as error:  # a hostile file may fail in any way
        raise UserError(
            f"{shown(source)} is no readable .npz of plain numbers ({error}): give a range_db_*.npz"
        ) from error


def _numbers(array: NDArray, dtype: str) -> NDArray:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"an array has the type {array.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as not finite
        return array.astype(dtype)


def _same_dim(keys: NDArray, space: CheckpointCard, path: str | Path) -> None:
    dim = space.architecture.dim
    if keys.shape[1] != dim:
        raise UserError(
            f"{shown(path)} has keys of length {keys.shape[1]} and the checkpoint embeds to {dim}: give the "
            "checkpoint that the database was made with"
        )


def export_npz(url: str, target: str | Path, overwrite: bool = False) -> str:
    """Writes a database in the published layout, which rangegeo reads; beside it `weights`, where images have any.

    Args:
        url: The database.
        target: Path or URL of the file to write.
        overwrite: Whether to replace a file that exists.

    Returns:
        The file's URL.
    """
    check_free(target, overwrite)
    data, buffer = open_database(url), io.BytesIO()
    beside: dict[str, Any] = {} if data.weights is None else {"weights": data.weights}
    np.savez(buffer, locs=data.locations, satclip_embeddings=data.keys, image_embeddings=data.values, **beside)
    return write_file(target, buffer.getvalue(), overwrite)
