"""Labels from tables: CSV, Parquet, GeoParquet, GeoJSON and shapefiles, of points or of polygons to draw points in.

The paper's tables are recognised by the columns that its loaders read:

============ ================= ====================== ==========================
task         label             coordinates            kind
============ ================= ====================== ==========================
biome        BIOME_NAME        X, Y                   classification
ecoregion    ECO_NAME          X, Y                   classification
country      country           lon, lat               classification
temperature  meanT             Lon, Lat               regression
elevation    elevation         lon, lat               regression
population   population        lon, lat               regression, log(1 + label)
housing      median_house_value longitude, latitude   regression, blocks of 1°
============ ================= ====================== ==========================

Any other column is named. What has no label or no place is left out; the order of the rows stays, since the paper's
split depends on it.
"""

import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from tasks.core.probes import Kind
from tasks.core.sampling import uniform_places
from tasks.labels import LabelSet
from tasks.params import EvaluateParams

IN_POLYGONS = 10_000  # places that are drawn where no number is asked for
FEWEST = 50  # labelled places of a task
DRAWS, TRIES = 20_000, 500  # places at a time, and times, until polygons have enough of them
LON, LAT = ("lon", "longitude", "lng", "x"), ("lat", "latitude", "y")
GEOGRAPHIC = (".geojson", ".json", ".shp", ".zip", ".gpkg", ".fgb")


@dataclass(frozen=True)
class Columns:
    """Where a task is in a table."""

    name: str
    """Task."""
    label: str
    """Column of the labels."""
    kind: Kind
    """Classes or numbers."""
    lonlat: tuple[str, str] | None
    """Columns of the coordinates; none where a geometry has them."""
    log1p: bool = False
    """Whether log(1 + label) is the label."""
    block_degrees: float = 10.0
    """Side of the blocks that are held out."""


PAPER = (
    Columns("biome", "BIOME_NAME", "classification", ("X", "Y")),
    Columns("ecoregion", "ECO_NAME", "classification", ("X", "Y")),
    Columns("country", "country", "classification", ("lon", "lat")),
    Columns("temperature", "meanT", "regression", ("Lon", "Lat")),
    Columns("elevation", "elevation", "regression", ("lon", "lat")),
    Columns("population", "population", "regression", ("lon", "lat"), log1p=True),
    Columns("housing", "median_house_value", "regression", ("longitude", "latitude"), block_degrees=1.0),
)


