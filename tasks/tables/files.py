"""Reads users' tables in batches: CSV, Parquet, GeoJSON, and other formats that GDAL reads.

The place of a row comes from columns or from a geometry, looked for in this order:

1. `lon` and `lat`, or other names for them in any case: longitude, lng, long, decimalLatitude, `lat (deg)`
2. the geometry of a GeoParquet or of GDAL, in any CRS; or a text column of WKT, in degrees
3. `x` and `y`

Memory does not grow with the table, except for formats that GDAL reads whole.
"""

import csv
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.csv

from infra import storage
from infra.addresses import as_url, name_of, shown
from infra.bounds import open_parquet
from infra.errors import UserError

T = TypeVar("T")

TEXT = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}  # delimiter that wins where several fit, by suffix
PARQUET = (".parquet", ".geoparquet", ".pq")
POLYGONS = "polygons"  # kind of the rows of a region
LAYERED = re.compile(r"(?i)(.+\.(?:gpkg|zip|fgb|geojson|json|shp))#([^/\\]+)")  # a layer behind its file
SHAPES = (".geojson", ".json", ".shp", ".zip", ".gpkg", ".fgb")
READABLE = ", ".join((".csv", ".tsv", ".txt", ".parquet", *SHAPES))
DELIMITERS = ",;\t|"
BATCH = 65_536  # rows of a Parquet or GDAL file read at a time
BLOCK = 16 << 20  # bytes of a CSV read at a time
HEAD = 1 << 16  # first bytes of a CSV, in which delimiter and decimal mark are recognised
COMMA, POINT = re.compile(r"\s*[-+]?\d+,\d+\s*"), re.compile(r"\s*[-+]?\d+\.\d+\s*")
CONVERSION = re.compile(r"In CSV column #(\d+): .*CSV conversion error to (\w+)", re.S)
WIDER = {"null": pa.int64(), "int64": pa.float64()}  # next wider type of a column whose first block had a narrower one
DEGREES = "OGC:CRS84"
LON, LAT = {"lon", "long", "lng", "longitude"}, {"lat", "latitude"}
NOISE = {
    "decimal",
    "deg",
    "degree",
    "degrees",
    "dd",
    "wgs84",
    "east",
    "north",
    "e",
    "n",
}  # words that units add to a name
GEOMETRIES = {"geometry", "geom", "wkt", "the_geom", "wkb_geometry"}


@dataclass(frozen=True)
class Place:
    """The columns that hold the place of a row."""

    lon: str = ""
    """Column of longitudes in degrees; empty where there is a geometry."""
    lat: str = ""
    """Column of latitudes in degrees."""
    geometry: str = ""
    """Column of WKB, of WKT, or of points as (x, y)."""
    crs: str = DEGREES
    """CRS of the geometry, as pyproj reads it."""

    @property
    def columns(self) -> list[str]:
        """Returns the names of the columns."""
        if self.geometry:
            return [self.geometry]
        return [self.lon, self.lat]


