"""Items of Sentinel-2 L2A made up in the form of each archive: its keys, names, addresses and declarations."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import rasterio
import shapely
from pyproj import Transformer
from rasterio.transform import from_origin

from tasks.core.sentinel2.items import NAMES

SIDE = 109_800  # metres, of a tile
METRES = {"B02": 10, "B03": 10, "B04": 10, "B08": 10, "B01": 60, "B09": 60}  # of the other bands: 20
DECLARED = {"scale": 0.0001, "offset": -0.1}
COG = "image/tiff; application=geotiff; profile=cloud-optimized"


@dataclass(frozen=True)
class Taken:
    """What a satellite took of one tile, before any archive describes it."""

    tile: str = "31TCJ"
    left: float = 300_000.0
    top: float = 4_900_020.0
    satellite: str = "S2A"
    sensed: str = "20210615T105621"
    baseline: str = "05.10"
    clouds: float | None = 5.0

    @property
    def epsg(self):
        """EPSG code of the tile's zone, on the northern hemisphere."""
        return 32600 + int(self.tile[:2])

    @property
    def when(self):
        return datetime.strptime(self.sensed, "%Y%m%dT%H%M%S")

    @property
    def name(self):
        """The product's name, as ESA writes it."""
        made = (self.when + timedelta(hours=9)).strftime("%Y%m%dT%H%M%S")
        return f"{self.satellite}_MSIL2A_{self.sensed}_N{self.baseline.replace('.', '')}_R094_T{self.tile}_{made}"

    @property
    def footprint(self):
        """The tile in longitude and latitude."""
        to = Transformer.from_crs(self.epsg, 4326, always_xy=True)
        box = shapely.box(self.left, self.top - SIDE, self.left + SIDE, self.top)
        return shapely.transform(box, to.transform, interleaved=False)


def item(taken, name, collection, assets, properties, version="1.0.0"):
    told = {"datetime": f"{taken.when.isoformat()}.024000Z", "eo:cloud_cover": taken.clouds}
    return {
        "type": "Feature",
        "stac_version": version,
        "id": name,
        "collection": collection,
        "geometry": shapely.geometry.mapping(taken.footprint),
        "bbox": list(taken.footprint.bounds),
        "properties": told | properties,
        "assets": assets,
        "links": [],
    }


def asset(taken, href, metres, **more):
    """An asset as every archive writes it, but for what it says of its bands."""
    pixels = SIDE // metres
    transform = [metres, 0, taken.left, 0, -metres, taken.top]
    placed = {"proj:shape": [pixels, pixels], "proj:transform": transform, "gsd": metres}
    return {"href": href, "type": COG, "roles": ["data"]} | placed | more


def metres(band):
    return METRES.get(band, 20)


def by_tile(taken):
    """The folders of a tile, and those of the month within."""
    return f"{int(taken.tile[:2])}/{taken.tile[2]}/{taken.tile[3:]}", f"{taken.when.year}/{taken.when.month}"


def planetary_computer(taken):
    """Bands by number, no declared offset, the baseline and the tile as properties."""
    folder = f"{taken.tile[:2]}/{taken.tile[2]}/{taken.tile[3:]}/{taken.when:%Y/%m/%d}/{taken.name}.SAFE/GRANULE"
    root = f"https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/{folder}/L2A_T{taken.tile}/IMG_DATA"

    def file(band, size):
        return f"{root}/R{size}m/T{taken.tile}_{taken.sensed}_{band}_{size}m.tif"

    assets = {
        band: asset(taken, file(band, metres(band)), metres(band), **{"eo:bands": [{"name": band}]}) for band in NAMES
    }
    del assets["SCL"]["eo:bands"]
    assets["visual"] = asset(taken, file("TCI", 10), 10, **{"eo:bands": [{"name": b} for b in ("B04", "B03", "B02")]})
    assets["AOT"] = asset(taken, file("AOT", 10), 10)
    properties = {
        "platform": f"Sentinel-2{taken.satellite[-1]}",
        "proj:epsg": taken.epsg,
        "s2:mgrs_tile": taken.tile,
        "s2:datatake_id": f"G{taken.satellite}_{taken.sensed}_012345_N{taken.baseline}",
        "s2:product_uri": f"{taken.name}.SAFE",
        "s2:processing_baseline": taken.baseline,
    }
    name = taken.name.replace(f"_N{taken.baseline.replace('.', '')}", "")
    return item(taken, name, "sentinel-2-l2a", assets, properties)


