"""Searches of a STAC API that come back whole or not at all.

Real servers answer 429 with Retry-After, 502 to big pages, 503 while they restart; they repeat pages, end them too
early, lead in circles, and send half a body. A wait mends the first; for the others the search is begun anew with
smaller pages. What a server says of its own count is checked.
"""

import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin

import numpy as np
import pystac
from numpy.typing import NDArray
from pystac_client import Client, ItemSearch
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from requests.exceptions import ConnectionError, InvalidURL, MissingSchema, RequestException, RetryError, Timeout
from urllib3 import Retry

from infra.errors import CatalogUnavailable, UserError

T = TypeVar("T")

RETRY = Retry(
    total=6,
    connect=4,  # 7 s: who gave a wrong URL waits for it
    backoff_factor=0.5,
    backoff_jitter=0.5,
    status_forcelist=[429, 500, 503],
    allowed_methods=None,
    respect_retry_after_header=True,
    retry_after_max=300,
)
TIMEOUT = 60.0  # seconds without a byte
PAGES = (100, 50, 25, 12, 6)  # items a page, by attempt: big pages of Sentinel-2 make Earth Search answer 502
PAUSE = 0.5  # seconds before the second attempt, doubled with each
EMPTY_PAGES = 20  # in a row, each with a next one: the server leads nowhere
GATEWAY = (413, 502, 504)  # statuses that a smaller page may mend
FILTER_REFUSED = (400, 405, 422, 501)
FAILURES = (APIError, RequestException, pystac.STACError, OSError, ValueError, KeyError, TypeError, AttributeError)

log = logging.getLogger("rangegrid")


class PartialAnswer(ValueError):
    """Pages that are not the whole answer."""


class Request(NamedTuple):
    """One page to ask for."""

    method: str
    """GET or POST."""
    url: str
    """Where."""
    parameters: dict[str, Any]
    """Of the query of a GET, or the body of a POST."""


@lru_cache(maxsize=8)
def open_api(url: str, collection: str) -> tuple[Client, pystac.Collection]:
    """A client of the STAC API at `url`, and the collection that it serves; kept for later calls.

    Raises:
        CatalogUnavailable: Nothing answers there.
        UserError: It cannot be searched, or lacks the collection.
    """
    return _patiently(url, lambda _: _open(url, collection))


def _open(url: str, collection: str) -> tuple[Client, pystac.Collection]:
    try:
        client = Client.open(url, stac_io=StacApiIO(max_retries=RETRY, timeout=TIMEOUT))
    except APIError:
        raise
    except Exception as error:  # pystac raises anything for JSON that is no catalog
        raise PartialAnswer(f"its landing page is no STAC catalog, {type(error).__name__}") from None
    if not client.conforms_to("ITEM_SEARCH"):
        raise UserError(f"{url} cannot be searched: give a STAC API, a stac-geoparquet or an item-collection file")
    with suppress(pystac.STACError, KeyError):
        if found := _collection(client, collection):
            return client, found
    known = ", ".join(sorted(c.id for c in client.get_collections())[:20])
    raise UserError(f"{url} has no collection {collection!r}: set RANGEGRID_COLLECTION to one of {known}")


def _collection(client: Client, collection: str) -> pystac.Collection | None:
    try:
        return client.get_collection(collection)
    except APIError as error:
        if _status(error) not in (400, 404):
            raise
        return None


def search_api(
    url: str, collection: str, interval: str, lonlat: NDArray[np.float64], max_cloud_percent: float
) -> dict[str, Any]:
    """The features of a collection that touch any of the points, by id; more where the server cannot filter.

    Args:
        url: Root of the STAC API.
        collection: Collection id.
        interval: RFC 3339 interval.
        lonlat: (n, 2) points in degrees.
        max_cloud_percent: Largest `eo:cloud_cover`, told to the server where it conforms to CQL2.

    Raises:
        CatalogUnavailable: The catalog does not answer, or never in whole.
    """
    client, _ = open_api(url, collection)
    query = {
        "method": _method(client),
        "collections": [collection],
        "datetime": interval,
        "intersects": {"type": "MultiPoint", "coordinates": np.round(lonlat, 6).tolist()},
    }
    cql = {"op": "<=", "args": [{"property": "eo:cloud_cover"}, max_cloud_percent]}

    def answer(limit: int) -> dict[str, Any]:
        clear = _filtered(client, limit=limit, filter=cql, filter_lang="cql2-json", **query)
        return clear or _collect(client.search(limit=limit, **query))

    return _patiently(url, answer)


def _method(client: Client) -> str:
    told = {link.extra_fields.get("method", "GET") for link in client.get_links("search")}
    return "GET" if told == {"GET"} else "POST"


