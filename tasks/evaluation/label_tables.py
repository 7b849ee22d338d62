"""Reads labels from tables (`tasks.tables.files`) of points, or of polygons to draw points in.

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
ocean        land              lon, lat               classification, a table to fit and one to score
============ ================= ====================== ==========================

Any other column is named by the user. Tables with labels of one name are one task, their rows in the order in which
the tables are given: the paper's ecoregions and biomes are in two files. Rows without a label or a place are left out.
The order of the rows stays, since the paper's split depends on it. A table may have a split of its own, by a column or
by files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from infra.addresses import as_url, name_of
from infra.errors import UserError
from tasks.core.earth.region import Region
from tasks.core.earth.sampling import uniform_places
from tasks.core.probes import Kind
from tasks.evaluation.labels import DEMO_SOUTH, LabelSet, demo_labels
from tasks.params import EvaluateParams
from tasks.tables.files import Place, Table, open_table, settled
from tasks.tables.places import find_place, lonlat_of, remedy_of, shapes_of
from tasks.tables.regions import find_region, numbered
from tasks.units import log

IN_POLYGONS = 10_000  # places drawn in polygons where no number is asked for
FEWEST = 50  # fewest labelled places of a task
DRAWS, TRIES = 20_000, 500  # places drawn at a time, and most draws, until polygons hold enough places
NO_LABEL = ("", "NA", "N/A", "#N/A", "n/a", "NaN", "nan", "NULL", "null", "None")  # texts that mean no label
BLOCKS = 10  # blocks of a region for each fold
FILES = "files"  # the split by which a task's tables are what probes are fitted on, and scored on
FITTED, SCORED = {"train", "training"}, {"test", "val", "valid", "validation", "eval"}  # words of a split
DEMO_POINTS, BLOCK_DEGREES = 10_000, 10.0  # places of a demo task, and side of its blocks
# What these name decides a report, not the names; a suite has reports of its own.
UNTOLD = {"labels", "embedder", "region", "buffer_km", "spacing_km", "suite", "data"}

Asked = TypeVar("Asked", bound=EvaluateParams)


@dataclass(frozen=True)
class Columns:
    """The columns of a task in a table."""

    name: str
    """Name of the task."""
    label: str
    """Column of the labels."""
    kind: Kind
    """Whether labels are classes or numbers."""
    lonlat: tuple[str, str] | None
    """Columns of longitudes and latitudes; None where a geometry has them."""
    log1p: bool = False
    """Whether log(1 + label) is predicted in place of the label."""
    block_degrees: float = 10.0
    """Side of the blocks that are held out, in degrees."""
    by_file: bool = False
    """Whether one table of several is what probes are fitted on, and the others what they are scored on."""


@dataclass(frozen=True)
class Part:
    """The labels of one table of a task, in its order."""

    columns: Columns
    """The columns that were read."""
    source: str
    """Path or URL of the table."""
    lonlat: NDArray[np.float64]
    """Places, (n, 2) in degrees."""
    labels: NDArray
    """Label of each place."""
    scored: NDArray[np.bool_] | None = None
    """Whether probes are scored on a row, not fitted; None where the table does not say."""


PAPER = (
    Columns("biome", "BIOME_NAME", "classification", ("X", "Y")),
    Columns("ecoregion", "ECO_NAME", "classification", ("X", "Y")),
    Columns("country", "country", "classification", ("lon", "lat")),
    Columns("temperature", "meanT", "regression", ("Lon", "Lat")),
    Columns("elevation", "elevation", "regression", ("lon", "lat")),
    Columns("population", "population", "regression", ("lon", "lat"), log1p=True),
    Columns("housing", "median_house_value", "regression", ("longitude", "latitude"), block_degrees=1.0),
    Columns("ocean", "land", "classification", ("lon", "lat"), by_file=True),
)


def read_labels(params: EvaluateParams, region: Region | None = None) -> list[LabelSet]:
    """Returns the tasks of the tables that were named, cut to a region if there is one.

    Raises:
        UserError: A table cannot be read, is named twice or lacks a column, or there are too few labels of one kind.
    """
    urls = [as_url(source) for source in params.labels]
    if twice := [source for i, source in enumerate(params.labels) if urls[i] in urls[:i]]:
        raise UserError(f"the table {twice[0]} is named twice: name each table once")
    by_task: dict[str, list[Part]] = {}
    for source in params.labels:
        with open_table(source, "labels") as table:
            for columns in recognise(table, params):
                by_task.setdefault(columns.name, []).append(read_part(table, columns, params, region))
    return [make_labels(parts, params) for parts in by_task.values()]


def recognise(table: Table, params: EvaluateParams) -> list[Columns]:
    """Returns the tasks of a table: the one that is named, or the paper's tasks by their columns.

    A task whose columns of coordinates have other names than in the paper is taken only where no task has its own.
    """
    names = set(table.names)
    if params.label and params.kind:
        if params.label not in names:
            raise table.refused(f"has no column {params.label!r} among {', '.join(table.names)}: name one of them")
        return [Columns(params.label, params.label, params.kind, None, params.log1p)]
    labelled = [columns for columns in PAPER if columns.label in names]
    exact = [columns for columns in labelled if set(columns.lonlat or ()) <= names]
    if not labelled:
        raise table.refused(
            f"has none of the paper's tasks among its columns {', '.join(table.names)}: name one with --label and "
            "--kind"
        )
    if exact and not table.geometry:
        return exact
    return [replace(columns, lonlat=None) for columns in labelled]


def read_part(table: Table, columns: Columns, params: EvaluateParams, region: Region | None = None) -> Part:
    """Returns the labels of one task in a table, after checks of each."""
    lonlat, labels, split = _labelled_places(table, columns, params)
    if region is not None:
        inside = region.holds(lonlat)
        lonlat, labels, split = lonlat[inside], labels[inside], None if split is None else split[inside]
    labels = _typed(labels, columns, table.source)
    _check(lonlat, labels, columns, table.source)
    scored = None if split is None else _scored_by_column(split, params.split or "", table)
    return Part(columns, table.source, lonlat, labels, scored)


def make_labels(parts: Sequence[Part], params: EvaluateParams) -> LabelSet:
    """Returns the labels of a task from its tables, one after the other, at most as many as asked for.

    Raises:
        UserError: There are too few labels, all alike, or some of the tables have texts where the others have numbers.
    """
    columns, source = parts[0].columns, " + ".join(part.source for part in parts)
    if len(parts) > 1:
        log().info("%s: the rows of %s, in this order", columns.name, ", then ".join(part.source for part in parts))
    if len({part.labels.dtype.kind in "OSU" for part in parts}) > 1:
        raise UserError(f"{source} have texts and numbers in their columns {columns.label!r}: give one or the other")
    lonlat = np.concatenate([part.lonlat for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    _check_enough(labels, columns, source)
    scored = _scored(parts, params)
    kept = _draw(len(labels), params)
    if scored is not None:
        scored = scored[kept]
        if scored.all() or not scored.any():
            raise UserError(f"{source} has no rows to {'fit' if scored.all() else 'score'} in its own split: give both")
    degrees = params.block_degrees or columns.block_degrees
    return LabelSet(columns.name, columns.kind, lonlat[kept], labels[kept], source, degrees, scored)


def _scored(parts: Sequence[Part], params: EvaluateParams) -> NDArray[np.bool_] | None:
    """Returns which rows of a task's own split are scored, (n,); None where it has no split of its own."""
    if params.split == FILES and len(parts) == 1:
        raise UserError(
            f"{parts[0].source} is the only table of {parts[0].columns.name!r}: give both parts by --labels"
        )
    if len(parts) > 1 and (params.split == FILES or (params.split is None and parts[0].columns.by_file)):
        return np.concatenate(
            [np.full(len(part.labels), told) for part, told in zip(parts, _roles(parts), strict=True)]
        )
    columns = [part.scored for part in parts if part.scored is not None]
    return np.concatenate(columns) if columns else None


