"""Which scene: the items of a catalog that hold a place's whole patch, and the one to read."""

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pystac
import shapely
from numpy.typing import NDArray

from infra import storage
from infra.catalogs import search
from infra.errors import UserError
from infra.settings import settings
from tasks.core.radiometry import baseline, decide
from tasks.core.sampling import TILES
from tasks.params import SampleParams

NAMES = {
    "B01": "coastal",
    "B02": "blue",
    "B03": "green",
    "B04": "red",
    "B05": "rededge1",
    "B06": "rededge2",
    "B07": "rededge3",
    "B08": "nir",
    "B8A": "nir08",
    "B09": "nir09",
    "B11": "swir16",
    "B12": "swir22",
}
SEASON = {month: month % 12 // 3 for month in range(1, 13)}  # 0 December to February, 3 September to November


def find_items(lonlat: NDArray[np.float64], params: SampleParams) -> list[pystac.Item]:
    """The items that may hold any of the places."""
    where = settings()
    geometry = {"type": "MultiPoint", "coordinates": lonlat.tolist()}
    return search(where.stac_url, where.collection, params.datetime, geometry, params.max_cloud_percent)


def choose(
    items: list[pystac.Item], candidates: NDArray[np.float64], params: SampleParams
) -> list[tuple[pystac.Item | None, str]]:
    """For each candidate the item to read, or why there is none; the newest baseline among duplicates.

    Args:
        items: Scenes that may hold them.
        candidates: (n, 5): row id, lon, lat, season (-1 any), and the number that thins by tile (see `thin`).
        params: How to choose.
    """
    corners = patch_corners(candidates[:, 1:3], params.patch_pixels * params.resolution_m)
    holds = [_holds(item, corners) for item in items]
    return [
        _choose([item for item, held in zip(items, holds, strict=True) if held[i]], candidate, params)
        for i, candidate in enumerate(candidates)
    ]


def _choose(
    items: list[pystac.Item], candidate: NDArray[np.float64], params: SampleParams
) -> tuple[pystac.Item | None, str]:
    tiles = {_tile(item) for item in items}
    if params.places == "tile" and tiles and candidate[4] * TILES >= len(tiles):
        return None, "passed over for equal tiles"
    found = newest(items)
    if params.scene == "seasons":
        found = [item for item in found if SEASON[_day(item).month] == candidate[3]]
    if not found:
        return None, "no scene"
    if params.scene == "nearest":
        day = datetime.date.fromisoformat(str(params.date))
        return min(found, key=lambda item: (abs((_day(item) - day).days), _cloud(item), item.id)), ""
    return min(found, key=lambda item: (_cloud(item), item.id)), ""


def newest(items: Iterable[pystac.Item]) -> list[pystac.Item]:
    """Of items of one acquisition and tile only the newest processing baseline."""
    found: dict[str, pystac.Item] = {}
    for item in items:
        acquisition = f"{item.properties.get('s2:datatake_id', '')} {_tile(item)} {_day(item)}"
        found[acquisition] = max(found.get(acquisition, item), item, key=lambda i: (version(i), i.id))
    return list(found.values())


def explain(place: str) -> dict[str, Any]:
    """How the numbers of the STAC item at a path or URL become reflectance, and why.

    Returns:
        `offset` (DN), `scale`, `nodata`, `already_applied`, `reasons`, `quarantined`.

    Raises:
        UserError: There is no STAC item.
    """
    try:
        item = json.loads(storage.read(storage.as_url(place)))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{place} is no STAC item ({type(error).__name__}): give the JSON of one item") from None
    if not isinstance(item, dict) or item.get("type") != "Feature" or not isinstance(item.get("assets"), dict):
        raise UserError(f"{place} is no STAC item: give a GeoJSON Feature with assets")
    return asdict(decide(item))


def _cloud(item: pystac.Item) -> float:
    return float(item.properties.get("eo:cloud_cover", 0))


def _day(item: pystac.Item) -> datetime.date:
    taken = item.datetime or item.common_metadata.start_datetime
    if taken is None:
        raise UserError(f"the item {item.id} has no datetime: the catalog is broken, use another collection")
    return taken.date()


def patch_corners(lonlat: NDArray[np.float64], side_m: float) -> NDArray[np.float64]:
    """Corners of the patches and their centres, (n, 5, 2) in degrees, a little outside for safety."""
    half = 0.5 * 1.1 * side_m / 111_200
    lat = lonlat[:, None, 1] + half * np.array([1, 1, -1, -1, 0])
    width = half / np.cos(np.radians(np.clip(np.abs(lat), 0, 89)))
    lon = lonlat[:, None, 0] + width * np.array([-1, 1, -1, 1, 0])
    return np.stack([(lon + 180) % 360 - 180, lat], axis=-1)


def _holds(item: pystac.Item, corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    geometry = shapely.geometry.shape(item.geometry)
    shapely.prepare(geometry)
    return shapely.intersects_xy(geometry, corners[..., 0], corners[..., 1]).all(1)


def version(item: pystac.Item) -> tuple[int, int]:
    """The processing baseline, (0, 0) where nothing tells it."""
    return baseline({"id": item.id, "properties": item.properties}) or (0, 0)


def _tile(item: pystac.Item) -> str:
    return str(item.properties.get("s2:mgrs_tile") or item.properties.get("grid:code") or item.id)


def asset_keys(item: pystac.Item) -> dict[str, str]:
    """Asset key by band name (`B04`) and `SCL`: by key, by common name, or by what the asset says of its band."""
    found: dict[str, str] = {}
    for band, common in [*NAMES.items(), ("SCL", "scl")]:
        for key, asset in item.assets.items():
            bands = asset.extra_fields.get("eo:bands") or asset.extra_fields.get("bands") or []
            named = len(bands) == 1 and bands[0].get("name") == band
            if key in (band, common) or (named and key != "visual"):
                found.setdefault(band, key)
    return found
