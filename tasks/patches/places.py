"""Draws the places to sample, in the order in which they are tried."""

import hashlib

import numpy as np
import rasterio
from numpy.typing import NDArray

from infra import storage
from infra.addresses import as_url, shown
from infra.bounds import check_expansion
from infra.errors import UserError
from tasks.core.earth.region import Region
from tasks.core.earth.sampling import draw_classes, draw_even, draw_land, thin
from tasks.params import SampleParams
from tasks.tables.files import BATCH, layer_of
from tasks.tables.points import check_points, open_points, rows_of
from tasks.tables.regions import find_region, numbered


def draw(count: int, params: SampleParams) -> NDArray[np.float64]:
    """Returns the first candidates of the stream, at most `count`.

    Returns:
        (n, 5): row id, lon, lat, season (-1: any), and the random number of `thin`.
    """
    repeats = 4 if params.scene == "seasons" else 1
    places = _places(-(-count // repeats), params, find_region(params.region, params.buffer_km))
    rows = np.arange(min(count, len(places) * repeats))
    season = rows % 4 if repeats == 4 else np.full(len(rows), -1)
    return np.column_stack([rows, places[rows // repeats], season, thin(len(rows), params.seed)])


def _places(count: int, params: SampleParams, region: Region | None) -> NDArray[np.float64]:
    if params.places == "list":
        places = read_points(str(params.source))
        return places[:count] if region is None else places[region.holds(places)][:count]
    try:
        if params.places == "class":
            classes, bounds = read_classes(str(params.source))
            return draw_classes(count, params.seed, classes, bounds, params.south, params.north, region)
        if params.places == "even":
            return draw_even(count, params.seed, params.south, params.north, region)
        return draw_land(count, params.seed, params.south, params.north, region)
    except ValueError as error:
        raise UserError(str(error)) from None


def counted(params: SampleParams) -> SampleParams:
    """Returns the parameters with a number of patches in place of their spacing.

    Raises:
        UserError: The region has no land, or more places of this spacing than a sample can have.
    """
    region = find_region(params.region, params.buffer_km)
    if params.spacing_km is None:
        return params
    refused = "places, more than a sample can have: give a larger --spacing-km, or a smaller --region"
    return numbered(params, "patches", params.spacing_km, (params.south, params.north), region, refused)


def source_digest(params: SampleParams) -> dict[str, str]:
    """Returns the hash of a list or raster, after a check that it can be read; other content makes another sample."""
    if params.places not in ("class", "list"):
        return {}
    draw(1, params)
    return {"source_sha256": hashlib.sha256(storage.read(as_url(layer_of(str(params.source))[0]))).hexdigest()}


def read_points(source: str) -> NDArray[np.float64]:
    """Returns the points of a table (`tasks.tables.files`), (n, 2) degrees, longitudes within -180 and 180.

    Raises:
        UserError: There is no such table, or a point is no place or outside Sentinel-2's grid.
    """
    with open_points(source) as (table, place):
        check_points(table, place)
        points = np.concatenate([lonlat for _, lonlat in rows_of(table, place, BATCH, place.columns)])
    points[points[:, 0] > 180] -= [360, 0]
    wrong = ~((points[:, 1] >= -80) & (points[:, 1] <= 84))
    if wrong.any():
        first = int(wrong.argmax())
        raise UserError(f"{source}, row {first + 1}: lon {points[first, 0]}, lat {points[first, 1]} is outside -180 to "
                        "180, -80 to 84, where Sentinel-2's grid is")  # fmt: skip
    return points


def read_classes(url: str) -> tuple[NDArray[np.integer], tuple[float, float, float, float]]:
    """Reads a class raster, (lat, lon) north up with 0 for nodata, and its bounds in degrees.

    Raises:
        UserError: There is no such raster, or it is not in longitude and latitude.
    """
    try:
        data = storage.read(as_url(url))
        with rasterio.MemoryFile(data) as file, file.open() as raster:
            for rows, columns in [raster.shape, *raster.block_shapes]:
                check_expansion(shown(url), len(data), rows * columns * np.dtype(raster.dtypes[0]).itemsize)
            classes = raster.read(1, masked=True).filled(0)
            bounds, crs = raster.bounds, raster.crs
    except (FileNotFoundError, rasterio.errors.RasterioError) as error:
        raise UserError(f"{shown(url)} is no class raster ({type(error).__name__}): give a GeoTIFF") from None
    if crs is None or not crs.is_geographic or classes.dtype.kind not in "iu":
        raise UserError(
            f"{shown(url)} has {classes.dtype} in {crs}: give integers in longitude and latitude (EPSG:4326)"
        )
    return classes, tuple(bounds)