def _roles(parts: Sequence[Part]) -> list[bool]:
    """Tells of each table whether it is scored: by its name where all names tell it, else all but the first."""
    words = [set(re.split(r"[^a-z]+", name_of(as_url(part.source)).lower())) for part in parts]
    told = [bool(found & SCORED) for found in words if found & (FITTED | SCORED)]
    if len(told) == len(parts) and len(set(told)) == 2:
        return told
    return [i > 0 for i in range(len(parts))]


def _scored_by_column(split: NDArray, column: str, table: Table) -> NDArray[np.bool_]:
    words = np.array([str(word).strip().lower() for word in split])
    known = np.isin(words, list(FITTED | SCORED))
    if not known.all():
        raise table.refused(
            f"has {split[~known][0]!r} in its column {column!r}: write train for rows to fit, and test or val for rows "
            "to score"
        )
    return np.isin(words, list(SCORED))


def _draw(count: int, params: EvaluateParams) -> NDArray[np.int64]:
    """Returns rows in their order: all, or as many as asked for, drawn at random."""
    if params.points is None or count <= params.points:
        return np.arange(count)
    return np.sort(np.random.default_rng(params.seed).choice(count, params.points, replace=False))


def _labelled_places(
    table: Table, columns: Columns, params: EvaluateParams
) -> tuple[NDArray[np.float64], NDArray, NDArray | None]:
    """Returns places, (n, 2), the label of each, and the word of a split; rows without a place or a label are left out.

    There are no words where no column of a split was named.
    """
    place = _place(table, columns, params)
    split = _split_column(table, params)
    rows = settled(lambda: list(table.batches([columns.label, *place.columns, *split])))
    if not rows:
        raise table.refused("has no rows: give one for each label")
    read = pa.Table.from_batches(rows)
    found = pd.DataFrame({"label": read[columns.label].to_pandas()})
    for name in split:
        found["split"] = read[name].to_pandas()
    labelled = (found["label"].notna() & ~found["label"].isin(NO_LABEL)).to_numpy()
    if not place.geometry:
        return _known(lonlat_of(read, place, table), found, labelled)
    frame = gpd.GeoDataFrame(found, geometry=shapes_of(read[place.geometry], place, table), crs=4326)
    frame = frame[labelled & ~(frame.geometry.is_empty | frame.geometry.isna())]
    kinds = set(frame.geom_type)
    if kinds <= {"Point", "MultiPoint"}:
        frame = gpd.GeoDataFrame(frame.explode())  # each point of a multipoint gets the row's label
        lonlat = np.column_stack([frame.geometry.x, frame.geometry.y])
        return _known(lonlat, frame, np.ones(len(frame), bool))
    if not kinds <= {"Polygon", "MultiPolygon"}:
        raise table.refused(f"has geometries of {', '.join(sorted(kinds))}: give points alone, or polygons alone")
    lonlat, which = draw_in_polygons(frame, params.points or IN_POLYGONS, params.seed, table.source)
    return _known(lonlat, frame.iloc[which], np.ones(len(which), bool))


