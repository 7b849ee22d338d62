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
from tasks.core.grid import GridSpec
from tasks.grids import Vectors, open_spec, open_vectors
from tasks.params import Sampling
from tasks.points import check_output, check_points, lonlat_of, read_points, vectors_column, whole
from tasks.units import progress

POINTS = 50_000  # at a time: 1,280 dimensions of them take 256 MB

Float = NDArray[np.float64]


def sample_grid(url: str, lonlat: ArrayLike, method: Sampling = "nearest") -> NDArray[np.float32]:
    """The grid's vectors at points.

    Args:
        url: URL of the grid's Zarr.
        lonlat: (n, 2) longitude and latitude in degrees, whatever the grid's CRS; any longitude, a turn or more on.
        method: The cell that holds the point, or the weighted mean of the four cells around it: NaN where one of
            these that counts has no data.

    Returns:
        (n, dim) float32, NaN where the grid has no data, and outside of its box.
    """
    points = np.asarray(lonlat, np.float64).reshape(-1, 2)
    vectors, spec = open_vectors(url), open_spec(url)
    inside, row, column = _places(spec, points)
    found = np.full((len(points), vectors.shape[0]), np.nan, np.float32)
    if method == "nearest":
        found[inside] = _gather(vectors, np.rint(row).astype(int), np.rint(column).astype(int) % spec.shape[1])
        return found
    total = np.zeros((len(row), vectors.shape[0]), np.float32)
    for rows, columns, weights in _around(spec, row, column):
        counts = weights > 0
        total[counts] += weights[counts, None] * _gather(vectors, rows[counts], columns[counts])
    found[inside] = total
    return found


def _places(spec: GridSpec, points: Float) -> tuple[NDArray[np.bool_], Float, Float]:
    """Which points are in the grid's box, and rows and columns of those as numbers: 0 is the middle of a first cell."""
    (rows, columns), (wide, high) = spec.shape, spec.sides
    west, _, _, north = spec.box
    x, y = np.moveaxis(spec.plane.xy(points), -1, 0)
    across, down = (x - west) % 360 if spec.plane.is_geographic else x - west, north - y
    inside = (across >= 0) & (across <= wide) & (down >= 0) & (down <= high)
    row, column = down[inside] * rows / high - 0.5, across[inside] * columns / wide - 0.5
    return inside, np.clip(row, 0, rows - 1), column if spec.closes else np.clip(column, 0, columns - 1)


def _around(spec: GridSpec, row: Float, column: Float) -> Iterator[tuple[NDArray, NDArray, NDArray[np.float32]]]:
    """Rows, columns and weights of the four cells around each point, one corner after the other."""
    top, left = np.floor(row), np.floor(column)
    for down in (0, 1):
        for right in (0, 1):
            weights = np.abs(1 - down - (row - top)) * np.abs(1 - right - (column - left))
            rows = np.minimum(top + down, spec.shape[0] - 1).astype(int)
            yield rows, (left + right).astype(int) % spec.shape[1], weights.astype(np.float32)


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