def earth_search(taken, applied=None):
    """Bands by colour, the JPEG 2000 files beside them, and a flag that tells whether the offset was taken off.

    By default the flag is true where there is an offset to be taken off. The bands declare one that is zero.
    """
    applied = taken.baseline >= "04.00" if applied is None else applied
    name = f"{taken.satellite}_{taken.tile}_{taken.sensed[:8]}_0_L2A"
    root = f"https://sentinel-cogs.s3.us-west-2.amazonaws.com/sentinel-s2-l2a-cogs/{'/'.join(by_tile(taken))}/{name}"
    left_in = -0.1 if taken.baseline >= "04.00" else 0
    assets = {}
    for band, colour in NAMES.items():
        raster = {"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": 0 if applied else left_in}
        told = (
            {"eo:bands": [{"name": colour, "common_name": colour}], "raster:bands": [raster]} if band != "SCL" else {}
        )
        assets[colour] = asset(taken, f"{root}/{band}.tif", metres(band), **told)
        original = told and told | {"raster:bands": [raster | {"offset": left_in}]}
        href = f"s3://sentinel-s2-l2a/tiles/{by_tile(taken)[0]}/{band}.jp2"
        assets[f"{colour}-jp2"] = asset(taken, href, metres(band), **original) | {"type": "image/jp2"}
    properties = {
        "platform": f"sentinel-2{taken.satellite[-1].lower()}",
        "proj:epsg": taken.epsg,
        "grid:code": f"MGRS-{taken.tile}",
        "s2:product_uri": f"{taken.name}.SAFE",
        "s2:processing_baseline": taken.baseline,
        "earthsearch:boa_offset_applied": applied,
    }
    return item(taken, name, "sentinel-2-l2a", assets, properties)


def earth_search_v0(taken):
    """Bands by number, the baseline and the tile in the product's name alone, no declared offset."""
    name = f"{taken.satellite}_{taken.tile}_{taken.sensed[:8]}_0_L2A"
    root = f"https://sentinel-cogs.s3.us-west-2.amazonaws.com/sentinel-s2-l2a-cogs/{taken.when.year}/{name}"
    assets = {band: asset(taken, f"{root}/{band}.tif", metres(band)) for band in NAMES}
    assets["visual"] = asset(taken, f"{root}/TCI.tif", 10)
    properties = {
        "platform": f"sentinel-2{taken.satellite[-1].lower()}",
        "proj:epsg": taken.epsg,
        "sentinel:latitude_band": taken.tile[2],
        "sentinel:grid_square": taken.tile[3:],
        "sentinel:product_id": taken.name,
    }
    return item(taken, name, "sentinel-s2-l2a-cogs", assets, properties, "1.0.0-beta.2")


def collection_1(taken, root="https://e84-earth-search-sentinel-data.s3.us-west-2.amazonaws.com/sentinel-2-c1-l2a"):
    """Earth Search's Collection 1: bands by colour, the offset left in the numbers and declared."""
    name = f"{taken.satellite}_T{taken.tile}_{taken.sensed}_L2A"
    folder = f"{root}/{'/'.join(by_tile(taken))}/{name}"
    assets = {}
    for band, colour in NAMES.items():
        raster = {"nodata": 0, "data_type": "uint16"} | DECLARED
        told = {"eo:bands": [{"name": band, "common_name": colour}], "raster:bands": [raster]} if band != "SCL" else {}
        assets[colour] = asset(taken, f"{folder}/{band}.tif", metres(band), **told)
    assets["aot"] = asset(taken, f"{folder}/AOT.tif", 20, **{"raster:bands": [{"scale": 0.001, "offset": 0}]})
    assets["visual"] = asset(taken, f"{folder}/TCI.tif", 10, **{"eo:bands": [{"name": b} for b in ("B04", "B03")]})
    properties = {
        "platform": f"sentinel-2{taken.satellite[-1].lower()}",
        "proj:epsg": taken.epsg,
        "grid:code": f"MGRS-{taken.tile}",
        "s2:product_uri": f"{taken.name}.SAFE",
        "s2:processing_baseline": taken.baseline,
    }
    return item(taken, name, "sentinel-2-c1-l2a", assets, properties)


def digital_earth_africa(taken):
    """A mirror of Collection 1 under addresses of its own."""
    return collection_1(taken, "s3://deafrica-sentinel-2-l2a-c1-dev/sentinel-2-c1-l2a") | {"collection": "s2_l2a_c1"}


