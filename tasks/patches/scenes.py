"""Chooses scenes: finds the items of a catalog that hold a place's whole patch, and ranks them."""

import datetime
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from infra import storage
from infra.addresses import shown
from infra.errors import UserError
from infra.imagery.assets import Access, Asset
from infra.stac.catalogs import ask, search
from infra.stac.items import UsableItem
from tasks.core.earth.sampling import TILES
from tasks.core.earth.sphere import KM_PER_DEGREE
from tasks.core.sentinel2.items import acquisition, band_assets, band_sources, baseline, tile, unread
from tasks.core.sentinel2.radiometry import decide
from tasks.params import SampleParams
from tasks.patches.reasons import Reason

MOST_SCENES = 12  # most scenes tried for one place: each costs two requests for its scene classification
SEASON = {month: month % 12 // 3 for month in range(1, 13)}  # 0 December to February, 3 September to November


def find_items(lonlat: NDArray[np.float64], params: SampleParams) -> list[UsableItem]:
    """Returns the items that hold any of the places, from the first catalog that answers."""
    return ask(lambda catalog: search(catalog, params.datetime, lonlat, params.max_cloud_percent))


def choose(
    items: list[UsableItem], candidates: NDArray[np.float64], params: SampleParams
) -> list[tuple[UsableItem | None, str]]:
    """Returns for each candidate the item that is read first, or none and why; see `rank_scenes`."""
    return [(next(iter(ranked), None), reason) for ranked, reason in rank_scenes(items, candidates, params)]


def rank_scenes(
    items: list[UsableItem], candidates: NDArray[np.float64], params: SampleParams
) -> list[tuple[list[UsableItem], str]]:
    """Returns for each candidate the items that may be read, in the order of preference, or why there is none.

    Those of the newest baselines come first, then older processings of the same acquisitions, then what lacks a band.
    An item whose radiometry is quarantined is chosen by nobody, so that another scene of the place can be.

    Args:
        items: Scenes that may hold them.
        candidates: (n, 5): row id, lon, lat, season (-1 any), and the number that thins by tile (see `thin`).
        params: How to choose.
    """
    scenes = [describe(item) for item in items]
    holds = holders(items, candidates, params)
    return [
        _rank([scene for scene, held in zip(scenes, holds, strict=True) if held[i]], candidate, params)
        for i, candidate in enumerate(candidates)
    ]


def holders(items: list[UsableItem], candidates: NDArray[np.float64], params: SampleParams) -> NDArray[np.bool_]:
    """Tells which items hold the whole patch of which candidates, (item, candidate)."""
    corners = patch_corners(candidates[:, 1:3], params.patch_pixels * params.resolution_m)
    return np.array([_holds(item, corners) for item in items], bool).reshape(len(items), len(candidates))


class Scene(NamedTuple):
    """An item, with the facts by which it is chosen."""

    item: UsableItem
    """The item."""
    tile: str
    """MGRS tile."""
    overpass: str
    """The acquisition: the same for every processing of it."""
    version: tuple[int, int]
    """Processing baseline, (0, 0) where nothing tells it."""
    day: datetime.date
    """Time of the acquisition."""
    cloud: float
    """Cloud cover in percent; 100 where it is not stated."""
    quarantined: bool
    """Whether its radiometry is quarantined."""
    bands: frozenset[str]
    """Its bands, and SCL."""


def describe(item: UsableItem) -> Scene:
    """Returns the facts by which an item is chosen."""
    facts, told = _facts(item), item.properties.get("eo:cloud_cover")
    return Scene(
        item=item,
        tile=tile(facts),
        overpass=acquisition(facts),
        version=baseline(facts) or (0, 0),
        day=item.begin.date(),
        cloud=100.0 if told is None else float(told),
        quarantined=decide(facts).quarantined,
        bands=frozenset(band_assets(facts)),
    )


def _rank(scenes: list[Scene], candidate: NDArray[np.float64], params: SampleParams) -> tuple[list[UsableItem], str]:
    tiles = {scene.tile for scene in scenes}
    if params.places == "tile" and tiles and candidate[4] * TILES >= len(tiles):
        return [], Reason.THINNED
    if params.scene == "seasons":
        scenes = [scene for scene in scenes if SEASON[scene.day.month] == candidate[3]]
    known = [scene for scene in scenes if not scene.quarantined]
    if not known:
        return [], Reason.QUARANTINED if scenes else Reason.NO_SCENE
    found = ordered(known, params)
    if params.scene == "composite":
        found = alike(found, {*params.bands, "SCL"})
    return [scene.item for scene in found[:MOST_SCENES]], ""


def alike(scenes: list[Scene], wanted: set[str]) -> list[Scene]:
    """Returns the first of a place's scenes, and those that belong into one image with it.

    They have its tile, and so its grid, and its season; all bands; and each acquisition once, in its newest processing.
    """
    first, best = scenes[0], {scene.item.id for scene in newest(scenes)}
    season = _season(first.day)
    of_one = [scene for scene in scenes if (scene.tile, _season(scene.day)) == (first.tile, season)]
    return [first, *(s for s in of_one[1:] if s.item.id in best and wanted <= s.bands and s.overpass != first.overpass)]


def _season(day: datetime.date) -> tuple[int, int]:
    """Returns year and season of a day; December belongs to the winter of the year that follows."""
    return day.year + (day.month == 12), SEASON[day.month]


def ordered(scenes: list[Scene], params: SampleParams) -> list[Scene]:
    """Returns scenes of a place in the order in which they are tried."""
    best = newest(scenes)
    newer = {scene.item.id for scene in best}
    latest = {scene.overpass: scene.item.id for scene in sorted(best, key=lambda scene: scene.item.id)}
    wanted = {*params.bands, "SCL"}

    def preference(scene: Scene) -> tuple[Any, ...]:
        again = latest[scene.overpass] != scene.item.id  # of two alike, the one that was made later comes first
        standing = (not wanted <= scene.bands, scene.item.id not in newer)
        return *standing, _days_off(scene, params), scene.cloud, again, scene.item.id

    return sorted(scenes, key=preference)


def _days_off(scene: Scene, params: SampleParams) -> int:
    """Days between a scene and the date that it should be near to; 0 where any date will do."""
    if params.scene != "nearest":
        return 0
    return abs((scene.day - datetime.date.fromisoformat(str(params.date))).days)


def newest(scenes: Iterable[Scene]) -> list[Scene]:
    """Returns the scenes of one acquisition and tile with the newest processing baseline.

    There can be several such: a tile comes in two halves where its overpass was sent down in two parts.
    """
    found = list(scenes)
    best: dict[str, tuple[int, int]] = {}
    for scene in found:
        best[scene.overpass] = max(best.get(scene.overpass, scene.version), scene.version)
    return [scene for scene in found if scene.version == best[scene.overpass]]


def _facts(item: UsableItem) -> dict[str, Any]:
    """Returns the item as a dictionary, without copying all of it."""
    assets = {
        key: {"href": asset.href, "type": asset.media_type, "roles": asset.roles, **asset.extra_fields}
        for key, asset in item.assets.items()
    }
    return {"id": item.id, "properties": item.properties, "assets": assets}


def explain(place: str) -> dict[str, Any]:
    """Returns how pixel values of the STAC item at a path or URL become reflectance, and why.

    Returns:
        `offset` (DN), `scale`, `nodata`, `already_applied`, `reasons`, `quarantined`.

    Raises:
        UserError: There is no STAC item.
    """
    try:
        item = json.loads(storage.read(storage.as_url(place)))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{shown(place)} is no STAC item ({type(error).__name__}): give the JSON of one item") from None
    if not isinstance(item, dict) or item.get("type") != "Feature" or not isinstance(item.get("assets"), dict):
        raise UserError(f"{shown(place)} is no STAC item: give a GeoJSON Feature with assets")
    return asdict(decide(item))


def patch_corners(lonlat: NDArray[np.float64], side_m: float) -> NDArray[np.float64]:
    """Corners of the patches and their centres, (n, 5, 2) in degrees, a little outside for safety."""
    half = 0.5 * 1.1 * side_m / (1000 * KM_PER_DEGREE)
    lat = lonlat[:, None, 1] + half * np.array([1, 1, -1, -1, 0])
    width = half / np.cos(np.radians(np.clip(np.abs(lat), 0, 89)))
    lon = lonlat[:, None, 0] + width * np.array([-1, 1, -1, 1, 0])
    return np.stack([(lon + 180) % 360 - 180, lat], axis=-1)


def _holds(item: UsableItem, corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    shapely.prepare(item.shape)
    return shapely.intersects_xy(item.shape, corners[..., 0], corners[..., 1]).all(1)


def version(item: UsableItem) -> tuple[int, int]:
    """Returns the processing baseline, (0, 0) where none is stated."""
    return baseline(_facts(item)) or (0, 0)


def assets_of(item: UsableItem) -> dict[str, Asset]:
    """Returns what is read of each band, `B04` or `SCL`, as the catalog gave it: its query may sign it."""
    facts = _facts(item)
    crs = str(item.properties.get("proj:code") or item.properties.get("proj:epsg") or _zone(tile(facts)))
    found = {}
    for band, source in band_sources(facts).items():
        told = facts["assets"][source.key]
        own = str(told.get("proj:code") or told.get("proj:epsg") or crs) if source.format else ""
        found[band] = Asset(source.href, source.format, own, Access(**told.get("access") or {}))
    return found


def _zone(name: str) -> str:
    """Returns the CRS of an MGRS tile such as `31TCJ`; empty for what is none."""
    match = re.fullmatch(r"(\d\d)([C-X])[A-Z]{2}", name)
    return f"EPSG:{32600 + int(match[1]) + 100 * (match[2] < 'N')}" if match else ""


def unread_bands(item: UsableItem) -> dict[str, str]:
    """Returns the media types of bands that no reader takes."""
    return unread(_facts(item))
