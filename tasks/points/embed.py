"""Embeds the points of a table, and writes them to a file, streamed so that the length does not matter.

=================== ======================= ==========================================================
column              type                    meaning
=================== ======================= ==========================================================
lon, lat, ...       as they came            every column of the points (in Zarr: lon and lat)
embedding           float32, fixed length   visual part, then location part
effective_images    float32                 with evidence: exp of the entropy of the weights
largest_weight      float32                 with evidence: 1 where one image has all the weight
distance_km         float64                 with evidence: to the nearest image of the database
image_ids           int64, fixed length     with top_images: row ids of the images with the largest weights
=================== ======================= ==========================================================
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import zarr
from numpy.typing import ArrayLike, NDArray

from infra import storage
from infra.addresses import as_url, name_of
from infra.errors import UserError
from tasks import arrays
from tasks.cards import read_card
from tasks.core.encoders.location import LocationEncoder
from tasks.core.evidence import evidence
from tasks.core.retrieval import BATCH, RetrievalIndex
from tasks.database.heads import index_of
from tasks.database.npz import import_npz
from tasks.database.store import open_database
from tasks.model.checkpoint import load_checkpoint
from tasks.model.satclip import import_satclip
from tasks.params import EmbedParams
from tasks.points.output import check_output, vectors_column, whole, write_table
from tasks.products import CheckpointCard
from tasks.tables.points import Rows, check_names, check_points, open_points, rows_of
from tasks.units import progress

EVIDENCE = ("effective_images", "largest_weight", "distance_km")


@dataclass(frozen=True)
class PointEmbedder:
    """Everything that embeds points, loaded."""

    encoder: LocationEncoder
    """The location encoder."""
    index: RetrievalIndex
    """The database, projected where compact_dims asks for it."""
    row_ids: NDArray[np.int64]
    """Row ids of the database's images."""
    params: EmbedParams
    """What to compute."""
    attrs: dict[str, Any]
    """Provenance, for the output."""

    def embed(self, lonlat: ArrayLike) -> NDArray[np.float32]:
        """Returns the embeddings of (n, 2) places in degrees, (n, visual + location)."""
        points = np.asarray(lonlat, np.float64).reshape(-1, 2)
        starts = range(0, max(1, len(points)), BATCH)
        return np.concatenate([self.columns(points[s : s + BATCH])["embedding"] for s in starts])

    def columns(self, lonlat: NDArray[np.float64]) -> dict[str, NDArray]:
        """Returns the new columns of a batch of points, by name."""
        params, method = self.params, self.params.retrieval
        queries = self.encoder.embed(lonlat)
        visual = self.index.retrieve(queries, lonlat, method)
        found: dict[str, NDArray] = {"embedding": np.concatenate([visual, self.index.location_part(queries)], axis=1)}
        if params.evidence or params.top_images:
            rests_on = evidence(self.index, queries, lonlat, method, params.top_images)
            if params.evidence:
                found |= dict(zip(EVIDENCE, (rests_on.images, rests_on.largest, rests_on.distance_km), strict=True))
            if params.top_images:
                found["image_ids"] = self.row_ids[rests_on.rows]
        return found


def embed_points(
    lonlat: ArrayLike, checkpoint: str, database: str, params: EmbedParams = EmbedParams()
) -> NDArray[np.float32]:
    """Embeds points: `embed_points([[2.35, 48.86]], "checkpoint", "database")`.

    Args:
        lonlat: (n, 2) longitude and latitude in degrees.
        checkpoint: Directory or URL of the checkpoint, or a SatCLIP `.ckpt`.
        database: Directory or URL of the database, or a `range_db_*.npz`.
        params: How to embed; by default multi-head.

    Returns:
        (n, visual + location) float32.
    """
    points = np.asarray(lonlat, np.float64).reshape(-1, 2)
    return open_embedder(checkpoint, database, params, len(points)).embed(points)


