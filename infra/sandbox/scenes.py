"""Makes the demo planet's scenes, like Sentinel-2's: acquisitions, their clouds, pixels and STAC items."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import rasterio
import shapely
from affine import Affine
from rasterio.io import MemoryFile
from rasterio.shutil import copy as copy_raster
from scipy.ndimage import gaussian_filter

from infra.sandbox.bluemarble import Surface
from infra.sandbox.cells import Cell, Frame, bounds, footprint

COLLECTION = "sentinel-2-l2a-demo"
STAND_IN = "NASA Blue Marble at about 7 km standing in for 10 m Sentinel-2"
BANDS = {"blue": "B02", "green": "B03", "red": "B04", "nir": "B08"}
CLOUD, EDGE_OF_CLOUD, SHADOW = 9, 8, 3
NODATA, VEGETATION, BARE, WATER, SNOW = 0, 4, 5, 6, 11
SHADOW_SHIFT = (
    -1,
    -1,
)  # SCL pixels (rows, columns): the morning sun is in the east; north of the equator, south
DARKENING = 0.5  # share of its reflectance that a surface in shadow keeps
SLANT = 0.3  # share of the width by which the edge of a swath recedes from top to bottom
COVERED = 0.8  # share of a partly covered scene's width at the top
PIECES = ("https://stac-extensions.github.io/{}/schema.json").format
EXTENSIONS = [PIECES(name) for name in ("eo/v1.1.0", "raster/v1.1.0", "grid/v1.1.0")]


@dataclass(frozen=True)
class Acquisition:
    """One processed acquisition of a cell, i.e. one item."""

    cell: Cell
    day: str
    """UTC date, e.g. `2021-07-09`."""
    season: float
    """1 at the year's highest NDVI, 0 at its lowest."""
    baseline: str
    """Processing baseline, e.g. `05.09`."""
    version: int
    """0, or 1 for a reprocessing of the same acquisition."""
    cloud: float
    """Wanted share of cloud, 0 to 1."""
    partial: bool
    """Whether the edge of the swath runs through the scene."""
    seed: int

    @property
    def offset(self) -> int:
        """Returns what to add to pixel values before dividing by 10000."""
        return -1000 if self.baseline >= "04.00" else 0

    @property
    def platform(self) -> str:
        if int(self.day[-2:]) % 2:
            return "sentinel-2a"
        return "sentinel-2b"

    @property
    def datetime(self) -> str:
        return f"{self.day}T10:{self.cell.zone % 60:02d}:21.024Z"

    @property
    def id(self) -> str:
        letter = self.platform[-1].upper()
        return f"S2{letter}_{self.cell.name}_{self.day.replace('-', '')}_{self.version}_L2A"


def acquisitions(cell: Cell, seed: int) -> list[Acquisition]:
    """Returns three dates of a cell, and for every fourth cell the first one reprocessed.

    The first date is the local summer and nearly clear; of the others one in six is almost all cloud, and
    one in eight is cut by the edge of the swath.
    """
    random = np.random.default_rng([seed, zlib.crc32(cell.name.encode())])
    if cell.south < 0:
        months = ("2021-01", "2022-07", "2023-10")
    else:
        months = ("2021-07", "2022-02", "2023-04")
    made = []
    for month, season, baseline in zip(months, (1.0, 0.0, 0.5), ("03.01", "04.00", "05.09"), strict=True):
        overcast = season < 1 and random.random() < 1 / 6
        if overcast:
            cloud = random.uniform(0.7, 0.97)
        else:
            cloud = random.uniform(0.01, 0.12 if season == 1 else 0.4)
        partial = bool(season < 1 and random.random() < 1 / 8)
        day = f"{month}-{random.integers(1, 29):02d}"
        made.append(Acquisition(cell, day, season, baseline, 0, cloud, partial, seed))
    if random.random() < 1 / 4:
        made.append(replace(made[0], baseline="05.00", version=1))
    return made


@dataclass(frozen=True)
class Scene:
    """The arrays of one item."""

    numbers: np.ndarray
    """B02, B03, B04, B08: uint16 (4, y, x) DN, 0 where there is no data."""
    classes: np.ndarray
    """SCL: uint8 (y/2, x/2)."""
    cloud_percent: float
    """Share of cloud among the pixels with data."""
    nodata_percent: float


