"""STAC catalogs: one search over APIs and files, whose items can be used.

A catalog is the root of a STAC API, or a file: stac-geoparquet (`.parquet`, `.geoparquet`) or an item collection
(`.json`, `.geojson`, `.ndjson`, `.jsonl`) at a path, `file://`, `s3://` or `https://`. A second one, where it is set,
stands in while the first does not answer.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import pystac
import shapely
from numpy.typing import NDArray

from infra import storage
from infra.addresses import absolute, may_read, unsigned
from infra.errors import CatalogUnavailable, UserError
from infra.intervals import Interval
from infra.settings import settings
from infra.stac.api import Features, open_api, search_api
from infra.stac.files import is_file, open_file, search_file

T = TypeVar("T")

POINTS = 150  # in one request: as a GET it stays below the 8 kB that servers take
WIDEST = 9.0  # degrees of longitude: a scene at 84 degrees of latitude
REST = 600.0  # seconds for which a catalog that did not answer is passed over where another stands in
BROKEN = (  # what JSON that is no item raises
    *(KeyError, TypeError, ValueError, AttributeError, OverflowError),
    *(pystac.STACError, pystac.STACTypeError, shapely.errors.ShapelyError),
)

log = logging.getLogger("rangegrid")
_rests: dict["Catalog", float] = {}  # until when, on the monotonic clock


@dataclass(frozen=True)
class Catalog:
    """Where the items of one collection are."""

    url: str
    """Root of a STAC API, or a stac-geoparquet or item-collection file."""
    collection: str
    """Collection id."""


def catalogs() -> list[Catalog]:
    """The catalog of the settings, and the one that stands in for it where one is set."""
    where = settings()
    first = Catalog(where.stac_url, where.collection)
    if where.fallback_stac_url is None:
        return [first]
    return [first, Catalog(where.fallback_stac_url, where.fallback_collection or where.collection)]


def ask(question: Callable[[Catalog], T]) -> T:
    """Asks the first catalog, or the one that stands in for it where the first does not answer.

    Raises:
        UserError: None answers, or one that does lacks the collection.
    """
    *before, last = catalogs()
    for catalog in before:
        if time.monotonic() < _rests.get(catalog, 0):
            continue
        try:
            return question(catalog)
        except CatalogUnavailable as error:
            _rests[catalog] = time.monotonic() + REST
            log.warning("%s. %s stands in", error, unsigned(last.url))
    return question(last)


def collection_title(catalog: Catalog) -> str:
    """The title of the collection, empty in a file, after checking that the catalog serves it.

    Raises:
        UserError: Nothing answers there, or it lacks the collection.
    """
    if not is_file(catalog.url):
        return open_api(catalog.url, catalog.collection).collection.title or ""
    known = set(open_file(catalog.url).collections)
    if known and not {"", catalog.collection} & known:
        raise UserError(
            f"{unsigned(catalog.url)} has no items of {catalog.collection!r}: set RANGEGRID_COLLECTION to one of "
            f"{', '.join(sorted(known))}"
        )
    return ""


def search(catalog: Catalog, interval: str, lonlat: NDArray[np.float64], max_cloud_percent: float) -> list[pystac.Item]:
    """Items of a collection that hold any of the points, each once, in a stable order.

    What a server does not filter is filtered here. Items that cannot be used (no place, no time, no assets) are
    passed over and counted in the log; so are assets at addresses that nothing should be read from.

    Args:
        catalog: Where to search.
        interval: Time window, as `Interval.parse` takes it.
        lonlat: (n, 2) points in degrees.
        max_cloud_percent: Largest `eo:cloud_cover`; items that do not tell theirs are kept.

    Raises:
        CatalogUnavailable: The catalog does not answer, or never in whole.
        UserError: The catalog lacks the collection, or the interval is none.
    """
    window = Interval.parse(interval)
    if is_file(catalog.url):
        features = search_file(catalog.url, lonlat)
    else:
        found = Features()
        for points in _chunks(lonlat):
            found.add(search_api(catalog.url, catalog.collection, window, points, max_cloud_percent).all())
        features = found.all()
    ours = [feature for feature in features if _collection_of(feature) in (None, catalog.collection)]
    items: dict[str, pystac.Item] = {}
    for item in _usable(catalog, ours):
        if _fits(item, window, lonlat, max_cloud_percent):
            items[item.id] = _newer(items.get(item.id, item), item)
    return sorted(items.values(), key=lambda item: item.id)


def _collection_of(feature: Any) -> Any:
    return feature.get("collection") if isinstance(feature, dict) else None


def _newer(one: pystac.Item, other: pystac.Item) -> pystac.Item:
    """Of two items with one id that which was updated last, else always the same one, in whatever order they come."""
    if one is other:
        return one
    return max(
        one, other, key=lambda item: (str(item.properties.get("updated", "")), json.dumps(_plain(item), default=str))
    )


def _plain(item: pystac.Item) -> dict[str, Any]:
    return item.to_dict(include_self_link=False, transform_hrefs=False)


def _chunks(lonlat: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Points by the request, neighbours together, so that few items come twice.

    Near 180 degrees the opposite side is asked for too: to a server that reckons in the plane, a footprint that was
    written unsplit lies there.
    """
    opposite = lonlat[np.abs(lonlat[:, 0]) > 180 - WIDEST] * [0, 1]
    asked = np.concatenate([lonlat, opposite])
    asked = asked[np.lexsort((asked[:, 0], np.floor(asked[:, 1])))]
    return [asked[start : start + POINTS] for start in range(0, len(asked), POINTS)]


