"""Samples a published grid at any points: each chunk is read once, and memory does not grow with the points.

Gives what xarray's `sel(method="nearest")` and `interp` give, but in the order of chunks: scattered points taken one by
one would read a chunk as often as it has points. Vectors wait on disk, beside the output, until their rows are written.

=============== ====================================================================================
status          meaning
=============== ====================================================================================
vector          the point has a vector
sea             the cell of the point is not land, and the grid has vectors on land alone
outside         the point is outside the grid's box, or the grid's CRS has no such place
no data         the cell of the point is land without a vector
never published the cell of the point is land, in a tile that was never published
=============== ====================================================================================
"""

import mmap
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from infra import storage
from infra.addresses import as_url, shown
from infra.errors import Refused, UserError
from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.earth.land import land_of
from tasks.grid.store import Vectors, open_spec, open_vectors
from tasks.params import Sampling
from tasks.points.output import check_output, vectors_column, whole, write_table
from tasks.tables.files import Place, Table
from tasks.tables.points import check_names, check_points, open_points, rows_of
from tasks.units import log, progress

POINTS = 50_000  # rows written at a time: 256 MB of vectors with 1,280 dimensions
TOGETHER = 1_000_000  # points that share reads of chunks: 100 MB of memory, and 5 GB of disk for 1,280 dimensions
READERS = 8  # blocks of chunks read at a time, of some MB each
STATUSES = ("vector", "sea", "outside", "no data", "never published")
VECTOR, SEA, OUTSIDE, NO_DATA, NEVER = range(len(STATUSES))

T = TypeVar("T")
R = TypeVar("R")
Float = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Grid:
    """An open grid."""

    url: str
    """URL of the grid's Zarr."""
    vectors: Vectors
    """The embeddings."""
    spec: GridSpec
    """The cells."""

    @property
    def dims(self) -> int:
        """Returns the length of a vector."""
        return self.vectors.shape[0]


@dataclass(frozen=True)
class Corners:
    """The k cells that each point needs: its nearest one, or the four around it."""

    points: Index
    """(n,) numbers of the points."""
    rows: Index
    """(n, k) rows of the cells."""
    columns: Index
    """(n, k) columns of the cells."""
    weights: NDArray[np.float32]
    """(n, k) weights of the cells."""


def sample_grid(url: str, lonlat: ArrayLike, method: Sampling = "nearest") -> NDArray[np.float32]:
    """Returns the grid's vectors at points.

    Args:
        url: URL of the grid's Zarr.
        lonlat: (n, 2) longitude and latitude in degrees, whatever the grid's CRS. Longitudes may be beyond 180.
        method: The cell that holds the point, or the weighted mean of the four cells around it that have data.

    Returns:
        (n, dim) float32, NaN where the grid has no data and outside its box.
    """
    points = np.asarray(lonlat, np.float64).reshape(-1, 2)
    grid = open_grid(url)
    found = np.empty((len(points), grid.dims), np.float32)
    for start in range(0, len(points), TOGETHER):
        part = slice(start, start + TOGETHER)
        status = sample_into(found[part], grid, points[part], method)
        found[part][status != VECTOR] = np.nan
    return found


def cells_at(url: str, lonlat: ArrayLike) -> Float:
    """Returns the centres of the cells that hold points, (n, 2) in degrees; a point outside the box as it is.

    Args:
        url: URL of the grid's Zarr.
        lonlat: (n, 2) longitude and latitude in degrees.
    """
    centres = np.array(lonlat, np.float64).reshape(-1, 2)
    spec = open_grid(url).spec
    inside, row, column = _places(spec, centres)
    cells = _corners(spec, np.flatnonzero(inside), row, column, "nearest")
    centres[inside] = spec.plane.lonlat(np.column_stack([spec.x[cells.columns[:, 0]], spec.y[cells.rows[:, 0]]]))
    return centres


def sample_into(
    found: NDArray[np.float32],
    grid: Grid,
    lonlat: Float,
    method: Sampling,
    advance: Callable[[int], None] = lambda _: None,
) -> NDArray[np.int8]:
    """Writes the vectors at points into an array, which may be on disk, and returns the status of each point.

    Args:
        found: (n, dim); rows without a vector are left as they are.
        grid: The grid.
        lonlat: (n, 2) degrees.
        method: How to sample.
        advance: Called with the number of points that were finished since the last call.
    """
    inside, row, column = _places(grid.spec, lonlat)
    corners = _corners(grid.spec, np.flatnonzero(inside), row, column, method)
    weights = np.zeros(len(lonlat), np.float32)
    advance(len(lonlat) - len(row))
    _gather(found, weights, grid.vectors, corners, advance)
    status = np.full(len(lonlat), OUTSIDE, np.int8)
    status[inside] = VECTOR
    bare = inside & (weights == 0)
    at = bare[inside]
    nearest = _corners(grid.spec, np.flatnonzero(bare), row[at], column[at], "nearest")
    status[bare] = _why_none(grid, nearest.rows[:, 0], nearest.columns[:, 0])
    return status


