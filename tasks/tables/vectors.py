"""Reads tables of vectors at places, and finds the vector of a place.

A row has a place, as every table of points, and a vector: a column of lists of numbers, or columns that are numbered,
such as A00 to A63, v0, v1 or embedding_0. Other columns are left alone, since a table may have labels too, and a probe
must not see these.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from tasks.core.earth.sphere import EARTH_RADIUS_KM, unit_vectors
from tasks.tables.files import Table, open_table, settled
from tasks.tables.places import check_degrees, find_place, lonlat_of

WITHIN_M = 1.0  # distance in metres up to which a place is the same: rounded degrees, not another place
NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True)
class PlaceVectors:
    """Vectors at places."""

    source: str
    """Path or URL of the table."""
    lonlat: NDArray[np.float64]
    """Places, (n, 2) in degrees."""
    vectors: NDArray[np.float32]
    """Vector of each place, (n, d)."""

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(unit_vectors(self.lonlat))

    def at(self, lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
        """Returns the vector of each place, (m, d); NaN where the table has none within WITHIN_M."""
        reach = WITHIN_M / 1000 / EARTH_RADIUS_KM
        distance, row = self._tree.query(unit_vectors(lonlat), distance_upper_bound=reach)
        out = np.full((len(lonlat), self.vectors.shape[1]), np.nan, np.float32)
        there = np.isfinite(distance)
        out[there] = self.vectors[row[there]]
        return out


def read_vectors(source: str) -> PlaceVectors:
    """Reads a table of vectors at places whole.

    Args:
        source: Path or URL of a table of points, such as a Parquet file.

    Raises:
        UserError: The table cannot be read, has no vectors, places off Earth, or two vectors for one place.
    """
    with open_table(source, "vectors") as table:
        place = find_place(table)
        rows = settled(lambda: list(table.batches()))
        if not rows:
            raise table.refused("has no rows: give one for each place")
        read = pa.Table.from_batches(rows)
        lonlat = lonlat_of(read, place, table)
        check_degrees(lonlat, table)
        vectors = _vectors(read, place.columns, table)
        found = PlaceVectors(table.source, lonlat, vectors)
        _refuse_two(found, table)
        return found


def _vectors(read: pa.Table, places: Sequence[str], table: Table) -> NDArray[np.float32]:
    names = [name for name in read.column_names if name not in places]
    lists = [name for name in names if _is_list(read.schema.field(name).type)]
    floats = [name for name in lists if pa.types.is_floating(read.schema.field(name).type.value_type)]
    chosen = floats or lists
    if len(chosen) == 1:
        return _of_lists(read[chosen[0]], chosen[0], table)
    if chosen:
        raise table.refused(f"has lists of numbers in its columns {' and '.join(chosen)}: leave one of them")
    return np.column_stack([_numbers(read, name, table) for name in _numbered(read, names, table)])


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(fits(kind) for fits in lists) and _is_number(kind.value_type)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _of_lists(column: pa.ChunkedArray, name: str, table: Table) -> NDArray[np.float32]:
    """Returns a column of lists as an array, (n, d); NaN where a row has none.

    Raises:
        UserError: The lists have several lengths.
    """
    lists = column.to_numpy()
    lengths = {len(one) for one in lists if one is not None}
    if len(lengths) != 1 or 0 in lengths:
        told = ", ".join(map(str, sorted(lengths)[:3])) or "none"
        raise table.refused(f"has vectors of different lengths ({told}) in its column {name!r}: give all alike")
    out = np.full((len(lists), lengths.pop()), np.nan, np.float32)
    for i, one in enumerate(lists):
        if one is not None:
            out[i] = one
    return out


def _numbered(read: pa.Table, names: Sequence[str], table: Table) -> list[str]:
    """Returns the numbered columns of numbers, in the order of their numbers.

    Raises:
        UserError: There are none, or of several stems.
    """
    by_stem: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match and _is_number(read.schema.field(name).type):
            by_stem.setdefault(match[1], []).append((int(match[2]), name))
    if len(by_stem) == 1:
        (found,) = by_stem.values()
        return [name for _, name in sorted(found)]
    if by_stem:
        told = " and ".join(repr(f"{stem}…") for stem in sorted(by_stem))
        raise table.refused(f"has numbered columns of several names, {told}: leave those of one vector")
    raise table.refused(
        f"has no vectors among its columns {', '.join(table.names)}: give a column of lists, or numbered columns v0, v1"
    )


def _numbers(read: pa.Table, name: str, table: Table) -> NDArray[np.float32]:
    return read[name].cast(pa.float64(), safe=False).to_numpy().astype(np.float32)


def _refuse_two(found: PlaceVectors, table: Table) -> None:
    """Refuses two vectors that differ at one place, since no row says which is meant."""
    _, first, which = np.unique(found.lonlat, axis=0, return_index=True, return_inverse=True)
    differ = ~np.isclose(found.vectors, found.vectors[first[which.ravel()]], equal_nan=True).all(1)
    if differ.any():
        lon, lat = found.lonlat[differ.argmax()]
        raise table.refused(f"has two vectors at lon {lon:g}, lat {lat:g}: leave one for each place")
