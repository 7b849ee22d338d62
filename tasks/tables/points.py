"""Tables of points, read in blocks after one look at every row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from tasks.tables.files import Place, Table, in_tables, open_table, settled
from tasks.tables.places import check_degrees, find_place, lonlat_of, with_degrees

Rows = Iterator[tuple[pa.Table, NDArray[np.float64]]]


@contextmanager
def open_points(points: str | Path, lon: str | None = None, lat: str | None = None) -> Iterator[tuple[Table, Place]]:
    """Opens a table of points, and finds where in it the places are.

    Raises:
        UserError: The table is not there, not readable, or lacks a place.
    """
    with open_table(str(points)) as table:
        yield table, find_place(table, lon, lat)


def check_names(table: Table, added: Sequence[str]) -> None:
    """Refuses a table with a column that the output would add."""
    if taken := set(added) & set(table.names):
        raise table.refused(f"has a column {min(taken)!r} already, which the output would add: rename it")


def check_points(table: Table, place: Place) -> int:
    """Returns the number of points, after one look at every one of them.

    Raises:
        UserError: There is none, or one that is nowhere.
    """
    count = settled(partial(_count, table, place))
    if not count:
        raise table.refused("has no points: give one row per point")
    return count


def _count(table: Table, place: Place) -> int:
    count = 0
    for batch in table.batches(None if table.is_text else place.columns):
        check_degrees(lonlat_of(batch, place, table, count), table, count)
        count += len(batch)
    return count


def rows_of(table: Table, place: Place, size: int, columns: Sequence[str] | None = None) -> Rows:
    """Yields the rows in tables of `size`, the last of perhaps fewer, and where they are, (n, 2) degrees."""
    for rows in in_tables(table.batches(columns), size):
        lonlat = lonlat_of(rows, place, table)
        yield with_degrees(rows, place, lonlat), lonlat