def _split_column(table: Table, params: EvaluateParams) -> list[str]:
    if params.split in (None, FILES):
        return []
    if params.split not in table.names:
        raise table.refused(f"has no column {params.split!r} among {', '.join(table.names)}: name the one of the split")
    return [params.split]


def _place(table: Table, columns: Columns, params: EvaluateParams) -> Place:
    if columns.lonlat is not None:
        return find_place(table, *columns.lonlat)
    if params.lon or params.lat:
        return find_place(table, params.lon, params.lat)
    return table.geometry or find_place(table)


def _known(
    lonlat: NDArray[np.float64], found: pd.DataFrame, wanted: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray, NDArray | None]:
    known = wanted & np.isfinite(lonlat).all(1)
    if left := int((~known).sum()):
        log().info("%d of %d rows have no place or no label, and are left out", left, len(known))
    words = found["split"].to_numpy()[known] if "split" in found else None
    return lonlat[known], found["label"].to_numpy()[known], words


def draw_in_polygons(
    polygons: gpd.GeoDataFrame, count: int, seed: int, source: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Draws places uniform by area in polygons, (count, 2); returns also the polygon of each, the first that holds it.

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
        if labels.dtype.kind in "biuf":
            return labels
        return labels.astype(str)
    try:
        numbers = labels.astype(np.float64)
    except ValueError as error:
        raise UserError(
            f"{source}, column {columns.label!r}, is not of numbers ({error}): give --kind classification"
        ) from None
    if columns.log1p and (numbers <= -1).any():
        raise UserError(f"{source}, column {columns.label!r}, has {numbers.min():g}, which has no log(1 + label)")
    if columns.log1p:
        return np.log1p(numbers)
    return numbers


def _check(lonlat: NDArray[np.float64], labels: NDArray, columns: Columns, source: str) -> None:
    where = f"{source}, column {columns.label!r},"
    lon, lat = lonlat.T
    wrong = (np.abs(lat) > 90) | (lon < -180) | (lon > 360)
    if wrong.any():
        raise UserError(
            f"{where} is at lon {lon[wrong][0]:g}, lat {lat[wrong][0]:g}: name the columns in degrees. "
            f"{remedy_of(lon[wrong][0], lat[wrong][0])}"
        )
    if columns.kind == "regression" and not np.isfinite(labels).all():
        raise UserError(f"{where} has numbers that are not finite: mend them, or leave them empty")


def _check_enough(labels: NDArray, columns: Columns, source: str) -> None:
    where = f"{source}, column {columns.label!r},"
    if len(labels) < FEWEST:
        raise UserError(f"{where} has {len(labels)} labels with a place: a probe needs at least {FEWEST}")
    if len(np.unique(labels)) < 2:
        raise UserError(f"{where} has one value alone: there is nothing to tell apart")


def counted(params: Asked) -> Asked:
    """Returns the parameters with a largest number of places in place of their spacing.

    Raises:
        UserError: The region has no land, or too few or too many places of this spacing.
    """
    if params.spacing_km is None:
        return params
    region, south = find_region(params.region, params.buffer_km), -90.0 if params.labels else DEMO_SOUTH
    refused = "labelled places, and a task takes 200 to 1,000,000: give another --spacing-km, or another --region"
    return numbered(params, "points", params.spacing_km, (south, 90), region, refused)


def label_sets(params: EvaluateParams) -> list[LabelSet]:
    """Returns the tasks of the tables that are named, or the demo's tasks; in a region those that it can tell apart."""
    region = find_region(params.region, params.buffer_km)
    if region is None:
        if params.labels:
            return read_labels(params)
        return demo_labels(params.points or DEMO_POINTS, params.seed, params.block_degrees or BLOCK_DEGREES)
    degrees = params.block_degrees or region.block_degrees(BLOCKS * params.folds)
    log().info("%s: blocks of %g degrees are held out, for %d folds", region.name, degrees, params.folds)
    if params.labels:
        return read_labels(params.model_copy(update={"block_degrees": degrees}), region)
    try:
        found = demo_labels(params.points or DEMO_POINTS, params.seed, degrees, region)
    except ValueError as error:
        raise UserError(str(error)) from None
    return _told_apart(found, region)


def _told_apart(found: list[LabelSet], region: Region) -> list[LabelSet]:
    """Returns the tasks with enough labels in a region, and more than one value; says which are left out."""
    kept = [labels for labels in found if len(labels.labels) >= FEWEST and len(np.unique(labels.labels)) > 1]
    if left := sorted({labels.name for labels in found} - {labels.name for labels in kept}):
        log().warning("%s is of one kind in %s, or has too few labels there: left out", ", ".join(left), region.name)
    if not kept:
        raise UserError(f"no task has labels of more than one kind in {region.name}: give a larger --region")
    return kept