def _filtered(client: Client, **query: Any) -> dict[str, Any]:
    """The answer to a filter; empty also where the server cannot give one, so that it must be asked without."""
    if not client.conforms_to("FILTER"):
        return {}
    try:
        return _collect(client.search(**query))
    except APIError as error:
        if _status(error) not in FILTER_REFUSED:
            raise
        return {}


def _patiently(url: str, call: Callable[[int], T]) -> T:
    """Calls, with ever smaller pages, until there is a whole answer."""
    for attempt, limit in enumerate(PAGES):
        try:
            return call(limit)
        except UserError:
            raise
        except FAILURES as error:
            if attempt == len(PAGES) - 1 or not _may_mend(error):
                raise CatalogUnavailable(
                    f"no STAC API answers at {url} ({_reason(error)}): check RANGEGRID_STAC_URL and the network, "
                    "or try again later"
                ) from None
            log.warning("%s: %s; asking again with smaller pages", url, _reason(error))
            time.sleep(PAUSE * 2**attempt * (0.5 + random.random()))
    raise AssertionError("the last attempt returns or raises")


def _may_mend(error: Exception) -> bool:
    """Whether another attempt may help: a gateway's error, a broken or partial body; but no refusal.

    What `RETRY` waits for has been tried again already.
    """
    if isinstance(error, APIError) and _status(error):
        return _status(error) in GATEWAY
    return not isinstance(_cause(error), ConnectionError | Timeout | RetryError | InvalidURL | MissingSchema)


def _status(error: Exception) -> int | None:
    return getattr(error, "status_code", None)


def _cause(error: Exception) -> BaseException:
    return error.__context__ or error if isinstance(error, APIError) else error


def _reason(error: Exception) -> str:
    """What went wrong, without the address, which can hold a secret."""
    if isinstance(error, PartialAnswer):
        return str(error)
    status = _status(error)
    return f"HTTP status {status}" if status else type(_cause(error)).__name__


def _collect(query: ItemSearch) -> dict[str, Any]:
    """All features of a search by id, page after page.

    An empty page is asked for twice, and is not the end while it names a next one.

    Raises:
        PartialAnswer: A page came before, the pages do not end, or fewer items came than the server counts.
    """
    found: dict[str, Any] = {}
    request: Request | None = Request(str(query.method), query.url, query.get_parameters())
    matched = pages = empty = 0
    while request and empty < EMPTY_PAGES:
        page = _page(query, request, follows=pages > 0)
        page = page if page["features"] else _page(query, request, follows=pages > 0)
        new = {_id(feature): feature for feature in page["features"]}
        if new and new.keys() <= found.keys():
            break
        found |= new
        matched = _count(page, "Matched") or matched
        pages, empty = pages + 1, 0 if new else empty + 1
        request = _next(page, request)
    if len(found) < matched or (request and not matched):
        raise PartialAnswer(f"{len(found)} of {matched or 'more'} items came, then pages that came before or none")
    return found


def _page(query: ItemSearch, request: Request, follows: bool) -> dict[str, Any]:
    try:
        text = query._stac_io.request(request.url, method=request.method, parameters=request.parameters)
    except APIError as error:
        if follows and 400 <= (_status(error) or 0) < 500:
            raise PartialAnswer(f"the next page answers {_status(error)}") from None
        raise
    page = json.loads(text)
    if not isinstance(page, dict) or not isinstance(page.get("features"), list):
        raise PartialAnswer("a page is no feature collection")
    if len(page["features"]) < _count(page, "Returned"):
        raise PartialAnswer(f"a page has {len(page['features'])} of its {_count(page, 'Returned')} items")
    return page


def _count(page: dict[str, Any], name: str) -> int:
    """`numberMatched` or `numberReturned`, by its present name or by that of the context extension; else 0."""
    context = page.get("context")
    older = context.get(name.lower()) if isinstance(context, dict) else None
    found = page.get(f"number{name}", older)
    return found if isinstance(found, int) else 0


def _id(feature: Any) -> str:
    return str(feature["id"]) if isinstance(feature, dict) and "id" in feature else json.dumps(feature)


def _next(page: dict[str, Any], asked: Request) -> Request | None:
    """The next page as the STAC API's paging says: its body may be all of the request or what changes in it."""
    link = next((link for link in page.get("links", []) if link["rel"] == "next"), None)
    if link is None:
        return None
    method, body = link.get("method", "GET").upper(), link.get("body", {})
    kept = asked.parameters if link.get("merge") else {}
    return Request(method, urljoin(asked.url, link["href"]), kept | body if method == "POST" else {})
