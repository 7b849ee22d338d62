"""Embeddings of any list of points, from a file to a file: streamed, so that its length does not matter.

=================== ======================= ==========================================================
column              type                    meaning
=================== ======================= ==========================================================
lon, lat, ...       as they came            every column of the points (in Zarr: lon and lat)
embedding           float32, fixed length   visual part, then location part
effective_images    float32                 with evidence: exp of the entropy of the weights
largest_weight      float32                 with evidence: 1 where a single image decides
distance_km         float64                 with evidence: to the nearest image of the database
image_ids           int64, fixed length     with top_images: row ids of the images that weigh most
=================== ======================= ==========================================================
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
import zarr
from numpy.typing import ArrayLike, NDArray

from infra import storage
from infra.errors import UserError
from tasks.cards import read_card
from tasks.checkpoint import import_satclip, load_checkpoint
from tasks.core.compact import Projection
from tasks.core.evidence import evidence
from tasks.core.location import LocationEncoder
from tasks.core.retrieval import BATCH, Method, RetrievalIndex
from tasks.database import Database, import_npz, open_database
from tasks.params import EmbedParams
from tasks.units import progress

INPUTS, OUTPUTS = (".csv", ".parquet"), (".parquet", ".zarr")
CSV_BLOCK = 16 << 20  # bytes at a time; the types of the columns are guessed from the first


@dataclass(frozen=True)
class Embedder:
    """Points to columns, with everything loaded."""

    encoder: LocationEncoder
    """The location encoder."""
    index: RetrievalIndex
    """The database, perhaps projected."""
    row_ids: NDArray[np.int64]
    """Of the database's images."""
    params: EmbedParams
    """What to compute."""
    attrs: dict[str, Any]
    """Provenance, for the output."""

    def columns(self, lonlat: NDArray[np.float64]) -> dict[str, NDArray]:
        """The new columns of a batch of points."""
        params, method = self.params, _method(self.params)
        queries = self.encoder.embed(lonlat)
        visual = self.index.retrieve(queries, lonlat, method)
        found: dict[str, NDArray] = {"embedding": np.concatenate([visual, queries], axis=1)}
        if params.evidence or params.top_images:
            rests_on = evidence(self.index, queries, lonlat, method, params.top_images)
            if params.evidence:
                found["effective_images"] = rests_on.images
                found["largest_weight"] = rests_on.largest
                found["distance_km"] = rests_on.distance_km
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
        params: How; RANGE+ if unset.

    Returns:
        (n, visual + location) float32.
    """
    points = np.asarray(lonlat, np.float64).reshape(-1, 2)
    embedder = open_embedder(checkpoint, database, params, len(points))
    starts = range(0, max(1, len(points)), BATCH)
    return np.concatenate([embedder.columns(points[s : s + BATCH])["embedding"] for s in starts])


def embed_file(
    points: Path,
    checkpoint: str,
    database: str,
    output: Path,
    params: EmbedParams = EmbedParams(),
    overwrite: bool = False,
) -> Path:
    """Embeds the points of a file into another, which appears when it is whole.

    Args:
        points: A .csv or .parquet with columns lon and lat in degrees.
        checkpoint: Directory or URL of the checkpoint, or a SatCLIP `.ckpt`.
        database: Directory or URL of the database, or a `range_db_*.npz`.
        output: The .parquet or .zarr to write.
        params: How.
        overwrite: Whether an output that is there is replaced.

    Raises:
        UserError: Anything is wrong with the input; found before the work begins.
    """
    check_output(output, overwrite)
    _check_evidence(params)
    total = check_points(points)
    embedder = open_embedder(checkpoint, database, params, total)
    write = _write_parquet if output.suffix == ".parquet" else _write_zarr
    with whole(output) as partial, progress("embed", total) as advance:
        write(partial, embedder, read_points(points), total, advance)
    return output


def open_embedder(checkpoint: str, database: str, params: EmbedParams, points: int) -> Embedder:
    """Loads what embeds `points` places.

    Raises:
        UserError: One of the two is not there, or they do not belong together.
    """
    _check_device(params.device)
    with tempfile.TemporaryDirectory() as scratch:
        space = _imported(checkpoint, ".ckpt", lambda path, url: import_satclip(path, url), f"{scratch}/checkpoint")
        images = _imported(database, ".npz", lambda path, url: import_npz(path, url, space), f"{scratch}/database")
        encoder = load_checkpoint(space).location
        data = open_database(images)
        ours = read_card(space, "checkpoint")["fingerprint"]
    if data.card["checkpoint"] != ours:
        raise UserError(
            f"the database {database} was encoded with checkpoint {data.card['checkpoint']}, not with {ours}: "
            "its keys mean nothing to this encoder. Give the two that belong together"
        )
    values, compact = _compact(data, params.compact_dims)
    attrs = {
        "method": params.method,
        "beta": params.beta,
        "checkpoint": ours,
        "database": data.card["fingerprint"],
        "attribution": data.card.get("attribution", ""),
        **compact,
    }
    index = RetrievalIndex(
        data.keys, values, data.locations, queries=points, device=params.device, precision=params.precision
    )
    return Embedder(encoder, index, data.row_ids, params, attrs)


def _imported(source: str, suffix: str, read: Callable[[Path, str], Any], scratch: str) -> str:
    """URL of a product: where it is, or where a foreign file was imported to."""
    if source.endswith(suffix):
        read(Path(source), url := Path(scratch).as_uri())
        return url
    return source if "://" in source else Path(source).absolute().as_uri()


def _compact(data: Database, dims: int | None) -> tuple[NDArray[np.float32], dict[str, Any]]:
    if dims is None:
        return data.values, {}
    if dims > min(data.values.shape):
        raise UserError(f"--compact-dims {dims}: the database's values have {min(data.values.shape)} components")
    projection = Projection.fit(data.values, dims)
    return projection.apply(data.values), {"explained_variance": round(projection.explained, 6)}


def _method(params: EmbedParams) -> Method:
    return Method(params.method, params.beta, params.k)


def _check_device(device: str) -> None:
    count = torch.cuda.device_count()
    if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
        raise UserError(f"there is no {device} here: PyTorch finds {count} CUDA devices. Give --device cpu")


def check_output(output: Path, overwrite: bool) -> None:
    if output.suffix not in OUTPUTS:
        raise UserError(f"the output {output} is of no kind that can be written: name it .parquet or .zarr")
    if not output.absolute().parent.is_dir():
        raise UserError(f"there is no directory {output.absolute().parent} to write {output.name} into: make it")
    if output.exists() and not overwrite:
        raise UserError(f"{output} is there already: name another output, or give --overwrite")


def _check_evidence(params: EmbedParams) -> None:
    if params.method == "none" and (params.evidence or params.top_images):
        raise UserError("without retrieval an embedding rests on no image: drop --evidence and --top-images")


def check_points(path: Path) -> int:
    """The number of points, after one look at every one of them."""
    count = 0
    for batch in read_points(path, ["lon", "lat"]):
        _check_places(lonlat_of(batch), count, path)
        count += len(batch)
    if not count:
        raise UserError(f"{path} has no points: give one row per point")
    return count


def _check_places(lonlat: NDArray[np.float64], start: int, path: Path) -> None:
    lon, lat = lonlat.T
    wrong = ~(np.isfinite(lonlat).all(1) & (np.abs(lat) <= 90) & (lon >= -180) & (lon <= 360))
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{path} has no place in row {start + row + 1}: lon {lon[row]:g}, lat {lat[row]:g}. Give degrees, "
            "lon within -180 and 360, lat within -90 and 90"
        )


def lonlat_of(batch: pa.Table) -> NDArray[np.float64]:
    columns = [batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in ("lon", "lat")]
    return np.column_stack(columns)


def read_points(path: Path, columns: list[str] | None = None, size: int = BATCH) -> Iterator[pa.Table]:
    """The points, in batches of `size` rows; the last may have fewer.

    Raises:
        UserError: The file is not there, not readable, or lacks a column.
    """
    if path.suffix not in INPUTS:
        raise UserError(f"{path} is of no kind that can be read: give a .csv or a .parquet")
    if not path.is_file():
        raise UserError(f"there is no file {path}: give a .csv or a .parquet with columns lon and lat")
    try:
        schema, batches = _open_csv(path) if path.suffix == ".csv" else _open_parquet(path, columns)
        _check_names(path, schema.names)
        yield from _batched((batch.select(columns or schema.names) for batch in batches), size)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as a table of points ({reason}): mend the file") from error


def _open_csv(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    convert = pa.csv.ConvertOptions(column_types={"lon": pa.float64(), "lat": pa.float64()})
    reader = pa.csv.open_csv(path, pa.csv.ReadOptions(block_size=CSV_BLOCK), convert_options=convert)
    return reader.schema, iter(reader)


def _open_parquet(path: Path, columns: list[str] | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    file = pa.parquet.ParquetFile(path)
    known = [name for name in columns or [] if name in file.schema_arrow.names]
    return file.schema_arrow, file.iter_batches(BATCH, columns=known or None)


def _check_names(path: Path, names: list[str]) -> None:
    missing = [name for name in ("lon", "lat") if name not in names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r} among {', '.join(names)}: name them lon and lat")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has {names.count(twice[0])} columns {twice[0]!r}: rename all but one")
    taken = {"embedding", "effective_images", "largest_weight", "distance_km", "image_ids"} & set(names)
    if taken:
        raise UserError(f"{path} has a column {min(taken)!r} already, which the output would add: rename it")


def _batched(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows: one chunk of a Zarr array each, whatever the source's blocks are."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += len(batch)
        if rows >= size:
            table = pa.Table.from_batches(held)
            cut = rows - rows % size
            yield from (table.slice(start, size) for start in range(0, cut, size))
            held, rows = table.slice(cut).to_batches(), rows - cut
    if rows:
        yield pa.Table.from_batches(held)


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """A name to write to, which becomes `output` if nothing goes wrong, and else nothing."""
    partial = output.with_name(f".{output.name}.partial")
    _remove(partial)
    try:
        yield partial
        _remove(output)
        partial.rename(output)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_parquet(
    path: Path, embedder: Embedder, batches: Iterator[pa.Table], total: int, advance: Callable[[int], None]
) -> None:
    writer = None
    try:
        for table in batches:
            for name, array in embedder.columns(lonlat_of(table)).items():
                table = table.append_column(name, vectors_column(array))
            if writer is None:
                attrs = {b"rangegrid": json.dumps(embedder.attrs).encode()}
                schema = table.schema.with_metadata((table.schema.metadata or {}) | attrs)
                writer = pa.parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False)
            writer.write_table(table.cast(writer.schema))
            advance(len(table))
    finally:
        if writer is not None:
            writer.close()


def vectors_column(array: NDArray) -> pa.Array:
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])


def _write_zarr(
    path: Path, embedder: Embedder, batches: Iterator[pa.Table], total: int, advance: Callable[[int], None]
) -> None:
    store = storage.zarr_store(path.absolute().as_uri())
    group = zarr.create_group(store, attributes=embedder.attrs)
    start = 0
    for table in batches:
        lonlat = lonlat_of(table)
        columns = {"lon": lonlat[:, 0], "lat": lonlat[:, 1], **embedder.columns(lonlat)}
        for name, array in columns.items():
            if name not in group:
                _create(group, name, array, total)
            _array(group, name)[start : start + len(array)] = array
        start += len(table)
        advance(len(table))
    zarr.consolidate_metadata(store)


def _create(group: zarr.Group, name: str, array: NDArray, total: int) -> None:
    dims = ["point"] if array.ndim == 1 else ["point", f"{name}_dim"]
    shape, chunk = (total, *array.shape[1:]), (min(BATCH, total), *array.shape[1:])
    group.create_array(name, shape=shape, chunks=chunk, dtype=array.dtype, dimension_names=dims)


def _array(group: zarr.Group, name: str) -> zarr.Array:
    found = group[name]
    assert isinstance(found, zarr.Array)  # for the type checker: _create made it
    return found
