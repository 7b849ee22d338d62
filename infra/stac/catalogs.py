"""Searches STAC catalogs, APIs and files alike, for usable items.

A catalog is the root of a STAC API, or a file: stac-geoparquet (`.parquet`, `.geoparquet`) or an item collection
(`.json`, `.geojson`, `.ndjson`, `.jsonl`) at a path, `file://`, `s3://` or `https://`. A second one, where it is set,
stands in while the first does not answer.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import pystac
import shapely
from numpy.typing import NDArray

from infra import storage
from infra.addresses import absolute, may_read, shown
from infra.errors import CatalogUnavailable, UserError
from infra.imagery.assets import PUBLIC
from infra.intervals import Interval
from infra.settings import Settings, settings
from infra.stac.access import Way, ways
from infra.stac.api import Features, open_api, search_api
from infra.stac.files import is_file, open_file, search_file
from infra.stac.items import BROKEN, UsableItem

T = TypeVar("T")

POINTS = 150  # points in one request: as a GET it stays below the 8 kB that servers take
WIDEST = 9.0  # degrees of longitude of the widest scene, at 84 degrees of latitude
REST = 600.0  # seconds for which a catalog that did not answer is skipped in favour of the fallback

log = logging.getLogger("rangegrid")
_rests: dict["Catalog", float] = {}  # until when, on the monotonic clock


@dataclass(frozen=True)
class Catalog:
    """A catalog with one collection."""

    url: str
    """Root of a STAC API, or a stac-geoparquet or item-collection file."""
    collection: str
    """Collection id."""


def catalogs() -> list[Catalog]:
    """Returns the catalog of the settings, and the fallback catalog where one is set."""
    where = settings()
    first = Catalog(where.stac_url, where.collection)
    if where.fallback_stac_url is None:
        return [first]
    return [first, Catalog(where.fallback_stac_url, where.fallback_collection or where.collection)]


def ask(question: Callable[[Catalog], T]) -> T:
    """Asks the first catalog, or the fallback where the first does not answer.

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
            log.warning("%s. %s stands in", error, shown(last.url))
    return question(last)


def collection_title(catalog: Catalog) -> str:
    """Returns the title of the collection, empty in a file, after a check that the catalog serves it.

    Raises:
        UserError: Nothing answers there, or it lacks the collection.
    """
    if not is_file(catalog.url):
        return open_api(catalog.url, catalog.collection).collection.title or ""
    known = set(open_file(catalog.url).collections)
    if known and not {"", catalog.collection} & known:
        raise UserError(
            f"{shown(catalog.url)} has no items of {catalog.collection!r}: set RANGEGRID_COLLECTION to one of "
            f"{', '.join(sorted(known))}"
        )
    return ""


def search(catalog: Catalog, interval: str, lonlat: NDArray[np.float64], max_cloud_percent: float) -> list[UsableItem]:
    """Returns the items of a collection that hold any of the points, each once, in a stable order.

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
        features = search_file(catalog.url, lonlat, window)
    else:
        found = Features()
        for points in _chunks(lonlat):
            found.add(search_api(catalog.url, catalog.collection, window, points, max_cloud_percent).all())
        features = found.all()
    ours = [feature for feature in features if _collection_of(feature) in (None, catalog.collection)]
    items: dict[str, UsableItem] = {}
    for item in _usable(catalog, ours):
        if _fits(item, window, lonlat, max_cloud_percent):
            items[item.id] = _newer(items.get(item.id, item), item)
    return sorted(items.values(), key=lambda item: item.id)


def _collection_of(feature: Any) -> Any:
    if isinstance(feature, dict):
        return feature.get("collection")
    return None


def _newer(one: UsableItem, other: UsableItem) -> UsableItem:
    """Returns the item with the later update of two with one id, else always the same one, in any order."""
    if one is other:
        return one
    return max(
        one, other, key=lambda item: (str(item.properties.get("updated", "")), json.dumps(_plain(item), default=str))
    )


def _plain(item: pystac.Item) -> dict[str, Any]:
    return item.to_dict(include_self_link=False, transform_hrefs=False)


def _chunks(lonlat: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Yields the points of each request, neighbours together, so that few items come twice.

    Near 180 degrees the opposite side is asked for too: to a server that reckons in the plane, a footprint that was
    written unsplit lies there.
    """
    opposite = lonlat[np.abs(lonlat[:, 0]) > 180 - WIDEST] * [0, 1]
    asked = np.concatenate([lonlat, opposite])
    asked = asked[np.lexsort((asked[:, 0], np.floor(asked[:, 1])))]
    return [asked[start : start + POINTS] for start in range(0, len(asked), POINTS)]


def _fits(item: UsableItem, window: Interval, lonlat: NDArray[np.float64], max_cloud_percent: float) -> bool:
    cloud = item.properties.get("eo:cloud_cover")
    return (
        window.meets(item.begin, item.end)
        and (cloud is None or cloud <= max_cloud_percent)
        and bool(shapely.intersects_xy(item.shape, *lonlat.T).any())
    )


def _usable(catalog: Catalog, features: Iterable[Any]) -> list[UsableItem]:
    """Returns items with a place, a time and readable assets; skipped ones are counted in the log."""
    items, broken, refused, where = [], 0, 0, settings()
    for feature in features:
        try:
            item = UsableItem.parse(feature)
            refused += _resolve(item, catalog, where)
        except BROKEN:
            broken += 1
            continue
        item.extra_fields["catalog"] = shown(catalog.url)
        items.append(item)
    if broken or refused:
        log.warning(
            "%s: passed over %d items without place, time or assets, and %d assets at refused addresses",
            *(shown(catalog.url), broken, refused),
        )
    return items


def _resolve(item: pystac.Item, catalog: Catalog, where: Settings) -> int:
    """Makes the assets' hrefs absolute, takes the best of several ways, and drops what may not be read; tells how many.

    Beside a file its own address counts: the items' links tell where they once came from.
    """
    if is_file(catalog.url):
        base = catalog.url
    else:
        base = item.get_self_href() or catalog.url
    local = urlsplit(catalog.url).scheme in ("", "file")
    refused = []
    for key, asset in item.assets.items():
        found = [way._replace(href=absolute(way.href, storage.as_url(base))) for way in ways(item, asset, where)]
        may = [way for way in found if _may_go(way, local, where.asset_hosts)]
        best = min(may or found, key=lambda way: way.rank)
        asset.href = best.href
        if best.access != PUBLIC:
            asset.extra_fields["access"] = asdict(best.access)
        refused += [] if may else [key]
    for key in refused:
        del item.assets[key]
    return len(refused)


def _may_go(way: Way, local: bool, hosts: tuple[str, ...]) -> bool:
    """Tells whether we may read from a way's host or bucket, and from the endpoint that its item tells."""
    endpoint = way.access.endpoint
    return may_read(way.href, local, hosts) and (not endpoint or may_read(endpoint, False, hosts))
