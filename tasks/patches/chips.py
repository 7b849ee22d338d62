"""Finds the images of a folder that others made, and reads each as a patch.

- S2-100K, as microsoft/satclip publishes it: `index.csv` with columns lat, lon and fn, and files of twelve bands in
  `images/` or beside it. Further columns are taken as properties of a STAC item: datetime, s2:processing_baseline ...
- Chips without an index: every GeoTIFF below the folder. Files that are named by their bands belong to one image:
  those of one directory (`B02.tif`, `B03.tif` ..., as of Major TOM), or those in directories that are named by bands
  (`B02_B03_B04_B08/geotiff.tif`, as of rslearn, whose `items.json` tells the scene).
"""

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.io import DatasetReader
from rasterio.warp import transform

from infra import storage
from infra.addresses import is_web, shown
from infra.bounds import check_expansion
from infra.errors import UserError
from tasks.params import BANDS, ImportParams
from tasks.patches.reasons import Reason
from tasks.tables.files import LAT, LON, word_of

INDEX, IMAGES = "index.csv", "images"
TIFF = (".tif", ".tiff")
FILE = ("fn", "filename", "file", "path")  # names of an index's column of files
MOMENT = ("datetime", "date", "time", "timestamp")  # names of an index's column of times
PRODUCT = re.compile(r"S2([A-Z])_MSIL\dA_(\d{8}T\d{6})(?:_N\d{4})?_R\d{3}_T\d{2}[A-Z]{3}(?:_\d{8}T\d{6})?")
LAYER = re.compile(r"^(.*?)/?layers/([^/]+)")  # of rslearn: a window's directory, and a layer of it
GROUP = re.compile(r"(.+?)(?:\.(\d+))?")  # of rslearn: a layer, and the number of its item group
WORDS = {"true": True, "false": False}
ALIKE = 1e-3  # metres by which the corners of an image's bands may differ
UTM = (range(32601, 32661), range(32701, 32761))  # EPSG codes


class Refused(Exception):
    """An image, or a row of an index, that cannot be a patch; the text is a `Reason`."""


@dataclass(frozen=True)
class Chip:
    """An image of a folder, not opened yet."""

    row: int
    """Number of its row in the index, or of its name among all names."""
    files: dict[str, tuple[str, ...]]
    """Paths of its files, from the folder, with the bands that their names tell; none where these do not."""
    place: tuple[float, float] | None = None
    """Longitude and latitude in degrees, where an index tells them."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known of its scene, as a STAC item has it: id and properties."""


@dataclass(frozen=True)
class Folder:
    """What a folder holds."""

    url: str
    """URL of the folder."""
    tags: dict[str, str]
    """Paths of its files that count, with what changes when they do."""
    chips: list[Chip]
    """Its images."""
    refused: Counter[str]
    """Numbers of rows and files that are no image, by reason."""


def open_folder(url: str) -> Folder:
    """Lists the images of a folder.

    Raises:
        UserError: There are none, or the index lacks a column.
    """
    if is_web(url):
        raise UserError(f"{shown(url)} cannot be listed: download the folder, or give one on s3:// or of this machine")
    tags = storage.tagged(url)
    images = [path for path in tags if path.lower().endswith(TIFF)]
    if not images:
        raise UserError(f"there are no GeoTIFFs in {shown(url)}: give a folder with {INDEX} and {IMAGES}/, or of chips")
    refused: Counter[str] = Counter()
    if INDEX in tags:
        chips = list(_listed(url, images, refused))
    else:
        chips = list(_found(url, images, tags))
    told = {path: tag for path, tag in tags.items() if path in images or path.endswith((INDEX, "items.json"))}
    return Folder(url, told, chips, refused)


def _listed(url: str, images: list[str], refused: Counter[str]) -> Iterator[Chip]:
    """Yields the images of an index, and counts the rows and files that are none."""
    place = storage.join(url, INDEX)
    rows = csv.DictReader(io.StringIO(storage.read(place).decode("utf-8-sig", "replace")))
    lon, lat, file = _columns(list(rows.fieldnames or []), place)
    there = set(images)
    left = dict.fromkeys(images)
    for number, row in enumerate(rows):
        try:
            path = _path(row[file], left, there)
            del left[path]
            degrees = _degrees(row[lon], row[lat])
        except Refused as error:
            refused[str(error)] += 1
            continue
        told = {name: text for name, text in row.items() if name not in (lon, lat, file, None) and text}
        yield Chip(number, {path: ()}, degrees, _facts(path, told))
    refused.update({Reason.UNLISTED: len(left)} if left else {})