@dataclass(frozen=True)
class Table:
    """An open table."""

    source: str
    """Path or URL, as it was given."""
    kind: str
    """What the rows are, for messages, such as "points"."""
    names: tuple[str, ...]
    """Names of the columns, in order."""
    geometry: Place | None
    """Column of geometries, if the format has one."""
    read: Callable[[list[str] | None], Iterator[pa.RecordBatch]]
    """Yields some columns, or all, in batches; each call begins at the first row."""
    others: tuple["Table", ...] = ()
    """The other layers of a file that have geometries, where no layer of it is named."""

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yields the rows in batches. A column of a CSV may turn out to have a wider type: see `settled`."""
        with told(self.source, self.kind):
            yield from self.read(None if columns is None else list(dict.fromkeys(columns)))

    @property
    def is_text(self) -> bool:
        """Tells whether the types of the columns are known only after reading."""
        return _suffix(name_of(as_url(self.source))) in TEXT

    def refused(self, why: str) -> UserError:
        """Returns the error that names this table."""
        return UserError(f"{self.source} {why}")


class Widened(Exception):
    """A column of a CSV has a wider type than its first block showed. The next reading knows it."""


def settled(work: Callable[[], T]) -> T:
    """Returns the result of some work on a table, done again when a column turns out to have a wider type."""
    while True:
        try:
            return work()
        except Widened:
            continue


@contextmanager
def told(source: str, kind: str) -> Iterator[None]:
    """Turns the errors of readers into one sentence that names the table."""
    try:
        yield
    except (UserError, Widened):
        raise
    except FileNotFoundError:
        raise UserError(f"there is no table {source} (there is no file of that name): check its path or URL") from None
    except Exception as error:  # each reader has its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"{source} cannot be read as a table of {kind} ({reason}): mend the file") from error


@contextmanager
def open_table(source: str, kind: str = "points") -> Iterator[Table]:
    """Opens a table by path or URL.

    Args:
        source: A CSV (with commas, semicolons, tabs or bars; also .gz), a Parquet file, or a file that GDAL reads, of
            several layers as file.gpkg#layer.
        kind: What the rows are, for messages.

    Raises:
        UserError: The table does not exist, has an unknown format, or is damaged.
    """
    (address, layer), source = layer_of(source), shown(source)
    url = as_url(address)
    suffix = _suffix(name_of(url))
    if suffix not in (*TEXT, *PARQUET, *SHAPES):
        raise UserError(f"{source} is of no kind that can be read: give {READABLE}")
    if suffix == ".shp" and not url.startswith("file:"):
        raise UserError(f"{source} needs the files beside it: give them together, as .shp.zip")
    shapes = partial(_open_shapes, layer=layer)
    opening = {**dict.fromkeys(TEXT, _open_text), **dict.fromkeys(PARQUET, _open_parquet)}.get(suffix, shapes)
    with ExitStack() as stack:
        with told(source, kind):
            path = stack.enter_context(storage.as_file(url))
            _check_content(path, suffix, source, kind)
            table = opening(path, source, kind)
        yield table  # outside `told`: errors from here on are not the table's


def layer_of(source: str) -> tuple[str, str]:
    """Returns the address of a file, and the name of the layer that is named behind it; empty where none is."""
    found = LAYERED.fullmatch(os.fspath(source))
    return (found[1], found[2]) if found else (os.fspath(source), "")


def _check_content(path: Path, suffix: str, source: str, kind: str) -> None:
    """Refuses a file that is empty, or whose name says Parquet where its content does not, or the reverse."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise UserError(f"{source} cannot be read as a table of {kind} (it is empty): give a header and rows")
    if (start == b"PAR1") != (suffix in PARQUET):
        if start == b"PAR1":
            kinds = "is Parquet: name it .parquet"
        else:
            kinds = "is no Parquet: name it by what it is"
        raise UserError(f"{source} cannot be read as a table of {kind} (by its content it {kinds})")


def is_table(name: str) -> bool:
    """Tells by the suffix of a file's name whether it is a table."""
    return _suffix(name) in (*TEXT, *PARQUET, *SHAPES)


def _suffix(name: str) -> str:
    """Returns the suffix in lower case, leaving out .gz."""
    return Path(name.lower().removesuffix(".gz")).suffix


# CSV


class _Checked:
    """A stream of a text's bytes that refuses UTF-16 and NUL bytes."""

    closed = False

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        self.file: BinaryIO = gzip.open(path) if packed else path.open("rb")  # type: ignore[assignment]  # noqa: SIM115
        self.at = 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        if self.at == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError("it is UTF-16: save it as UTF-8")
        if (nul := data.find(b"\0")) >= 0:
            raise UserError(f"it has a NUL byte at {self.at + nul:,}: it is UTF-16 or damaged; save it as UTF-8")
        self.at += len(data)
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        """Does nothing, since nothing is written."""

    def close(self) -> None:
        self.file.close()
        self.closed = True


