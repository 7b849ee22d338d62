"""Reads tables of points in blocks, after a check of every row."""

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
    """Opens a table of points, and finds the columns of their places.

    Raises:
        UserError: The table does not exist, is not readable, or has no places.
    """
    with open_table(str(points)) as table:
        yield table, find_place(table, lon, lat)


def check_names(table: Table, added: Sequence[str]) -> None:
    """Refuses a table that already has a column which the output would add."""
    if taken := set(added) & set(table.names):
        raise table.refused(f"has a column {min(taken)!r} already, which the output would add: rename it")


def check_points(table: Table, place: Place) -> int:
    """Returns the number of points, after a check of each.

    Raises:
        UserError: The table has no points, or one without a place on Earth.
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
    """Yields the rows in tables of `size`, the last perhaps smaller, with their places, (n, 2) in degrees."""
    for rows in in_tables(table.batches(columns), size):
        lonlat = lonlat_of(rows, place, table)
        yield with_degrees(rows, place, lonlat), lonlat