def read_labels(params: EvaluateParams) -> list[LabelSet]:
    """The tasks of the tables that were named.

    Raises:
        UserError: A table cannot be read, lacks a column, or has too few labels of one kind.
    """
    found = [
        make_labels(table, columns, source, params)
        for source in params.labels
        for table in [read_table(source)]
        for columns in recognise(table, source, params)
    ]
    names = [labels.name for labels in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two tables have labels of {twice[0]!r}: evaluate one of them at a time")
    return found


def read_table(source: str) -> pd.DataFrame:
    """A table by path or URL; with a geometry, a GeoDataFrame in WGS84.

    Raises:
        UserError: It is not there, or of no kind that can be read.
    """
    name = PurePosixPath(urlsplit(source).path).name.lower()
    try:
        if name.endswith(".shp") and "://" not in source:
            return _degrees(gpd.read_file(source), source)  # its other files lie beside it
        data = io.BytesIO(storage.read(storage.as_url(source)))
        if name.endswith((".csv", ".csv.gz")):
            return pd.read_csv(data, compression="gzip" if name.endswith(".gz") else None)
        if name.endswith(".parquet"):
            geographic = b"geo" in (pyarrow.parquet.read_schema(data).metadata or {})
            return _degrees(gpd.read_parquet(data), source) if geographic else pd.read_parquet(data)
        if name.endswith(GEOGRAPHIC):
            return _degrees(gpd.read_file(data), source)
    except FileNotFoundError:
        raise UserError(f"there is no table {source}: check its path or URL") from None
    except UserError:
        raise
    except Exception as error:  # each reader has its own errors
        raise UserError(f"{source} cannot be read as a table of labels ({error}): mend the file") from error
    raise UserError(f"{source} is of no kind that can be read: give .csv, .parquet, {', '.join(GEOGRAPHIC)}")


def _degrees(frame: gpd.GeoDataFrame, source: str) -> gpd.GeoDataFrame:
    if frame.crs is None:
        raise UserError(f"{source} does not say its coordinate reference system: set it, for example EPSG:4326")
    return frame.to_crs(4326)


def recognise(table: pd.DataFrame, source: str, params: EvaluateParams) -> list[Columns]:
    """Where the tasks are in a table: as named, or the paper's by its columns."""
    if params.label and params.kind:
        _need(table, params.label, source)
        where = None if isinstance(table, gpd.GeoDataFrame) else _coordinates(table, source, params)
        return [Columns(params.label, params.label, params.kind, where, params.log1p)]
    geometry = isinstance(table, gpd.GeoDataFrame)
    found = [c for c in PAPER if c.label in table and (geometry or set(c.lonlat or ()) <= set(table))]
    if not found:
        raise UserError(
            f"{source} has none of the paper's tasks among its columns {', '.join(map(str, table))}: name one with "
            "--label and --kind"
        )
    return [Columns(c.name, c.label, c.kind, None, c.log1p, c.block_degrees) for c in found] if geometry else found


def _need(table: pd.DataFrame, column: str, source: str) -> None:
    if column not in table:
        raise UserError(f"{source} has no column {column!r} among {', '.join(map(str, table))}: name one of them")


def _coordinates(table: pd.DataFrame, source: str, params: EvaluateParams) -> tuple[str, str]:
    return _coordinate(table, source, "lon", params.lon, LON), _coordinate(table, source, "lat", params.lat, LAT)


def _coordinate(table: pd.DataFrame, source: str, option: str, given: str | None, names: tuple[str, ...]) -> str:
    if given:
        _need(table, given, source)
        return given
    found = [column for column in map(str, table) if column.lower() in names]
    if len(found) != 1:
        what = f"columns {' and '.join(found)}" if found else f"no column named {' or '.join(names)}"
        raise UserError(f"{source} has {what} for its coordinates: name one with --{option}")
    return found[0]


def make_labels(table: pd.DataFrame, columns: Columns, source: str, params: EvaluateParams) -> LabelSet:
    """Returns the labels of one task, checked, and drawn from where there are more than asked for."""
    lonlat, labels = _labelled_places(table[table[columns.label].notna()], columns, source, params)
    labels = _typed(labels, columns, source)
    _check(lonlat, labels, columns, source)
    kept = _draw(len(labels), params)
    degrees = params.block_degrees or columns.block_degrees
    return LabelSet(columns.name, columns.kind, lonlat[kept], labels[kept], source, degrees)


def _draw(count: int, params: EvaluateParams) -> NDArray[np.int64]:
    """Rows in their order: all, or as many as asked for at random."""
    if params.points is None or count <= params.points:
        return np.arange(count)
    return np.sort(np.random.default_rng(params.seed).choice(count, params.points, replace=False))


def _labelled_places(
    table: pd.DataFrame, columns: Columns, source: str, params: EvaluateParams
) -> tuple[NDArray[np.float64], NDArray]:
    """Returns places, (n, 2), and the label of each; rows without a place are left out of both."""
    if columns.lonlat is not None:
        numbers = [pd.to_numeric(table[name], errors="coerce").to_numpy("f8") for name in columns.lonlat]
        return _placed(np.column_stack(numbers), table[columns.label])
    assert isinstance(table, gpd.GeoDataFrame)  # for the type checker: without coordinates there is a geometry
    table = table[~(table.geometry.is_empty | table.geometry.isna())]
    kinds = set(table.geom_type)
    if kinds <= {"Point", "MultiPoint"}:
        table = table.explode(index_parts=False)  # every point of several has their label
        return _placed(np.column_stack([table.geometry.x, table.geometry.y]), table[columns.label])
    if not kinds <= {"Polygon", "MultiPolygon"}:
        raise UserError(f"{source} has geometries of {', '.join(sorted(kinds))}: give points alone, or polygons alone")
    lonlat, rows = draw_in_polygons(table, params.points or IN_POLYGONS, params.seed, source)
    return lonlat, table[columns.label].to_numpy()[rows]


def _placed(lonlat: NDArray[np.float64], labels: pd.Series) -> tuple[NDArray[np.float64], NDArray]:
    known = np.isfinite(lonlat).all(1)
    return lonlat[known], labels.to_numpy()[known]


def draw_in_polygons(
    polygons: gpd.GeoDataFrame, count: int, seed: int, source: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Places uniform by area in polygons, (count, 2), and the polygon of each, the first where several hold it.

    Raises:
        UserError: The polygons cover so little of their bounds that no place falls into them.
    """
    rng = np.random.default_rng(seed)
    places, rows = [], []
    for _ in range(TRIES):
        lonlat = uniform_places(rng, DRAWS, polygons.total_bounds)
        which, inside = polygons.sindex.query(gpd.points_from_xy(*lonlat.T), predicate="within")
        which, first = np.unique(which, return_index=True)
        places.append(lonlat[which])
        rows.append(inside[first])
        if sum(map(len, rows)) >= count:
            return np.concatenate(places)[:count], np.concatenate(rows)[:count]
    raise UserError(f"{source} has polygons so small that {count} places are not found in them: ask for fewer --points")


def _typed(labels: NDArray, columns: Columns, source: str) -> NDArray:
    if columns.kind == "classification":
        return labels.astype(str) if labels.dtype == object else labels
    try:
        numbers = labels.astype(np.float64)
    except ValueError as error:
        raise UserError(
            f"{source}, column {columns.label!r}, is not of numbers ({error}): give --kind classification"
        ) from None
    if columns.log1p and (numbers <= -1).any():
        raise UserError(f"{source}, column {columns.label!r}, has {numbers.min():g}, which has no log(1 + label)")
    return np.log1p(numbers) if columns.log1p else numbers


def _check(lonlat: NDArray[np.float64], labels: NDArray, columns: Columns, source: str) -> None:
    where = f"{source}, column {columns.label!r},"
    lon, lat = lonlat.T
    wrong = (np.abs(lat) > 90) | (lon < -180) | (lon > 360)
    if wrong.any():
        raise UserError(f"{where} is at lon {lon[wrong][0]:g}, lat {lat[wrong][0]:g}: name the columns in degrees")
    if len(labels) < FEWEST:
        raise UserError(f"{where} has {len(labels)} labels with a place: a probe needs at least {FEWEST}")
    if columns.kind == "regression" and not np.isfinite(labels).all():
        raise UserError(f"{where} has numbers that are not finite: mend them, or leave them empty")
    if len(np.unique(labels)) < 2:
        raise UserError(f"{where} has one value alone: there is nothing to tell apart")
