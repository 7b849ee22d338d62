"""Reads regions, as users name them, and keeps them beside the products that were cut to them.

A region is a box (`34 -5 42 6`: west, south, east, north), a country by its ISO code or name, or a file of polygons.
Several are united.
"""

import difflib
import io
import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, TypeVar

import geopandas as gpd
import numpy as np
import shapely
from pydantic import BaseModel, ValidationError

from infra import storage
from infra.addresses import as_url, name_of, shown
from infra.bounds import open_parquet
from infra.errors import UserError
from tasks.core.earth.plane import WGS84, Plane
from tasks.core.earth.polygons import Crossed, Polygons, cut, from_plane, polygons_of, united, widened
from tasks.core.earth.region import Region
from tasks.core.earth.sampling import check_land, spaced
from tasks.tables.files import DEGREES, POLYGONS, Place, Table, layer_of, open_table, settled
from tasks.tables.places import find_place, shapes_of

REGION = "region.parquet"  # in the directory of a product
NUMBER = r"[-+]?\d+(?:\.\d*)?"
BOX = re.compile(rf"\s*{NUMBER}(?:(?:\s*,\s*|\s+){NUMBER}){{3}}\s*")
IS_FILE = re.compile(r"[/\\]|\.\w+(?:#.+)?$")
Params = TypeVar("Params", bound=BaseModel)
NAMED = 3  # most parts that a name lists


@lru_cache(maxsize=4)
def _read(texts: tuple[str, ...], buffer_km: float, versions: tuple[str, ...]) -> Region:
    """Returns a region; its files are read again where another version of them is there."""
    parts = [_one(text) for text in texts]
    polygons = united(np.concatenate([part for _, part in parts]))
    if buffer_km:
        polygons = widened(polygons, buffer_km)
    names = [name for name, _ in parts]
    name = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    region = Region(f"{name} + {buffer_km:g} km" if buffer_km else name, polygons)
    try:
        check_land(-90, 90, region)
    except ValueError as error:
        raise UserError(f"{error}{_swapped(polygons)}") from None
    return region


def find_region(texts: Sequence[str], buffer_km: float = 0.0) -> Region | None:
    """Returns the region that texts name, united and widened; None where there are no texts.

    Raises:
        UserError: A text names nothing that is known, or its polygons are not sound or have no land.
    """
    whole = tuple(part for text in texts for part in _parts(text))
    if not whole:
        return None
    return _read(whole, buffer_km, tuple(_version(text) for text in whole if _is_file(text)))


def _version(source: str) -> str:
    try:
        return storage.version(as_url(layer_of(source)[0]))
    except FileNotFoundError:
        raise UserError(f"there is no region {shown(source)} (there is no file of that name): check its path") from None


def keep_region(home: str, region: Region) -> None:
    """Writes a region beside a product that is cut to it, as GeoParquet, unless it is there."""
    if storage.exists(url := storage.join(home, REGION)):
        return
    frame = gpd.GeoDataFrame({"name": [region.name]}, geometry=[shapely.multipolygons(region.polygons)], crs=4326)
    file = io.BytesIO()
    frame.to_parquet(file, compression="zstd")
    storage.write(url, file.getvalue())


def kept_region(home: str) -> Region:
    """Returns the region that is kept beside a product.

    Raises:
        UserError: It is not there.
    """
    url = storage.join(home, REGION)
    try:
        data = storage.read(url)
    except FileNotFoundError:
        raise UserError(f"there is no {shown(url)}, to which the product is cut: copy its whole directory") from None
    row = open_parquet(io.BytesIO(data), shown(url), len(data)).read().to_pylist()[0]
    return Region(row["name"], polygons_of(shapely.from_wkb(row["geometry"])))


def region_of(home: str, told: dict[str, Any]) -> Region:
    """Returns the region of a product with all its polygons, which are beside it; where it is gone, the shape told.

    Args:
        home: URL of the product's directory.
        told: The shape that cards have, perhaps simplified.
    """
    try:
        return kept_region(home)
    except UserError:
        return Region.of(home, told)


def decides(region: Region | None) -> dict[str, Any]:
    """Returns what decides a product that is cut to a region, by its polygons; nothing where there is none."""
    return {} if region is None else {"region": region.digest}


def card_of(region: Region | None) -> dict[str, Any]:
    """Returns what the card of a product tells of its region; nothing where there is none."""
    if region is None:
        return {}
    return {"region": {"name": region.name, "digest": region.digest, "geometry": region.geometry}}


