"""Reads dumps of millions of items, stac-geoparquet too large to be held: only the parts that a search needs.

Row groups whose statistics of `bbox` and of the times tell that they hold nothing of a search are passed over. Of the
others boxes and times are read first (and kept, 32 bytes a row), and only then, where a row fits, whole rows, some
at a time. So memory is bounded by a row group's own, whatever the number of items; and what a search costs depends on
how the file is ordered: by place is best, by time serves short windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from cachetools import LRUCache, cached
from cachetools.keys import hashkey
from numpy.typing import NDArray

from infra import storage
from infra.addresses import name_of
from infra.bounds import check_size, check_texts
from infra.errors import UserError
from infra.intervals import Interval
from infra.stac.partial import PartialFile
from infra.stac.rows import feature_of, shapes_of

ROWS = 2048  # rows made whole at a time
KEPT = 128 << 20  # bytes of boxes and times that are kept, of 32 a row
CORNERS = ("xmin", "ymin", "xmax", "ymax")
BEGINS, ENDS = ("start_datetime", "datetime"), ("end_datetime", "datetime")
NEVER, ALWAYS = -(1 << 62), 1 << 62  # in microseconds, for what tells no time
ROOM = 1e-4  # degrees around a box, since boxes are kept in half the precision


@dataclass(frozen=True)
class Brief:
    """What is known of each row before it is read whole."""

    box: NDArray[np.float32]
    """(n, 4): west, south, east, north; NaN where it is not told."""
    begin: NDArray[np.int64]
    """First moment, in microseconds since 1970."""
    end: NDArray[np.int64]
    """Last moment."""

    @property
    def bytes(self) -> int:
        """Returns the memory that it takes."""
        return self.box.nbytes + self.begin.nbytes + self.end.nbytes


@dataclass(frozen=True)
class Dump:
    """A large file, opened."""

    url: str
    """URL of the file."""
    size: int
    """Its bytes."""
    about: pq.FileMetaData
    """Its footer."""
    version: str
    """Changes when the file does."""

    @property
    def collections(self) -> list[str]:
        """Returns the collections of its items; empty where it tells of none."""
        if "collection" not in self.about.schema.to_arrow_schema().names:
            return []
        told = {name for group in range(self.about.num_row_groups) for name in self._collections(group)}
        return sorted(told)

    def _collections(self, group: int) -> list[str]:
        known = _statistics(self.about, group).get("collection")
        if known is not None and known.has_min_max and known.min == known.max and known.null_count == 0:
            return [str(known.min)]
        column = self._open(group).read_row_group(group, columns=["collection"])["collection"]
        return [str(name or "") for name in pc.unique(column).to_pylist()]

    def near(self, lonlat: NDArray[np.float64], window: Interval) -> list[Any]:
        """Returns the features whose boxes hold any of the points, and those of unclear boxes, which meet a window."""
        span = _moments(window)
        return [
            feature
            for group in range(self.about.num_row_groups)
            if _may_hold(_statistics(self.about, group), lonlat, span)
            for feature in self._found(group, lonlat, span)
        ]

    def _found(self, group: int, lonlat: NDArray[np.float64], span: tuple[int, int]) -> Iterator[Any]:
        """Yields the features of a row group."""
        brief = _brief(self, group)
        keep = _holding(brief.box.T, lonlat) & (brief.begin <= span[1]) & (brief.end >= span[0])
        if not keep.any():
            return
        start = 0
        for batch in self._open(group).iter_batches(ROWS, row_groups=[group]):
            wanted = keep[start : start + len(batch)]
            start += len(batch)
            if wanted.any():
                table = pa.Table.from_batches([batch.filter(pa.array(wanted))])
                rows = table.drop_columns(["geometry"]).to_pylist(maps_as_pydicts="lossy")
                yield from (feature_of(row, shape) for row, shape in zip(rows, shapes_of(table), strict=True))

    def brief(self, group: int) -> Brief:
        """Reads boxes and times of a row group."""
        file, names = self._open(group), self.about.schema.to_arrow_schema().names
        times = [name for name in {*BEGINS, *ENDS} if name in names]
        told = file.read_row_group(group, columns=times or ["geometry"])
        boxes = self._boxes(file, group)
        return Brief(boxes, _coalesced(told, BEGINS, NEVER), _coalesced(told, ENDS, ALWAYS))

    def _boxes(self, file: pq.ParquetFile, group: int) -> NDArray[np.float32]:
        """Returns the boxes of a row group; by the geometries where there is no column of them."""
        leaves = [f"bbox.{corner}" for corner in CORNERS]
        paths = {self.about.schema.column(i).path for i in range(self.about.num_columns)}
        if set(leaves) <= paths:
            column = file.read_row_group(group, columns=leaves)["bbox"].combine_chunks()
            corners = [pc.struct_field(column, corner).to_numpy(zero_copy_only=False) for corner in CORNERS]
            return np.column_stack(corners).astype(np.float32)
        batches = file.iter_batches(ROWS, row_groups=[group], columns=["geometry"])
        shapes = [shapely.bounds(shapes_of(pa.Table.from_batches([batch]))) for batch in batches]
        return np.concatenate(shapes).reshape(-1, 4).astype(np.float32)

    def _open(self, group: int) -> pq.ParquetFile:
        """Opens the file to read a row group, after a check that its texts fit what is stored."""
        check_texts(_source(self.url, self.size), self.about, group, name_of(self.url), self.size)
        return pq.ParquetFile(
            _source(self.url, self.size), metadata=self.about, page_checksum_verification=True, pre_buffer=True
        )


def open_dump(url: str, size: int, version: str) -> Dump:
    """Opens a large file by its footer.

    Raises:
        UserError: It is no such file, or claims to hold out of proportion to its size.
    """
    about = pq.ParquetFile(_source(url, size)).metadata
    check_size(about, name_of(url), size)
    if "geometry" not in about.schema.to_arrow_schema().names:
        raise UserError("it has no column `geometry`")
    return Dump(url, size, about, version)


def _source(url: str, size: int) -> Any:
    """Returns what Parquet reads from: a path of this machine, else ranges of the object."""
    if url.startswith("file:"):
        with storage.as_file(url) as path:
            return path
    return PartialFile(url, size)


_kept: LRUCache[Any, Brief] = LRUCache(KEPT, getsizeof=lambda brief: brief.bytes)


@cached(_kept, lambda dump, group: hashkey(dump.url, dump.version, group), lock=Lock())
def _brief(dump: Dump, group: int) -> Brief:
    return dump.brief(group)


def _statistics(about: pq.FileMetaData, group: int) -> dict[str, Any]:
    """Returns the statistics of the columns of a row group that a search asks, by path; None where there are none."""
    asked = {*(f"bbox.{corner}" for corner in CORNERS), *BEGINS, *ENDS, "collection"}
    columns = [about.row_group(group).column(i) for i in range(about.num_columns)]
    return {column.path_in_schema: column.statistics for column in columns if column.path_in_schema in asked}


def _may_hold(told: dict[str, Any], lonlat: NDArray[np.float64], span: tuple[int, int]) -> bool:
    """Tells whether a row group may hold items of a search, by its statistics; where they do not tell, it may."""
    begin, end = _bound(told, BEGINS, "min", NEVER), _bound(told, ENDS, "max", ALWAYS)
    if begin > span[1] or end < span[0]:
        return False
    boxes = [told[name] for corner in CORNERS if (name := f"bbox.{corner}") in told]
    certain = [box for box in boxes if box is not None and box.has_min_max and box.has_null_count]
    if len(certain) < len(CORNERS) or any(box.null_count for box in certain):
        return True
    west, south, east, north = certain
    rim = np.array([[west.min], [south.min], [east.max], [north.max]], np.float32)
    if west.max - east.min > 180:  # a box may lie across 180 degrees
        rim[:3:2] = [[-180], [180]]
    return bool(_holding(rim, lonlat).any())


def _bound(told: dict[str, Any], names: tuple[str, ...], which: str, unknown: int) -> int:
    """Returns the first begin or the last end of a row group's items."""
    known = [column for name in names if (column := told.get(name)) is not None]
    if not any(column.has_null_count and column.null_count == 0 for column in known):
        return unknown
    bounds = [_micro(getattr(column, which)) if column.has_min_max else None for column in known]
    certain = [bound for bound in bounds if bound is not None]
    if not certain or len(certain) < len([column for column in known if column.num_values]):
        return unknown
    return min(certain) if which == "min" else max(certain)