def render(taken: Acquisition, surface: Surface) -> Scene:
    """Burns clouds and shadows into a surface and writes it as numbers of the item's baseline."""
    nir = taken.season * surface.nir_summer + (1 - taken.season) * surface.nir_winter
    clear = np.concatenate([surface.visible, nir[None]])
    covered = _covered(clear.shape[1] // 2, clear.shape[2] // 2, taken.partial)
    density = _clouds(taken, covered)
    classes = _classes(taken, clear, density, covered)
    reflectance = _burn(clear, _double(density), _double(classes))
    numbers = np.rint(10_000 * reflectance).clip(1, 10_000) - taken.offset  # 0 is kept for no data
    numbers *= _double(covered)
    cloudy = np.isin(classes, (CLOUD, EDGE_OF_CLOUD))
    return Scene(
        numbers.astype(np.uint16),
        classes,
        round(100 * cloudy.sum() / covered.sum(), 6),
        round(100 * (1 - covered.mean()), 6),
    )


def _double(mask: np.ndarray) -> np.ndarray:
    """Repeats pixels from the SCL's grid to the bands', which is twice as fine."""
    return mask.repeat(2, axis=0).repeat(2, axis=1)


def _covered(height: int, width: int, partial: bool) -> np.ndarray:
    row, column = np.indices((height, width)) + 0.5
    slanted = column / width + SLANT * row / height < COVERED
    if partial:
        return slanted
    return np.ones((height, width), bool)


def _clouds(taken: Acquisition, covered: np.ndarray) -> np.ndarray:
    """Returns the cloud density on the SCL's grid, from 0, clear, to 1.

    Smooth noise of two scales (8 and 2 pixels), seeded by cell and day, above the quantile that leaves the
    wanted share. A reprocessed acquisition has the same clouds.
    """
    random = np.random.default_rng([taken.seed, zlib.crc32(f"{taken.cell.name} {taken.day}".encode())])
    coarse, fine = (gaussian_filter(random.normal(size=covered.shape), s, mode="wrap") for s in (8, 2))
    field = coarse / coarse.std() + 0.4 * fine / fine.std()
    threshold = np.quantile(field[covered], 1 - taken.cloud)
    return np.where(covered & (field > threshold), np.clip(0.05 + (field - threshold), 0, 1), 0)


def _classes(taken: Acquisition, clear: np.ndarray, density: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Returns the scene classification: cloud over shadow over surface."""
    if taken.cell.south >= 0:
        rows, columns = SHADOW_SHIFT
    else:
        rows, columns = (-SHADOW_SHIFT[0], SHADOW_SHIFT[1])
    shadow = _shifted(density > 0, rows, columns)
    classes = _surface_classes(clear, taken.cell)
    classes[shadow] = SHADOW
    classes[density > 0] = EDGE_OF_CLOUD
    classes[density > 0.3] = CLOUD
    classes[~covered] = NODATA
    return classes


def _shifted(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Returns the mask moved by whole pixels, with False at the edges."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return padded[1 - rows : 1 - rows + height, 1 - columns : 1 - columns + width]


def _surface_classes(clear: np.ndarray, cell: Cell) -> np.ndarray:
    """Returns vegetation, bare, water or snow by the mean reflectance of each 2 x 2 block."""
    bands, height, width = clear.shape
    blue, green, red, nir = clear.reshape(bands, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
    classes = np.full(blue.shape, BARE, np.uint8)
    classes[(nir - red) / (nir + red + 1e-6) > 0.3] = VEGETATION
    classes[(nir < 0.05) & (blue > red)] = WATER
    if max(abs(cell.south), abs(cell.north)) > 40:
        classes[np.minimum(np.minimum(blue, green), red) > 0.5] = SNOW
    return classes


def _burn(clear: np.ndarray, density: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Clouds are white, 0.6 to 0.9; a shadow halves the surface."""
    shaded = np.where(classes == SHADOW, DARKENING * clear, clear)
    return np.where(density > 0, 0.6 + 0.3 * density, shaded)


def cog(pixels: np.ndarray, transform: Affine, epsg: int, block: int, resampling: str) -> bytes:
    """Returns a (y, x) array as a Cloud Optimized GeoTIFF with overviews and nodata 0."""
    height, width = pixels.shape
    profile = {"height": height, "width": width, "count": 1, "dtype": pixels.dtype, "nodata": 0}
    with MemoryFile(ext=".tif") as plain, MemoryFile(ext=".tif") as optimized:
        with plain.open(driver="GTiff", crs=f"EPSG:{epsg}", transform=transform, **profile) as dataset:
            dataset.write(pixels, 1)
        copy_raster(
            plain.name,
            optimized.name,
            driver="COG",
            compress="deflate",
            predictor="yes",
            blocksize=block,
            overview_resampling=resampling,
        )
        return optimized.read()


def files(taken: Acquisition, scene: Scene, frame: Frame) -> dict[str, bytes]:
    """Returns the item's COGs by file name."""
    coarse = frame.transform @ Affine.scale(2)
    with rasterio.Env(GDAL_CACHEMAX=64):
        made = {
            f"{band}.tif": cog(numbers, frame.transform, taken.cell.epsg, 128, "average")
            for band, numbers in zip(BANDS.values(), scene.numbers, strict=True)
        }
        made["SCL.tif"] = cog(scene.classes, coarse, taken.cell.epsg, 64, "nearest")
    return made


def item(taken: Acquisition, scene: Scene, frame: Frame, root: str) -> dict[str, Any]:
    """Returns the STAC item, in the form of Earth Search's.

    By the cell's zone, in turn: `proj:epsg` and STAC 1.0, `proj:code` and STAC 1.1, or both; and a
    `proj:transform` of 6 or 9 elements.
    """
    geometry = footprint(taken.cell, _outline(taken, frame))
    style = taken.cell.zone % 3
    projection = PIECES(("projection/v1.1.0", "projection/v2.0.0", "projection/v1.2.0")[style])
    return {
        "type": "Feature",
        "stac_version": "1.0.0" if style == 0 else "1.1.0",
        "stac_extensions": [*EXTENSIONS, projection],
        "id": taken.id,
        "collection": COLLECTION,
        "geometry": shapely.geometry.mapping(geometry),
        "bbox": bounds(geometry),
        "properties": _properties(taken, scene, frame, style),
        "links": [],
        "assets": _assets(taken, frame, f"{root}/{taken.cell.name}/{taken.id}", 9 if style == 1 else 6),
    }


def _outline(taken: Acquisition, frame: Frame) -> shapely.Geometry:
    if not taken.partial:
        return frame.box
    shares = [(0, 0), (COVERED, 0), (COVERED - SLANT, 1), (0, 1)]
    corners = [frame.transform @ (x * frame.width, y * frame.height) for x, y in shares]
    return shapely.Polygon(corners)


def _properties(taken: Acquisition, scene: Scene, frame: Frame, style: int) -> dict[str, Any]:
    compact = taken.datetime[:19].replace("-", "").replace(":", "")
    satellite = taken.platform[-1].upper()
    epsg, code = {"proj:epsg": taken.cell.epsg}, {"proj:code": f"EPSG:{taken.cell.epsg}"}
    return {
        "title": f"{taken.id}: {STAND_IN}",
        "description": f"{STAND_IN}; NIR from MODIS NDVI; clouds and shadows are synthetic.",
        "rangegrid:stand_in": STAND_IN,
        "datetime": taken.datetime,
        "platform": taken.platform,
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "gsd": frame.resolution,
        "eo:cloud_cover": scene.cloud_percent,
        "grid:code": f"MGRS-{taken.cell.name}",
        "s2:mgrs_tile": taken.cell.name,
        "s2:processing_baseline": taken.baseline,
        "s2:nodata_pixel_percentage": scene.nodata_percent,
        "s2:datatake_id": f"GS2{satellite}_{compact}_0{taken.cell.zone:05d}_N{taken.baseline}",
        **((epsg, code, epsg | code)[style]),
    }


def _assets(taken: Acquisition, frame: Frame, folder: str, elements: int) -> dict[str, Any]:
    fine, coarse = frame.transform, frame.transform @ Affine.scale(2)
    scaled = {"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": taken.offset / 10_000}
    assets = {
        name: _asset(f"{folder}/{band}.tif", fine, (frame.height, frame.width), elements)
        | {"eo:bands": [{"name": band, "common_name": name}], "raster:bands": [scaled]}
        for name, band in BANDS.items()
    }
    scl = _asset(f"{folder}/SCL.tif", coarse, (frame.height // 2, frame.width // 2), elements)
    return assets | {"scl": scl | {"raster:bands": [{"nodata": 0, "data_type": "uint8"}]}}


def _asset(href: str, grid: Affine, shape: tuple[int, int], elements: int) -> dict[str, Any]:
    return {
        "href": href,
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "roles": ["data", "reflectance"] if "SCL" not in href else ["data"],
        "proj:shape": list(shape),
        "proj:transform": [float(number) for number in tuple(grid)[:elements]],
    }
