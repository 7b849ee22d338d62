"""Vectors of a published grid at any points: whole chunks are read, each once, and memory does not grow with them.

The same as xarray's `sel(method="nearest")` and `interp`, but ordered by chunk: scattered points asked one by one
would read a chunk as often as there are points in it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import ArrayLike, NDArray

from infra.errors import UserError
from tasks.grids import Vectors, open_vectors
from tasks.params import Sampling
from tasks.points import check_output, check_points, lonlat_of, read_points, vectors_column, whole
from tasks.units import progress

POINTS = 50_000  # at a time: 1,280 dimensions of them take 256 MB

Float = NDArray[np.float64]


def sample_grid(url: str, lonlat: ArrayLike, method: Sampling = "nearest") -> NDArray[np.float32]:
    """The grid's vectors at points.

    Args:
        url: URL of the grid's Zarr.
        lonlat: (n, 2) longitude and latitude in degrees; any longitude, since the grid closes at 180 degrees.
        method: The cell that holds the point, or the weighted mean of the four cells around it: NaN where one of
            these that counts has no data.

    Returns:
        (n, dim) float32, NaN where the grid has no data.
    """
    points = np.asarray(lonlat, np.float64).reshape(-1, 2)
    vectors = open_vectors(url)
    if method == "nearest":
        return _gather(vectors, *_holding(vectors, points))
    found = np.zeros((len(points), vectors.shape[0]), np.float32)
    for rows, columns, weights in _around(vectors, points):
        counts = weights > 0
        found[counts] += weights[counts, None] * _gather(vectors, rows[counts], columns[counts])
    return found


def _places(vectors: Vectors, points: Float) -> tuple[Float, Float]:
    """Rows and columns as numbers: 0 is the middle of the first cell."""
    _, height, width = vectors.shape
    row = (90 - points[:, 1]) * height / 180 - 0.5
    column = (points[:, 0] + 180) % 360 * width / 360 - 0.5
    return np.clip(row, 0, height - 1), column


def _holding(vectors: Vectors, points: Float) -> tuple[NDArray, NDArray]:
    row, column = _places(vectors, points)
    return np.rint(row).astype(int), np.rint(column).astype(int) % vectors.shape[2]


def _around(vectors: Vectors, points: Float) -> Iterator[tuple[NDArray, NDArray, NDArray[np.float32]]]:
    """Rows, columns and weights of the four cells around each point, one corner after the other."""
    row, column = _places(vectors, points)
    top, left = np.floor(row), np.floor(column)
    for down in (0, 1):
        for right in (0, 1):
            weights = np.abs(1 - down - (row - top)) * np.abs(1 - right - (column - left))
            rows = np.minimum(top + down, vectors.shape[1] - 1).astype(int)
            yield rows, (left + right).astype(int) % vectors.shape[2], weights.astype(np.float32)


def _gather(vectors: Vectors, rows: NDArray, columns: NDArray) -> NDArray[np.float32]:
    """The vectors of cells, (n, dim), reading each block of chunks once."""
    height, width = vectors.arrays[0].chunks[1:]
    found = np.empty((len(rows), vectors.shape[0]), np.float32)
    blocks = rows // height * (vectors.shape[2] // width + 1) + columns // width
    order = np.argsort(blocks, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1):
        if len(group):
            top, left = rows[group[0]] // height * height, columns[group[0]] // width * width
            block = vectors[:, top : top + height, left : left + width]
            found[group] = block[:, rows[group] - top, columns[group] - left].T
    return found


def check_grid(url: str) -> None:
    """Refuses a URL at which there is no grid.

    Raises:
        UserError: There is none.
    """
    try:
        open_vectors(url)
    except (FileNotFoundError, KeyError):
        raise UserError(f"there is no grid at {url}: give the URL of its Zarr, which ends in grid.zarr") from None


def sample_file(points: Path, url: str, output: Path, method: Sampling = "nearest", overwrite: bool = False) -> Path:
    """Adds a grid's vectors to the points of a file, which appears when it is whole.

    Args:
        points: A .csv or .parquet with columns lon and lat in degrees.
        url: URL of the grid's Zarr.
        output: The .parquet to write: the columns of the points, and `embedding`.
        method: How to sample.
        overwrite: Whether an output that is there is replaced.

    Raises:
        UserError: Anything is wrong with the input; found before the work begins.
    """
    if output.suffix != ".parquet":
        raise UserError(f"the output {output} is of no kind that can be written: name it .parquet")
    check_output(output, overwrite)
    check_grid(url)
    total = check_points(points)
    with whole(output) as partial, progress("sample the grid", total) as advance:
        writer = None
        for table in read_points(points, size=POINTS):
            vectors = sample_grid(url, lonlat_of(table), method)
            table = table.append_column("embedding", vectors_column(vectors))
            writer = writer or pa.parquet.ParquetWriter(partial, table.schema, compression="zstd", use_dictionary=False)
            writer.write_table(table)
            advance(len(table))
        assert writer is not None  # for the type checker: there is a point at least
        writer.close()
    return output