def _micro(moment: Any) -> int | None:
    """Returns a time in microseconds since 1970; a time without a zone is in UTC, and a text tells none."""
    if not isinstance(moment, datetime):
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)


def _moments(window: Interval) -> tuple[int, int]:
    """Returns the ends of a window in microseconds since 1970."""
    begin, end = _micro(window.start), _micro(window.end)
    return NEVER if begin is None else begin, ALWAYS if end is None else end + 1


def _coalesced(told: pa.Table, names: tuple[str, ...], unknown: int) -> NDArray[np.int64]:
    """Returns the first of some columns of times that tells one, in microseconds since 1970."""
    times = [told[name] for name in names if name in told.column_names]
    known = [
        time.cast(pa.timestamp("us", time.type.tz), safe=False).cast(pa.int64())
        for time in times
        if pa.types.is_timestamp(time.type)
    ]
    return pc.coalesce(*known, pa.scalar(unknown, pa.int64())).to_numpy() if known else np.full(len(told), unknown)


def _holding(corners: NDArray[np.float32], lonlat: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tells which boxes may hold any of the points: west, south, east, north; those that are not told may.

    A box that lies across 180 degrees, is wider than half the Earth, or is written with longitudes beyond 180, is told
    by its latitudes alone.
    """
    west, south, east, north = corners
    round_ = ~((east >= west) & (east - west <= 180) & (west >= -180) & (east <= 180))
    found = np.asarray(np.isnan(corners).any(0))
    for lon, lat in lonlat:
        across = round_ | ((west - ROOM <= lon) & (lon <= east + ROOM))
        found |= across & (south - ROOM <= lat) & (lat <= north + ROOM)
    return found
