"""Finds the places of a table's rows by the names of its columns, reads them as degrees, and checks them."""

import re
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from infra.errors import UserError
from tasks.tables.files import COMMA, DEGREES, GEOMETRIES, LAT, LON, POINT, Place, Table, word_of

NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)


def find_place(table: Table, lon: str | None = None, lat: str | None = None) -> Place:
    """Returns the columns that hold the place of a row.

    Args:
        table: The table.
        lon: Column of longitudes. None: recognised by its name.
        lat: Column of latitudes. None: recognised by its name.

    Raises:
        UserError: No column fits, or several do.
    """
    _refuse_twice(table)
    if lon and lat:
        return Place(_there(table, lon), _there(table, lat))
    if lon or lat or {"lon", "lat"} <= set(table.names) or not _geometry(table):
        wide = _has(table, LON) or bool(lon) or _has(table, LAT) or bool(lat)
        lons, lats = (LON, LAT) if wide else ({"x"}, {"y"})
        return Place(_column(table, lon, "lon", lons), _column(table, lat, "lat", lats))
    if _has(table, LON) and _has(table, LAT):
        return Place(_one(table, "lon", LON), _one(table, "lat", LAT))
    return _geometry(table) or Place()


def _refuse_twice(table: Table) -> None:
    twice = [name for name in table.names if table.names.count(name) > 1]
    if twice:
        name = repr(twice[0]) if twice[0].strip() else "without a name"
        raise table.refused(f"has {table.names.count(twice[0])} columns {name}: rename all but one")


def _column(table: Table, named: str | None, short: str, words: set[str]) -> str:
    """Returns the column that was named, else the one whose name is one of the words."""
    if named:
        return _there(table, named)
    return _one(table, short, words)


def _there(table: Table, column: str) -> str:
    if column not in table.names:
        raise table.refused(f"has no column {column!r} among {', '.join(table.names)}: name one of them")
    return column


def _has(table: Table, words: set[str]) -> bool:
    return any(word_of(name) in words for name in table.names)


def _geometry(table: Table) -> Place | None:
    if table.geometry:
        return table.geometry
    found = [name for name in table.names if name.strip().lower() in GEOMETRIES]
    if len(found) == 1:
        return Place(geometry=found[0])
    return None


def _one(table: Table, short: str, words: set[str]) -> str:
    """Returns the one column whose name is among some words; the `short` name, as in our own tables, wins."""
    found = [name for name in table.names if word_of(name) in words]
    if short in found:
        return short
    if len(found) == 1:
        return found[0]
    if found:
        raise table.refused(f"has columns {' and '.join(found)} for its coordinates: name one with --{short}")
    numbers = any(POINT.fullmatch(name) or COMMA.fullmatch(name) for name in table.names)
    if numbers:
        remedy = "give it a header"
    else:
        remedy = f"rename one, or name one with --{short}"
    raise table.refused(f"has no column {short!r} among {', '.join(table.names)}: {remedy}")


def lonlat_of(batch: pa.RecordBatch | pa.Table, place: Place, table: Table, start: int = 0) -> NDArray[np.float64]:
    """Returns the places of rows, (n, 2) in degrees; NaN where a row has none.

    Args:
        batch: Rows, with the columns of `place`.
        place: The columns that hold the places.
        table: The table of the rows, for messages.
        start: Number of rows of the table before these.

    Raises:
        UserError: A value is no number, or a geometry is no point.
    """
    if place.geometry:
        return _points(shapes_of(batch[place.geometry], place, table), table, start)
    return np.column_stack([_numbers(batch[name], name, table, start) for name in place.columns])


def _numbers(column: Any, name: str, table: Table, start: int) -> NDArray[np.float64]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = _parsed(column, name, table, start)
    elif not any(fits(kind) for fits in NUMBERS):
        raise table.refused(f"has {kind} in its column {name!r}: give numbers, in degrees")
    return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def _parsed(column: Any, name: str, table: Table, start: int) -> Any:
    """Returns texts as numbers, with a decimal comma or point; empty texts, and words such as NaN, are null."""
    text = pc.replace_substring(pc.utf8_trim_whitespace(column), ",", ".")
    none = pc.is_in(pc.utf8_lower(text), pa.array(["", "na", "n/a", "#n/a", "nan", "null", "none", "-"], text.type))
    text = pc.if_else(none, None, text)
    try:
        return text.cast(pa.float64())
    except pa.ArrowInvalid:
        row, value = next((i, v) for i, v in enumerate(text.to_pylist()) if v is not None and not _is_number(v))
        raise UserError(
            f"{table.source} cannot be read as a table of {table.kind} (row {start + row + 1}: {name} {value!r} is no "
            "number): give decimal degrees"
        ) from None