def _parts(text: str) -> list[str]:
    """Returns the single regions that a text names, between commas; a box, a file or a name may have commas too."""
    text = text.strip()
    if BOX.fullmatch(text) or _is_file(text) or _known(text) or "," not in text:
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def _is_file(text: str) -> bool:
    return bool(IS_FILE.search(text)) and not BOX.fullmatch(text) and not _known(text)


def _one(text: str) -> tuple[str, Polygons]:
    """Returns the name and the polygons of a single region."""
    if BOX.fullmatch(text):
        return text, _box(text)
    if _is_file(text):
        return _file(text)
    country = _known(text)
    if country is None:
        raise UserError(
            f"the region {text!r} is no box of four numbers, no file and no country{_likely(text)}: give west, south, "
            "east and north in degrees, a path or URL, an ISO code such as KE, or a name"
        )
    name, shape = country
    return name, cut(np.array([shape]))


def _box(text: str) -> Polygons:
    """Returns a box; west is above east where it crosses 180 degrees."""
    west, south, east, north = map(float, re.findall(NUMBER, text))
    if max(abs(south), abs(north)) > 90 and max(abs(west), abs(east)) <= 90:
        raise UserError(f"the region {text!r} has latitudes beyond 90: give west, south, east, north in this order")
    if not (-90 <= south < north <= 90 and -360 <= west <= 360 and -360 <= east <= 360 and west != east):
        raise UserError(
            f"the region {text!r} is no box on the globe: give west, south, east and north in degrees, south below "
            "north; west above east crosses 180"
        )
    if east - west > 360:
        raise UserError(f"the region {text!r} is wider than the globe: give at most 360 degrees from west to east")
    if east < west:
        east += 360
    middle = np.linspace(west, east, 5)[1:-1]  # no edge is over 180 degrees then
    edge = [west, *middle, east]
    low, high = [(x, south) for x in edge], [(x, north) for x in reversed(edge)]
    return cut(np.array([shapely.Polygon([*low, *high])]))


def numbered(
    params: Params, name: str, km: float, latitudes: tuple[float, float], region: Region | None, refused: str
) -> Params:
    """Returns parameters with a number of places in place of their spacing.

    Args:
        params: The parameters, with a `spacing_km`.
        name: The field of the number.
        km: The spacing.
        latitudes: Southern and northern end of the land, in degrees.
        region: The region, None for all land.
        refused: What an error says behind a number that the field does not take.

    Raises:
        UserError: The region has no land, or the field does not take the number.
    """
    try:
        count = spaced(km, *latitudes, region)
        return type(params)(**params.model_dump() | {name: count, "spacing_km": None})
    except ValidationError:
        raise UserError(f"{km:g} km apart the land has {count:,} {refused}") from None
    except ValueError as error:
        raise UserError(str(error)) from None


# Countries


@cache
def countries() -> gpd.GeoDataFrame:
    """Returns the countries of Natural Earth at 1:10 million with their ISO codes and names."""
    return gpd.read_parquet(io.BytesIO(files("tasks.tables").joinpath("countries.parquet").read_bytes()))


@cache
def _by_name() -> dict[str, int]:
    """Returns the rows of the countries by their codes and names, as `_plain` has them."""
    table, found = countries(), dict[str, int]()
    for row in range(len(table) - 1, -1, -1):
        record = table.iloc[row]
        for name in [*record["names"].split("|"), record["iso3"], record["iso2"]]:
            if name:
                found[_plain(name)] = row
    return found


def _known(text: str) -> tuple[str, Any] | None:
    """Returns name and shape of a country; None where there is none of this code or name."""
    row = _by_name().get(_plain(text))
    if row is None:
        return None
    record = countries().iloc[row]
    return record["name"], record["geometry"]


