"""STAC catalogs: searches that survive what real catalogs do."""

from functools import lru_cache
from urllib.parse import urlsplit, urlunsplit

import pystac
from pystac_client import Client
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from requests.exceptions import RequestException
from urllib3 import Retry

from infra.errors import UserError

RETRY = Retry(
    total=6,
    backoff_factor=0.5,
    backoff_jitter=0.5,
    status_forcelist=[429, 500, 502, 503, 504],
    allowed_methods=None,
    respect_retry_after_header=True,
)
PAGE = 100  # items: bigger pages of Sentinel-2 make Earth Search answer 502


@lru_cache(maxsize=8)
def open_catalog(url: str, collection: str) -> Client:
    """A client of the STAC API at `url`, after checking that it serves `collection`.

    Raises:
        UserError: Nothing answers there, or it lacks the collection.
    """
    try:
        client = Client.open(url, stac_io=StacApiIO(max_retries=RETRY, timeout=60))
    except (RequestException, APIError, pystac.STACError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no STAC API answers at {url} ({type(error).__name__}): check RANGEGRID_STAC_URL and the network"
        ) from None
    try:
        served = client.get_collection(collection) is not None
    except (APIError, RequestException, pystac.STACError, KeyError):
        served = False
    if not served:
        known = ", ".join(sorted(c.id for c in client.get_collections())[:20])
        raise UserError(f"{url} has no collection {collection!r}: set RANGEGRID_COLLECTION to one of {known}")
    return client


def search(url: str, collection: str, datetime: str, geometry: dict, max_cloud_percent: float) -> list[pystac.Item]:
    """Items of a collection that touch a geometry, each once, in a stable order.

    Filters cloud cover on the server where it conforms to CQL2, and here in any case.

    Args:
        url: Root of the STAC API.
        collection: Collection id.
        datetime: RFC 3339 interval, `2021-01-01/2021-12-31`.
        geometry: GeoJSON in lon, lat.
        max_cloud_percent: Largest `eo:cloud_cover`.

    Raises:
        UserError: The catalog does not answer.
    """
    client = open_catalog(url, collection)
    cql = {"op": "<=", "args": [{"property": "eo:cloud_cover"}, max_cloud_percent]}
    filters = {"filter": cql, "filter_lang": "cql2-json"} if client.conforms_to("FILTER") else {}
    query = client.search(collections=[collection], datetime=datetime, intersects=geometry, limit=PAGE, **filters)
    try:
        found = {item.id: item for item in query.items()}
    except (APIError, RequestException) as error:
        raise UserError(f"the search of {collection} at {url} failed ({error}): try again later") from None
    clear = [i for i in found.values() if i.properties.get("eo:cloud_cover", 0) <= max_cloud_percent]
    return sorted(clear, key=lambda item: item.id)


def unsigned(href: str) -> str:
    """A href without its query, which may hold a signature: the form that is stored and logged."""
    return urlunsplit(urlsplit(href)._replace(query="", fragment=""))