def copernicus(taken):
    """STAC 1.1, JPEG 2000, each band at every pixel size from its own on."""
    root = f"s3://eodata/Sentinel-2/MSI/L2A/{taken.when:%Y/%m/%d}/{taken.name}.SAFE/GRANULE/L2A_T{taken.tile}/IMG_DATA"
    declared = {f"raster:{key}": value for key, value in DECLARED.items()}
    assets = {}
    for band in (*NAMES, "AOT", "TCI"):
        told = declared | {"bands": [{"name": band}]} if band in NAMES and band != "SCL" else {}
        for size in (10, 20, 60):
            if size >= metres(band):
                href = f"{root}/R{size}m/T{taken.tile}_{taken.sensed}_{band}_{size}m.jp2"
                assets[f"{band}_{size}m"] = asset(taken, href, size, **told) | {"type": "image/jp2"}
    properties = {
        "platform": f"sentinel-2{taken.satellite[-1].lower()}",
        "grid:code": f"MGRS-{taken.tile}",
        "processing:version": taken.baseline,
        "product:type": "S2MSI2A",
    }
    return item(taken, taken.name, "sentinel-2-l2a", assets, properties, "1.1.0")


OLD, NEW = Taken(sensed="20190824T105629", baseline="02.13"), Taken()
NEWEST = Taken("32UPU", 600_000.0, 5_400_000.0, "S2B", "20240828T101559", "05.11", 80.25)
FORMS = {  # each archive with acquisitions that it may hold: Collection 1 and Copernicus have none without the offset
    "Planetary Computer": (planetary_computer, (OLD, NEW, NEWEST)),
    "Earth Search": (earth_search, (OLD, NEW, NEWEST)),
    "Earth Search v0": (earth_search_v0, (OLD,)),
    "Earth Search, Collection 1": (collection_1, (NEW, NEWEST)),
    "Digital Earth Africa": (digital_earth_africa, (NEW,)),
    "Copernicus": (copernicus, (NEW, NEWEST)),
}


def made_up():
    """Items by archive, each a dictionary."""
    return {name: [form(taken) for taken in all_taken] for name, (form, all_taken) in FORMS.items()}


def month():
    """Planetary Computer's items of August 2024 around Colorado: all tiles of two zones, which overlap as real ones."""
    zones = {"12": range(600_000, 900_000, 100_000), "13": range(99_960, 700_000, 100_000)}
    letters = "ABCDEFGH"
    squares = [
        Taken(f"{zone}S{letters[column]}{letters[row]}", float(left), 4_700_040.0 - 100_020 * row)
        for zone, lefts in zones.items()
        for column, left in enumerate(lefts)
        for row in range(8)
    ]
    days = [f"202408{1 + n % 30:02d}T175{n % 10}11" for n in range(len(squares))]
    return [
        planetary_computer(Taken(at.tile, at.left, at.top, "S2B", day, "05.11", float(n % 90)))
        for n, (at, day) in enumerate(zip(squares, days, strict=True))
    ]


@dataclass(frozen=True)
class WholeScene:
    """A scene whose pixels are ten times as large as the archive's, so that it is small."""

    item: dict
    """Its assets name the files below."""
    files: dict[str, str]
    """By band, and the classification as SCL."""

    def places(self, columns_rows):
        """(n, 2) longitude and latitude of (column, row) in pixels of 100 m."""
        with rasterio.open(self.files["B04"]) as source:
            x, y = source.transform @ np.asarray(columns_rows, float).T
            return np.column_stack(Transformer.from_crs(source.crs, 4326, always_xy=True).transform(x, y))


def whole_scene(item, files):
    """A scene of these files, whose item names them in the place of the archive's."""
    assets = {colour: item["assets"][colour] | {"href": files[band]} for band, colour in NAMES.items()}
    return WholeScene(item | {"assets": assets}, files)


def made_scene(folder):
    """A scene of hills under noise, which compresses about as a real one does, with vegetation everywhere."""
    rng, files = np.random.default_rng(0), {}
    for n, band in enumerate(NAMES):
        size = 10 * metres(band)
        side = SIDE // size
        far = np.linspace(0, 20, side)
        hills = 2500 + 100 * n + 600 * np.sin(far)[:, None] * np.cos(0.7 * far + n)
        data = rng.normal(hills, 250).astype(np.uint16) if band != "SCL" else np.full((side, side), 4, np.uint8)
        files[band] = str(folder / f"{band}.tif")
        profile = {"driver": "COG", "dtype": data.dtype, "count": 1, "height": side, "width": side, "nodata": 0}
        placed = {"crs": OLD.epsg, "transform": from_origin(OLD.left, OLD.top, size, size)}
        with rasterio.open(files[band], "w", compress="deflate", predictor="yes", **profile | placed) as target:
            target.write(data, 1)
    return whole_scene(earth_search(OLD), files)