def _plain(name: str) -> str:
    """Returns a name in lower case, without accents and signs."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]|_", "", letters)).strip()


def _likely(text: str) -> str:
    """Returns a hint at the countries whose names are most like a text."""
    near = [countries()["name"].iloc[_by_name()[name]] for name in difflib.get_close_matches(_plain(text), _by_name())]
    return f" (did you mean {' or '.join(dict.fromkeys(near))}?)" if near else ""


# Files


def _file(source: str) -> tuple[str, Polygons]:
    """Returns the polygons of a file of features, in degrees."""
    address, layer = layer_of(source)
    name = layer or re.sub(r"(\.\w+)+$", "", name_of(as_url(address)))
    with open_table(source, POLYGONS) as table:
        return name, np.concatenate([_polygons(layer) for layer in (table, *table.others)])


def _polygons(table: Table) -> Polygons:
    """Returns the polygons of a table, or of one layer of a file."""
    place = table.geometry or find_place(table)
    if not place.geometry:
        raise table.refused("has no geometries: give polygons, as GeoJSON, GeoPackage, shapefile or GeoParquet")
    rows = settled(lambda: list(table.batches([place.geometry])))
    flat = Place(geometry=place.geometry)  # as they are stored
    shapes = [shapes_of(batch[place.geometry], flat, table) for batch in rows]
    return _sound(np.concatenate([np.empty(0, object), *shapes]), place.crs, table)


def _sound(shapes: Polygons, crs: str, table: Table) -> Polygons:
    """Returns the polygons among shapes, in degrees and cut at 180, after checks.

    Raises:
        UserError: There are none, other shapes are among them, or they cross themselves or are not on Earth.
    """
    shapes = shapes[~(shapely.is_missing(shapes) | shapely.is_empty(shapes))]
    if not len(shapes):
        raise table.refused("has no polygons: it is empty")
    kinds = {shape.geom_type for shape in shapes} - {"Polygon", "MultiPolygon"}
    if kinds:
        raise table.refused(f"has geometries of {', '.join(sorted(kinds))}, which have no area: give polygons alone")
    shapes = shapely.force_2d(shapes)
    try:
        polygons = _in_degrees(shapes, crs, table)
    except Crossed as error:
        raise table.refused(
            f"has a polygon that crosses itself ({error}): mend it, for example by shapely's make_valid"
        ) from None
    except ValueError as error:
        raise table.refused(f"has polygons that are not on Earth ({error}): check its CRS") from None
    if not len(polygons) or not shapely.area(polygons).sum():
        raise table.refused("has no polygons with an area: it is empty")
    return polygons


def _in_degrees(shapes: Polygons, crs: str, table: Table) -> Polygons:
    try:
        plane = WGS84 if crs in (DEGREES, WGS84) else _plane_of(crs)
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise table.refused(f"has a CRS that is not known ({reason}): set it, for example EPSG:4326") from None
    if plane is None:
        return from_plane(shapes, crs)
    if plane != WGS84:
        shapes = shapely.transform(shapes, Plane(plane).lonlat)
    _check_degrees(shapes, table)
    return cut(shapes)


def _plane_of(crs: str) -> str | None:
    """Returns the name of a geographic CRS, WGS84 for the same with axes exchanged; None for a projected one."""
    from pyproj import CRS

    found = CRS.from_user_input(crs)
    if not found.is_geographic:
        return None
    return WGS84 if found.equals(CRS(WGS84), ignore_axis_order=True) else found.to_wkt()


def _check_degrees(shapes: Polygons, table: Table) -> None:
    """Refuses polygons that are not on the globe."""
    lon, lat = shapely.get_coordinates(shapes).T
    if not np.isfinite(lon + lat).all():
        raise table.refused("has polygons with coordinates that are no numbers: mend it")
    if max(np.abs(lat).max() - 90, np.abs(lon).max() - 360) <= 0:
        return
    at = int(np.argmax(np.maximum(np.abs(lat) - 90, np.abs(lon) - 360)))
    where = f"has no place at lon {lon[at]:g}, lat {lat[at]:g}"
    if np.abs(lon).max() <= 90 and np.abs(lat).max() <= 360:
        swapped = shapely.transform(shapes, lambda xy: xy[:, ::-1])
        raise table.refused(f"{where}: longitude and latitude may be swapped{_lies(swapped)}. Write longitude first")
    raise table.refused(f"{where}: these may be metres of a projection. Give degrees, or a file that tells its CRS")


def _swapped(polygons: Polygons) -> str:
    """Returns a hint where polygons at sea would lie on land the other way round; else nothing."""
    if np.abs(shapely.bounds(polygons)[:, [0, 2]]).max() > 90:
        return ""
    lies = _lies(shapely.transform(polygons, lambda xy: xy[:, ::-1]))
    return f". Longitude and latitude may be swapped{lies}" if lies else ""


def _lies(shapes: Polygons) -> str:
    """Returns in which countries polygons lie, those first that hold more of them."""
    tree = shapely.STRtree(countries().geometry.values)
    _, row = tree.query(shapely.point_on_surface(shapes), predicate="intersects")
    names = countries()["name"].iloc[row].value_counts().index[:2]
    return f": the other way round they lie in {' and '.join(names)}" if len(names) else ""