def _open_text(path: Path, source: str, kind: str) -> Table:
    try:
        head = _Checked(path).read(HEAD)
    except UserError as error:
        raise UserError(f"{source} cannot be read as a table of {kind} ({error})") from None
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < HEAD else "ignore")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} cannot be read as a table of {kind} (byte {error.start:,} is no UTF-8): save it as UTF-8"
        ) from None
    lines = text.splitlines()
    told_by_excel = re.fullmatch(r"sep=(.)", lines[0].strip()) if lines else None
    lines = [line for line in lines[bool(told_by_excel) :] if line.strip()]
    if not lines:
        raise UserError(f"{source} cannot be read as a table of {kind} (it is empty): give a header and rows")
    if told_by_excel:
        delimiter = told_by_excel[1]
    else:
        delimiter = _delimiter(lines[0], _suffix(path.name))
    rows = list(csv.reader(lines[:200], delimiter=delimiter))
    names = tuple(rows[0])
    options = {
        "parse_options": pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "read_options": pa.csv.ReadOptions(block_size=BLOCK, skip_rows=int(bool(told_by_excel))),
    }
    if len(lines) == 1:
        return Table(source, kind, names, None, lambda columns: iter(()))
    types: dict[str, pa.DataType] = {name: pa.string() for name in names if tells_place(name)}
    return Table(source, kind, names, None, partial(_read_text, path, options, types, _decimal(rows[1:]), source, kind))


def _delimiter(header: str, suffix: str) -> str:
    """Returns the delimiter that splits a header into the most names; of equals, the one of the suffix."""
    order = TEXT[suffix] + DELIMITERS
    return max(DELIMITERS, key=lambda mark: (len(next(csv.reader([header], delimiter=mark))), -order.index(mark)))


def _decimal(rows: list[list[str]]) -> str:
    """Returns the decimal mark: a comma where some number has one and none has a point."""
    cells = [cell for row in rows[:-1] or rows for cell in row]
    commas = any(COMMA.fullmatch(cell) for cell in cells)
    if commas and not any(POINT.fullmatch(cell) for cell in cells):
        return ","
    return "."


def _read_text(
    path: Path,
    options: dict[str, Any],
    types: dict[str, pa.DataType],
    decimal: str,
    source: str,
    kind: str,
    columns: list[str] | None,
) -> Iterator[pa.RecordBatch]:
    reader = None
    chosen = [] if columns is None else columns
    convert = pa.csv.ConvertOptions(column_types=types, decimal_point=decimal, include_columns=chosen)
    try:
        with pa.PythonFile(_Checked(path), mode="r") as stream:
            reader = pa.csv.open_csv(stream, convert_options=convert, **options)
            for batch in reader:
                _refuse_bytes(batch)
                yield batch
    except UserError as error:
        raise UserError(f"{source} cannot be read as a table of {kind} ({error})") from None
    except pa.ArrowInvalid as error:
        if not (found := CONVERSION.search(str(error))):
            raise
        name = _header(path, options)[int(found[1])]
        types[name] = WIDER.get(found[2], pa.string())
        raise Widened from None


def _header(path: Path, options: dict[str, Any]) -> list[str]:
    """Returns the names of the columns as the reader has them."""
    with pa.PythonFile(_Checked(path), mode="r") as stream:
        return pa.csv.open_csv(stream, **options).schema.names


def _refuse_bytes(batch: pa.RecordBatch) -> None:
    """Refuses a column that was read as bytes, since its text is no UTF-8."""
    for field in batch.schema:
        if pa.types.is_binary(field.type):
            raise UserError(f"the column {field.name!r} is no UTF-8: save the file as UTF-8")


# Parquet and GDAL