def _columns(names: list[str], place: str) -> list[str]:
    """Returns the columns of longitude, latitude and file."""
    found = []
    for kind, words in (("lon", LON), ("lat", LAT), ("fn", set(FILE))):
        fits = [name for name in names if word_of(name) in words]
        if not fits:
            raise UserError(f"{shown(place)} has no column {kind!r} among {', '.join(names)}: rename the one that is")
        found.append(fits[0])
    return found


def _path(name: str | None, left: Mapping[str, None], there: set[str]) -> str:
    """Returns the path of a row's file."""
    tried = [f"{IMAGES}/{name}", str(name)]
    path = next((path for path in tried if path in left), None)
    if path is None:
        raise Refused(Reason.TWICE if set(tried) & there else Reason.NO_FILE)
    return path


def _degrees(lon: str | None, lat: str | None) -> tuple[float, float]:
    try:
        place = float(lon or ""), float(lat or "")
    except ValueError:
        raise Refused(Reason.NO_PLACE) from None
    if not (-180 <= place[0] <= 180 and -90 <= place[1] <= 90):
        raise Refused(Reason.NO_PLACE)
    return place


def _found(url: str, images: list[str], tags: Mapping[str, str]) -> Iterator[Chip]:
    """Yields the images of a folder without an index: single files, and files that are named by their bands."""
    groups: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for path in images:
        home, bands = _home(PurePosixPath(path))
        groups[home][path] = bands
    for number, (home, files) in enumerate(sorted(groups.items())):
        named = {path: bands for path, bands in files.items() if bands}
        yield Chip(number, named or files, None, _facts(home, _layer(url, home, tags)))


def _home(path: PurePosixPath) -> tuple[str, tuple[str, ...]]:
    """Returns what tells an image from others, and the bands that a path's name tells; none where it does not."""
    for part, home in ((path.stem, path.parent), (path.parent.name, path.parent.parent)):
        if bands := _bands(part):
            return str(home), bands
    return str(path), ()


def _bands(name: str) -> tuple[str, ...]:
    """Returns the bands of a name such as `B02`, `b2` or `B02_B03_B04`; none where another word is in it."""
    words = [re.sub(r"^B(\d)$", r"B0\1", word) for word in re.split(r"[_\W]+", name.upper()) if word]
    if words and set(words) <= set(BANDS):
        return tuple(words)
    return ()


def _layer(url: str, home: str, tags: Mapping[str, str]) -> dict[str, Any]:
    """Returns what rslearn's `items.json` tells of the first scene of a layer."""
    match = LAYER.match(home)
    path = f"{match[1]}/items.json".lstrip("/") if match else ""
    if not match or path not in tags:
        return {}
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        name, number = GROUP.fullmatch(match[2]).groups()  # type: ignore[union-attr]
        layers = {layer["layer_name"]: layer for layer in storage.read_json(storage.join(url, path))}
        scene = layers[name]["serialized_item_groups"][int(number or 0)][0]
        return {"s2:product_uri": scene["name"], "datetime": scene["geometry"]["time_range"][0]}
    return {}