def _places(spec: GridSpec, points: Float) -> tuple[NDArray[np.bool_], Float, Float]:
    """Tells which points are in the grid's box, with their rows and columns; 0.0 is the centre of the first cell."""
    (rows, columns), (wide, high) = spec.shape, spec.sides
    west, _, _, north = spec.box
    x, y = np.moveaxis(spec.plane.xy(points), -1, 0)
    across, down = (x - west) % 360 if spec.plane.is_geographic else x - west, north - y
    inside = (across >= 0) & (across <= wide) & (down >= 0) & (down <= high)
    row, column = down[inside] * rows / high - 0.5, across[inside] * columns / wide - 0.5
    return inside, np.clip(row, 0, rows - 1), column if spec.closes else np.clip(column, 0, columns - 1)


def _corners(spec: GridSpec, points: Index, row: Float, column: Float, method: Sampling) -> Corners:
    rows, columns = spec.shape
    if method == "nearest":
        cells = np.rint(row).astype(int)[:, None], np.rint(column).astype(int)[:, None] % columns
        return Corners(points, *cells, np.ones((len(points), 1), np.float32))
    top, left = np.floor(row), np.floor(column)
    down, right = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    weights = np.abs(1 - down - (row - top)[:, None]) * np.abs(1 - right - (column - left)[:, None])
    cells = np.minimum(top[:, None] + down, rows - 1).astype(int), (left[:, None] + right).astype(int) % columns
    return Corners(points, *cells, weights.astype(np.float32))


def _gather(
    found: NDArray[np.float32],
    weights: NDArray[np.float32],
    vectors: Vectors,
    corners: Corners,
    advance: Callable[[int], None],
) -> None:
    """Adds up the vectors of the corners, block after block of chunks, each read once, and divides by their weight.

    Corners without data are left out. Where all corners of a point lack data, its weight stays 0.
    """
    height, width = vectors.arrays[0].chunks[1:]
    across = vectors.shape[2] // width + 1
    blocks = corners.rows // height * across + corners.columns // width
    last = blocks.max(axis=1, initial=0)  # last block that a point needs, in the order of reading
    first = [c == 0 or (blocks[:, :c] != blocks[:, c : c + 1]).all(1) for c in range(blocks.shape[1])]
    used = [np.flatnonzero(np.broadcast_to(new, len(blocks))) for new in first]  # each point once per block
    which = np.concatenate(used)
    owner = np.concatenate([blocks[rows, c] for c, rows in enumerate(used)])
    order = np.argsort(owner, kind="stable")
    groups = [g for g in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1) if len(g)]

    def read(group: Index) -> tuple[Index, int, NDArray[np.float32]]:
        block = int(owner[group[0]])
        top, left = block // across * height, block % across * width
        return which[group], block, vectors[:, top : top + height, left : left + width]

    for points, block, values in _several(read, groups):
        top, left = block // across * height, block % across * width
        for c in range(blocks.shape[1]):
            mine = points[(blocks[points, c] == block) & (corners.weights[points, c] > 0)]
            part = values[:, corners.rows[mine, c] - top, corners.columns[mine, c] - left].T
            known = ~np.isnan(part).any(axis=1)
            _add(found, weights, corners.points[mine[known]], part[known], corners.weights[mine[known], c])
        whole_now = corners.points[points[last[points] == block]]
        weighed = whole_now[weights[whole_now] > 0]
        found[weighed] /= weights[weighed, None]
        advance(len(whole_now))


def _add(
    found: NDArray[np.float32],
    weights: NDArray[np.float32],
    at: Index,
    part: NDArray[np.float32],
    share: NDArray[np.float32],
) -> None:
    former = np.where(weights[at, None] > 0, found[at], 0)
    found[at] = former + share[:, None] * part
    weights[at] += share