def embed_file(
    points: str | Path,
    checkpoint: str,
    database: str,
    output: str | Path,
    params: EmbedParams = EmbedParams(),
    overwrite: bool = False,
    lon: str | None = None,
    lat: str | None = None,
) -> str | Path:
    """Embeds the points of a table into a new table, which appears when it is whole.

    Args:
        points: Path or URL of a table of points (`tasks.tables.files`).
        checkpoint: Directory or URL of the checkpoint, or a SatCLIP `.ckpt`.
        database: Directory or URL of the database, or a `range_db_*.npz`.
        output: Path or URL of the .parquet or .zarr to write.
        params: How to embed.
        overwrite: Whether to replace an output that exists.
        lon: Column of longitudes. None: recognised by its name.
        lat: Column of latitudes. None: recognised by its name.

    Returns:
        The output, as it was given.

    Raises:
        UserError: Anything is wrong with the input. It is found before the work begins.
    """
    suffix = check_output(output, overwrite)
    _check_evidence(params)
    added = ("embedding", *(EVIDENCE if params.evidence else ()), *(("image_ids",) if params.top_images else ()))
    with open_points(points, lon, lat) as (table, place):
        check_names(table, added if suffix == ".parquet" else ())
        total = check_points(table, place)
        embedder = open_embedder(checkpoint, database, params, total)
        write = _write_parquet if suffix == ".parquet" else _write_zarr
        with whole(output) as partial, progress("embed", total) as advance:
            write(partial, embedder, rows_of(table, place, BATCH), total, advance)
    return output


def open_embedder(checkpoint: str, database: str, params: EmbedParams, points: int) -> PointEmbedder:
    """Loads checkpoint and database to embed a number of points.

    Raises:
        UserError: One of the two does not exist, or they do not belong together.
    """
    _check_device(params.device)
    with tempfile.TemporaryDirectory() as scratch:
        space = _imported(checkpoint, ".ckpt", lambda path, url: import_satclip(path, url), f"{scratch}/checkpoint")
        images = _imported(database, ".npz", lambda path, url: import_npz(path, url, space), f"{scratch}/database")
        encoder = load_checkpoint(space).location
        data = open_database(images)
        ours = read_card(space, CheckpointCard).fingerprint
    if data.card.checkpoint != ours:
        raise UserError(
            f"the database {database} was encoded with checkpoint {data.card.checkpoint}, not with {ours}: "
            "its keys mean nothing to this encoder. Give the two that belong together"
        )
    options = {"queries": points, "device": params.device, "precision": params.precision}
    index, params, told = index_of(encoder, data, params, **options)
    attrs = {"checkpoint": ours, "database": data.card.fingerprint, "attribution": data.card.attribution, **told}
    return PointEmbedder(encoder, index, data.row_ids, params, attrs)


def _imported(source: str, suffix: str, read: Callable[[str, str], Any], scratch: str) -> str:
    """Returns the URL of a product, after import to `scratch` where the source is another project's file."""
    if name_of(as_url(source)).endswith(suffix):
        read(source, url := Path(scratch).as_uri())
        return url
    return as_url(source)


def _check_device(device: str) -> None:
    count = torch.cuda.device_count()
    if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
        raise UserError(f"there is no {device} here: PyTorch finds {count} CUDA devices. Give --device cpu")


def _check_evidence(params: EmbedParams) -> None:
    if params.method == "none" and (params.evidence or params.top_images):
        raise UserError("without retrieval an embedding rests on no image: drop --evidence and --top-images")


def _write_parquet(path: Path, embedder: PointEmbedder, rows: Rows, total: int, advance: Callable[[int], None]) -> None:
    def embedded() -> Iterator[pa.Table]:
        for table, lonlat in rows:
            for name, array in embedder.columns(lonlat).items():
                table = table.append_column(name, vectors_column(array))
            yield table
            advance(len(table))

    write_table(path, embedded(), embedder.attrs)


def _write_zarr(path: Path, embedder: PointEmbedder, rows: Rows, total: int, advance: Callable[[int], None]) -> None:
    store = storage.zarr_store(path.absolute().as_uri())
    group = zarr.create_group(store, attributes=embedder.attrs)
    start = 0
    for _, lonlat in rows:
        columns = {"lon": lonlat[:, 0], "lat": lonlat[:, 1], **embedder.columns(lonlat)}
        for name, array in columns.items():
            if name not in group:
                _create(group, name, array, total)
            _array(group, name)[start : start + len(array)] = array
        start += len(lonlat)
        advance(len(lonlat))
    zarr.consolidate_metadata(store)


def _create(group: zarr.Group, name: str, array: NDArray, total: int) -> None:
    dims = ["point"] if array.ndim == 1 else ["point", f"{name}_dim"]
    shape, chunk = (total, *array.shape[1:]), (min(BATCH, total), *array.shape[1:])
    about = {"dtype": array.dtype, "compressors": arrays.packed(), "dimension_names": dims}
    group.create_array(name, shape=shape, chunks=chunk, **about)


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array)  # for the type checker: _create made it
    return array