def _open_parquet(path: Path, source: str, kind: str) -> Table:
    file = open_parquet(path, source, path.stat().st_size, pre_buffer=False)
    schema = file.schema_arrow

    def read(columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        return file.iter_batches(BATCH, columns=columns)

    return Table(source, kind, tuple(schema.names), _geometry_of(schema, source), read)


def _geometry_of(schema: pa.Schema, source: str) -> Place | None:
    """Returns the primary geometry of a GeoParquet, or None."""
    geo = (schema.metadata or {}).get(b"geo")
    if geo is None:
        return None
    about = json.loads(geo)
    name = about["primary_column"]
    crs = about["columns"][name].get("crs", DEGREES)  # no entry means this CRS; null means unknown
    if name not in schema.names:
        raise UserError(f"{source} lacks its geometry {name!r}: write it anew, with its geometry")
    return Place(geometry=name, crs=_crs(crs, source))


def _crs(crs: Any, source: str) -> str:
    if not crs:
        raise UserError(f"{source} does not say its coordinate reference system: set it, for example EPSG:4326")
    if isinstance(crs, str):
        return crs
    return json.dumps(crs)


def _open_shapes(path: Path, source: str, kind: str, layer: str = "") -> Table:
    """Opens a layer of a file, or where none is named the first that has geometries, which knows the others."""
    import pyogrio  # here, since tables of other formats need no GDAL

    try:
        layers = {str(name): str(shape or "") for name, shape in pyogrio.list_layers(path)}
    except pyogrio.errors.DataSourceError:  # its message is about drivers, and names a copy of the file
        raise UserError(
            f"{source} cannot be read as a table of {kind} (it is no GeoJSON, nor another format of features): give "
            f"{READABLE}"
        ) from None
    if layer and layer not in layers:
        raise UserError(f"{source} has no such layer among {', '.join(layers)}: name one of them")
    spatial = [layer] if layer else [name for name, shape in layers.items() if shape]
    if not spatial or not layers[spatial[0]]:
        raise UserError(f"{source} has no geometry: give its rows as .csv or .parquet")
    if len(spatial) > 1 and kind != POLYGONS:
        raise UserError(f"{source} has the layers {', '.join(spatial)}: name one, as {source}#{spatial[0]}")
    polygonal = [name for name in spatial if "Polygon" in layers[name] or layers[name] == "Unknown"] or spatial
    first, *others = (_layer(path, name, source, kind) for name in polygonal)
    return replace(first, others=tuple(others))


def _layer(path: Path, layer: str, source: str, kind: str) -> Table:
    """Returns the table of one layer."""
    import pyogrio  # here, as above

    about = pyogrio.read_info(path, layer=layer)
    place = Place(geometry="geometry", crs=_crs(about["crs"], source))

    def read(columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        if columns is None:
            fields = None
        else:
            fields = [name for name in columns if name != "geometry"]
        options = {"columns": fields, "use_pyarrow": True, "batch_size": BATCH}
        with pyogrio.open_arrow(path, layer=layer, **options) as (meta, reader):
            own = meta["geometry_name"] or "wkb_geometry"
            schema = _as_geoparquet(reader.schema, own, str(place.crs))
            for batch in reader:
                yield pa.RecordBatch.from_arrays([_plain(column) for column in batch.columns], schema=schema)

    return Table(source, kind, (*map(str, about["fields"]), "geometry"), place, read)


def _plain(column: pa.Array) -> pa.Array:
    if isinstance(column.type, pa.ExtensionType):
        return column.storage
    return column


def _as_geoparquet(schema: pa.Schema, geometry: str, crs: str) -> pa.Schema:
    """Returns the schema with GeoParquet's metadata of the geometry, so that a copy stays a table of places."""
    from pyproj import CRS

    fields = []
    for field in schema:
        if isinstance(field.type, pa.ExtensionType):
            kind = field.type.storage_type
        else:
            kind = field.type
        fields.append(pa.field("geometry" if field.name == geometry else field.name, kind))
    column = {"encoding": "WKB", "geometry_types": [], "crs": CRS.from_user_input(crs).to_json_dict()}
    about = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": column}}
    return pa.schema(fields, metadata={"geo": json.dumps(about)})


# Places


def in_tables(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Yields the rows of batches in tables of `size` rows; the last may have fewer."""
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


def word_of(name: str) -> str:
    """Returns a column's name for comparison: in lower case, without spaces, units and words such as decimal."""
    text = re.sub(r"[(\[].*?[)\]]", " ", name.lower().replace("decimal", " "))
    words = [word for word in re.split(r"[^a-z0-9]+", text) if word]
    return "".join(word for word in words if word not in NOISE) or "".join(words)


def tells_place(name: str) -> bool:
    """Tells whether a column of this name may hold coordinates or a geometry."""
    return word_of(name) in LON | LAT | {"x", "y"} or name.strip().lower() in GEOMETRIES