def _several(function: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """Yields a function's results for items, in order, with READERS calls under way at a time."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _why_none(grid: Grid, rows: Index, columns: Index) -> NDArray[np.int8]:
    """Returns the status of cells without a vector."""
    side, (most_rows, most_columns) = grid.spec.tile, grid.spec.shape
    status = np.full(len(rows), SEA, np.int8)
    tiles, which = np.unique(np.column_stack([rows, columns]) // side, axis=0, return_inverse=True)
    for number, (i, j) in enumerate(tiles.tolist()):
        mine = np.flatnonzero(which.ravel() == number)
        top, left = i * side, j * side
        tile = Tile(top, left, min(side, most_rows - top), min(side, most_columns - left))
        land = mine[land_of(grid.spec, tile)[rows[mine] - top, columns[mine] - left]]
        if len(land):
            status[land] = NO_DATA if _has_shard(grid, i, j) else NEVER
    return status


def _has_shard(grid: Grid, i: int, j: int) -> bool:
    """Tells whether a tile was published: the variable that is written last has its shard."""
    marker = grid.vectors.arrays[-1]
    try:
        return storage.exists(storage.join(grid.url, marker.basename, marker.metadata.encode_chunk_key((0, i, j))))
    except Refused:  # a bucket that may not be listed refuses what is not there; the grid itself was served
        return False


def open_grid(url: str) -> Grid:
    """Opens the grid at a path or URL.

    Raises:
        UserError: There is no grid.
    """
    try:
        return Grid(as_url(url), open_vectors(as_url(url)), open_spec(as_url(url)))
    except (FileNotFoundError, KeyError):
        raise UserError(
            f"there is no grid at {shown(url)}: give the URL of its Zarr, which ends in grid.zarr or compact.zarr"
        ) from None


def sample_file(
    points: str | Path,
    url: str,
    output: str | Path,
    method: Sampling = "nearest",
    overwrite: bool = False,
    lon: str | None = None,
    lat: str | None = None,
) -> str | Path:
    """Adds a grid's vectors to the points of a table, as a new table that appears when it is whole.

    The log tells how many points have no vector.

    Args:
        points: Path or URL of a table of points (`tasks.tables.files`).
        url: Path or URL of the grid's Zarr.
        output: Path or URL of the .parquet to write: the columns of the points, `embedding` and `status`.
        method: How to sample.
        overwrite: Whether to replace an output that exists.
        lon: Column of longitudes. None: recognised by its name.
        lat: Column of latitudes. None: recognised by its name.

    Returns:
        The output, as it was given.

    Raises:
        UserError: Anything is wrong with the input. It is found before the work begins.
    """
    check_output(output, overwrite, (".parquet",))
    grid, counts = open_grid(url), np.zeros(len(STATUSES), int)
    about = {"grid": shown(grid.url), "interpolation": method}
    with open_points(points, lon, lat) as (table, place):
        check_names(table, ("embedding", "status"))
        total = check_points(table, place)
        with whole(output) as unfinished, progress("sample the grid", total) as advance:
            write_table(unfinished, _sampled(grid, table, place, method, unfinished.parent, counts, advance), about)
    _tell(counts)
    return output


def _sampled(
    grid: Grid,
    table: Table,
    place: Place,
    method: Sampling,
    folder: Path,
    counts: NDArray[np.int_],
    advance: Callable[[int], None],
) -> Iterator[pa.Table]:
    """Yields the rows with their vectors, and adds up their statuses in `counts`."""
    rows = rows_of(table, place, POINTS)
    for _, lonlat in rows_of(table, place, max(1, TOGETHER // POINTS) * POINTS, place.columns):
        with _on_disk(folder, len(lonlat), grid.dims) as (found, release):

            def done(count: int, release: Callable[[], None] = release) -> None:
                release()
                advance(count)

            status = sample_into(found, grid, lonlat, method, done)
            counts += np.bincount(status, minlength=len(STATUSES))
            for start in range(0, len(lonlat), POINTS):
                part = slice(start, start + POINTS)
                yield _with_vectors(next(rows)[0], found[part], status[part])
                release()


def _with_vectors(rows: pa.Table, found: NDArray[np.float32], status: NDArray[np.int8]) -> pa.Table:
    vectors = np.where((status == VECTOR)[:, None], found, np.float32(np.nan))
    names = pa.array(np.array(STATUSES, object)[status], pa.string())
    return rows.append_column("embedding", vectors_column(vectors)).append_column("status", names)


@contextmanager
def _on_disk(folder: Path, count: int, dims: int) -> Iterator[tuple[NDArray[np.float32], Callable[[], None]]]:
    """Yields vectors that lie in an unnamed file, and a function that frees the memory that maps it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(count * dims * 4)
        mapped = mmap.mmap(file.fileno(), count * dims * 4)
        found = np.frombuffer(mapped, np.float32).reshape(count, dims)
        yield found, partial(mapped.madvise, mmap.MADV_DONTNEED) if hasattr(mmap, "MADV_DONTNEED") else mapped.flush


def _tell(counts: NDArray[np.int_]) -> None:
    if missing := int(counts.sum() - counts[VECTOR]):
        reasons = ", ".join(f"{n:,} {STATUSES[i]}" for i, n in enumerate(counts) if n and i != VECTOR)
        log().warning("%s of %s points have no vector: %s", f"{missing:,}", f"{counts.sum():,}", reasons)