def _facts(path: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an image's facts in a STAC item's form: its id is the product's where a name tells it."""
    properties = {name: WORDS.get(str(value).lower(), value) for name, value in told.items()}
    times = [value for name, value in told.items() if word_of(name) in MOMENT]
    product = PRODUCT.search(" ".join(map(str, [*told.values(), path])))
    known = {"datetime": times[0]} if times else {}
    if product:
        when = datetime.strptime(product[2], "%Y%m%dT%H%M%S").isoformat() + "Z"
        known = {"platform": f"Sentinel-2{product[1]}", "datetime": when} | known
    return {"id": product[0] if product else path, "properties": known | properties, "assets": {}}


def read_chip(url: str, chip: Chip, params: ImportParams) -> tuple[NDArray[np.uint16], tuple[float, float]]:
    """Reads the middle of an image.

    Args:
        url: The folder.
        chip: The image.
        params: Bands, side and pixel size.

    Returns:
        The patch, (band, y, x), 0 where there is no data; and its place, longitude and latitude.

    Raises:
        Refused: It cannot be a patch.
    """
    layers: dict[str, NDArray[np.uint16]] = {}
    frames = set()
    for path, named in chip.files.items():
        found, frame = _read_file(storage.join(url, path), named, params)
        layers |= found
        frames.add(frame)
    missing = [band for band in params.bands if band not in layers]
    if missing:
        raise Refused(f"{Reason.MISSING_ASSET} {missing[0]}")
    if len(frames) > 1:
        raise Refused(Reason.SEVERAL_GRIDS)
    crs, *corner = frames.pop()
    pixels, middle = _cut([layers[band] for band in params.bands], params.patch_pixels)
    x, y = corner[0] + middle[0] * params.resolution_m, corner[1] - middle[1] * params.resolution_m
    return pixels, _placed(chip.place, f"EPSG:{crs}", (x, y), params)


def _read_file(
    url: str, named: tuple[str, ...], params: ImportParams
) -> tuple[dict[str, NDArray[np.uint16]], tuple[int, float, float]]:
    """Returns the wanted bands of a file at the patches' pixel size; and its EPSG code and upper left corner."""
    try:
        data = storage.read(url)
    except FileNotFoundError:
        raise Refused(Reason.NO_FILE) from None
    try:
        with rasterio.MemoryFile(data) as memory, memory.open(driver="GTiff") as file:
            size = file.count * file.height * file.width * np.dtype(file.dtypes[0]).itemsize
            check_expansion(shown(url), len(data), size)
            frame, repeats = _frame(file, params.resolution_m)
            bands = {band: i for i, band in enumerate(_bands_of(file, named), 1) if band in params.bands}
            read = file.read(list(bands.values()), masked=True).filled(0)
    except (rasterio.errors.RasterioError, UserError):
        raise Refused(Reason.NO_IMAGE) from None
    layers = read.repeat(repeats, axis=1).repeat(repeats, axis=2)
    return dict(zip(bands, layers, strict=True)), frame


def _bands_of(file: DatasetReader, named: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of a file's bands: by their descriptions, else by its name, else all twelve in their order."""
    described = _bands(" ".join(text or "" for text in file.descriptions))
    for bands in (described, named, BANDS):
        if len(bands) == file.count:
            return bands
    raise Refused(Reason.UNKNOWN_BANDS)


def _frame(file: DatasetReader, resolution_m: float) -> tuple[tuple[int, float, float], int]:
    """Returns EPSG code and upper left corner of a file, and how often its pixels are repeated."""
    if set(file.dtypes) != {"uint16"}:
        raise Refused(Reason.NOT_UINT16)
    zone = _zone(file.crs)
    grid = file.transform
    if grid.b or grid.d or not grid.a > 0 or abs(grid.a + grid.e) > ALIKE:
        raise Refused(Reason.NOT_SQUARE)
    repeats = round(grid.a / resolution_m)
    if repeats < 1 or abs(grid.a - repeats * resolution_m) > ALIKE:
        raise Refused(Reason.PIXEL_SIZE)
    return (zone, round(grid.c / ALIKE) * ALIKE, round(grid.f / ALIKE) * ALIKE), repeats


def _zone(crs: CRS | None) -> int:
    """Returns the EPSG code of a UTM zone."""
    code = crs.to_epsg() if crs else None
    if code is None or not any(code in codes for codes in UTM):
        raise Refused(Reason.NOT_UTM)
    return int(code)


def _cut(layers: list[NDArray[np.uint16]], side: int) -> tuple[NDArray[np.uint16], tuple[float, float]]:
    """Returns the middle of bands, (band, side, side), and its centre in pixels from the left and from the top."""
    height, width = np.min([layer.shape for layer in layers], axis=0)  # 60 m bands can reach beyond the others
    if min(height, width) < side:
        raise Refused(Reason.TOO_SMALL)
    top, left = (height - side) // 2, (width - side) // 2
    cut = np.stack([layer[top : top + side, left : left + side] for layer in layers])
    return cut, (left + side / 2, top + side / 2)


def _placed(
    told: tuple[float, float] | None, crs: str, centre: tuple[float, float], params: ImportParams
) -> tuple[float, float]:
    """Returns the place of a patch's centre, as the index has it where that is within a pixel of it."""
    lon, lat = transform(crs, "EPSG:4326", [centre[0]], [centre[1]])
    if told is None:
        return lon[0], lat[0]
    x, y = transform("EPSG:4326", crs, [told[0]], [told[1]])
    off = max(abs(x[0] - centre[0]), abs(y[0] - centre[1])) / params.resolution_m
    if not off <= params.patch_pixels / 2:
        raise Refused(Reason.ELSEWHERE)
    return told if off <= 1 else (lon[0], lat[0])