def _fits(item: pystac.Item, window: Interval, lonlat: NDArray[np.float64], max_cloud_percent: float) -> bool:
    cloud = item.properties.get("eo:cloud_cover")
    return (
        window.meets(*_times(item))
        and (cloud is None or cloud <= max_cloud_percent)
        and bool(shapely.intersects_xy(footprint(item.geometry), *lonlat.T).any())
    )


def _times(item: pystac.Item) -> tuple[datetime, datetime]:
    """When the item begins and ends."""
    known = item.common_metadata
    first, last = known.start_datetime or item.datetime, known.end_datetime or item.datetime
    ends = [time if time.tzinfo else time.replace(tzinfo=UTC) for time in (first, last or first) if time]
    return ends[0], ends[-1]


def _usable(catalog: Catalog, features: Iterable[Any]) -> list[pystac.Item]:
    """Items with a place, a time and assets that may be read; what is passed over is counted in the log."""
    items, broken, refused, hosts = [], 0, 0, settings().asset_hosts
    for feature in features:
        try:
            item = _item(feature, catalog)
            refused += _resolve(item, catalog, hosts)
            items.append(item)
        except BROKEN as error:
            if isinstance(error, UserError):
                raise
            broken += 1
    if broken or refused:
        log.warning(
            "%s: passed over %d items without place, time or assets, and %d assets at refused addresses",
            *(unsigned(catalog.url), broken, refused),
        )
    return items


def _item(feature: Any, catalog: Catalog) -> pystac.Item:
    item = pystac.Item.from_dict(feature, preserve_dict=False, migrate=False)  # migration copies all, for nothing here
    cloud = item.properties.get("eo:cloud_cover")
    item.properties["eo:cloud_cover"] = None if cloud is None or math.isnan(float(cloud)) else float(cloud)
    if item.datetime is None:  # the manifest tells when an image begins
        item.datetime, item.properties["datetime"] = _times(item)[0], item.properties["start_datetime"]
    if not item.assets or footprint(item.geometry).is_empty or not _times(item):
        raise ValueError("the item has no place or no assets")
    item.extra_fields["catalog"] = unsigned(catalog.url)
    return item


def footprint(geometry: Any) -> shapely.Geometry:
    """The shape of a GeoJSON geometry between -180 and 180 degrees, split where it crosses the antimeridian.

    A polygon wider than half the Earth is one that crosses and was written unsplit; longitudes beyond 180 are another
    way to write the same.

    Args:
        geometry: GeoJSON in lon, lat.
    """
    parts = shapely.get_parts(shapely.force_2d(shapely.geometry.shape(geometry)))
    return shapely.union_all([piece for part in parts for piece in _split(part)])


def _split(part: shapely.Geometry) -> list[shapely.Geometry]:
    west, _, east, _ = part.bounds
    if east - west > 180:
        part = shapely.make_valid(shapely.transform(part, lambda xy: xy + [360, 0] * (xy[:, :1] < 0)))
        west, _, east, _ = part.bounds
    if west >= -180 and east <= 180:
        return [part]
    worlds = [(turn, shapely.box(turn - 180, -90, turn + 180, 90)) for turn in (-360, 0, 360)]
    return [shapely.transform(part & world, lambda xy, turn=turn: xy - [turn, 0]) for turn, world in worlds]


def _resolve(item: pystac.Item, catalog: Catalog, hosts: tuple[str, ...]) -> int:
    """Makes the assets' hrefs absolute and drops those that may not be read; tells how many.

    Beside a file its own address counts: the items' links tell where they once came from.
    """
    base = catalog.url if is_file(catalog.url) else item.get_self_href() or catalog.url
    local = urlsplit(catalog.url).scheme in ("", "file")
    for asset in item.assets.values():
        asset.href = absolute(asset.href, storage.as_url(base))
    refused = [key for key, asset in item.assets.items() if not may_read(asset.href, local, hosts)]
    for key in refused:
        del item.assets[key]
    return len(refused)