def _is_number(text: str) -> bool:
    try:
        return pa.array([text]).cast(pa.float64()) is not None
    except pa.ArrowInvalid:
        return False


def shapes_of(column: Any, place: Place, table: Table) -> NDArray[np.object_]:
    """Returns shapely geometries in degrees; None where a row has none.

    Raises:
        UserError: The column holds no geometries.
    """
    import shapely

    kind = column.type
    if pa.types.is_struct(kind):
        x, y = (np.asarray(pc.struct_field(column, part).to_numpy(zero_copy_only=False), "f8") for part in ("x", "y"))
        found = shapely.points(x, y)
        found[~(np.isfinite(x) & np.isfinite(y))] = None
    else:
        try:
            found = _shapes(column.to_numpy(zero_copy_only=False))
        except (shapely.errors.ShapelyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise table.refused(
                f"has no geometries in its column {place.geometry!r} ({reason}): give WKB or WKT"
            ) from None
    if place.crs != DEGREES:
        return shapely.transform(found, partial(_moved, place.crs))
    return found


def _shapes(values: NDArray[np.object_]) -> NDArray[np.object_]:
    """Returns geometries from WKB, from its hexadecimal digits as in PostGIS, or from WKT."""
    import shapely

    texts = [value for value in values if isinstance(value, str) and value.strip()]
    if not texts or re.fullmatch("[0-9A-Fa-f]+", texts[0].strip()):
        return shapely.from_wkb(np.array([value or None for value in values], object))
    plain = [re.sub(r"^\s*SRID=\d+;", "", value) if value and value.strip() else None for value in values]
    return shapely.from_wkt(np.array(plain, object))


def _moved(crs: str, xy: NDArray[np.float64]) -> NDArray[np.float64]:
    from pyproj import Transformer

    return np.column_stack(Transformer.from_crs(crs, DEGREES, always_xy=True).transform(xy[:, 0], xy[:, 1]))


def _points(shapes: NDArray[np.object_], table: Table, start: int) -> NDArray[np.float64]:
    import shapely

    kinds, counts = shapely.get_type_id(shapes), shapely.get_num_geometries(shapes)
    shapes = np.where((kinds == 4) & (counts == 1), shapely.get_geometry(shapes, 0), shapes)
    shapes[shapely.is_empty(shapes)] = None
    wrong = ~np.isin(shapely.get_type_id(shapes), (-1, 0))
    if wrong.any():
        row = int(wrong.argmax())
        kind = shapes[row].geom_type
        raise table.refused(
            f"has a {kind} in row {start + row + 1}, which is no one place: give one point a row, as geopandas' "
            f"{'explode()' if kind == 'MultiPoint' else 'representative_point()'} makes"
        )
    return np.column_stack([shapely.get_x(shapes), shapely.get_y(shapes)])


def check_degrees(lonlat: NDArray[np.float64], table: Table, start: int = 0) -> None:
    """Refuses coordinates that are no place, and tells what may be wrong with them.

    Raises:
        UserError: A longitude is not within -180 and 360, or a latitude not within -90 and 90.
    """
    lon, lat = lonlat.T
    wrong = ~(np.isfinite(lonlat).all(1) & (np.abs(lat) <= 90) & (lon >= -180) & (lon <= 360))
    if wrong.any():
        row = int(wrong.argmax())
        where = f"lon {lon[row]:g}, lat {lat[row]:g}"
        raise table.refused(f"has no place in row {start + row + 1}: {where}. {remedy_of(lon[row], lat[row])}")


def remedy_of(lon: float, lat: float) -> str:
    """Returns a remedy for coordinates that are no place."""
    if np.isnan(lon) or np.isnan(lat):
        return "Leave out rows without a place, or fill them in"
    if abs(lon) <= 90 < abs(lat) <= 360:
        return "Latitude and longitude may be swapped: name the columns the other way round"
    if max(abs(lon), abs(lat)) > 360:
        return "These may be metres of a projection: give degrees, or a GeoParquet or GeoPackage, which tell their CRS"
    return "Give degrees, lon within -180 and 360, lat within -90 and 90"


def with_degrees(batch: pa.Table, place: Place, lonlat: NDArray[np.float64]) -> pa.Table:
    """Returns rows in which columns of coordinates that were text are numbers."""
    for name, values in zip(place.columns, lonlat.T, strict=True) if not place.geometry else ():
        if pa.types.is_string(batch.schema.field(name).type):
            batch = batch.set_column(batch.column_names.index(name), name, pa.array(values))
    return batch
