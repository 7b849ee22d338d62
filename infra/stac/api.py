"""Searches a STAC API, and returns whole answers or none.

Real servers answer 429 with Retry-After, 403 while they throttle, 500 and 502 to big pages, 503 while they restart;
they repeat pages, end them too early or without a word, lead in circles, redirect a search so that its parameters are
lost, and send half a body. A wait mends some; for the others the search is begun anew, with smaller pages, in another
form, or by shorter spans of time. What a server says of its own count is checked, and is not believed alone.

The pages are walked here and not by pystac-client (0.9), whose walk ends at the first empty page, follows a circle of
links for ever, and compares no count: half an answer would pass for a whole one.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import numpy as np
import pystac
from numpy.typing import NDArray
from pystac_client import Client, ItemSearch
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from requests import Response
from requests.exceptions import ConnectionError, InvalidURL, MissingSchema, RequestException, RetryError, Timeout
from urllib3 import Retry

from infra import retries
from infra.addresses import may_lead
from infra.errors import CatalogUnavailable, RefusedHop, UserError
from infra.intervals import Interval
from infra.settings import settings

T = TypeVar("T")

RETRY = Retry(
    total=6,
    connect=4,  # 7 s: who gave a wrong URL waits for it
    backoff_factor=0.5,
    backoff_jitter=0.5,
    status_forcelist=[429, 503],
    allowed_methods=None,
    respect_retry_after_header=True,
    retry_after_max=300,
)
TIMEOUT = 60.0  # seconds without a byte, after which a request is given up
HOPS = 5  # most redirects on the way to an answer
ATTEMPTS = 5
PAGE, SMALLEST_PAGE = 100, 6  # items: big pages of Sentinel-2 make Earth Search answer 502, so each attempt halves them
EMPTY_PAGES = 20  # most empty pages in a row, after which the server leads nowhere
CAPS = (10, 20, 25, 50, 100, 200, 250, 500, 1000, 10_000)  # items: sizes at which servers limit a page
THROTTLED = 403  # status by which gateways throttle, beside 429
GATEWAY = (413, 500, 502, 504, THROTTLED)  # statuses that a wait or a smaller page may mend
REFUSED = (303, 400, 404, 405, 415, 422, 500, 501)  # statuses by which servers tell that they know no such request
PADDING = 1e-4  # degrees around a box, since the box of one point is empty
FAILURES = (APIError, RequestException, pystac.STACError, OSError, ValueError, KeyError, TypeError, AttributeError)

log = logging.getLogger("rangegrid")
warnings.filterwarnings("ignore", message="The requested method .* is not advertised")  # it is tried where POST fails


class PartialAnswer(ValueError):
    """Pages that are not the whole answer."""


class Expired(PartialAnswer):
    """A next page that is not served: its token may have expired, so smaller pages would not help."""


class Unanswered(CatalogUnavailable):
    """A catalog that did not answer a request.

    Attributes:
        status: The HTTP status that it gave, if it was that.
    """

    def __init__(self, url: str, error: Exception) -> None:
        self.status = _status(error)
        super().__init__(
            f"no STAC API answers at {url} ({_reason(error)}): check RANGEGRID_STAC_URL and the network, "
            "or try again later"
        )


class Request(NamedTuple):
    """A request for one page."""

    method: str
    """GET or POST."""
    url: str
    """URL of the request."""
    parameters: dict[str, Any]
    """Parameters: the query of a GET, or the body of a POST."""
    headers: dict[str, str] | None = None
    """Headers that the link to the page asks for."""


class Form(NamedTuple):
    """A form of request; servers know some of them."""

    method: str
    """GET or POST."""
    boxes: bool
    """Whether to search by boxes around the points, for servers without MultiPoint."""


class Features(dict[str, list[Any]]):
    """Features by their collection and id; where several that differ have the same, all of them."""

    def add(self, features: Iterable[Any]) -> "Features":
        """Adds features that are not held yet, and returns itself."""
        for feature in features:
            known = self.setdefault(_key(feature), [])
            if feature not in known:
                known.append(feature)
        return self

    def all(self) -> list[Any]:
        """Returns every feature."""
        return [feature for known in self.values() for feature in known]


def _key(feature: Any) -> str:
    if isinstance(feature, dict) and "id" in feature:
        return json.dumps([feature.get("collection"), feature["id"]])
    return json.dumps(feature)


class CheckedIO(StacApiIO):
    """Requests each hop of which is checked, and which stay what they are where they are redirected.

    Clients usually make a redirected POST a GET without its body: a search would become one for anything.
    """

    def __init__(self, url: str) -> None:
        super().__init__(max_retries=RETRY, timeout=TIMEOUT)
        self.url = url

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """Returns the text of the answer; see `answer`."""
        return self.answer(href, method, headers, parameters).content.decode("utf-8")

    def answer(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> Response:
        """Returns the answer to a request, after all redirects.

        Raises:
            APIError: It is none, an error or a redirect that would lose the request.
            UserError: The way leads to a host that may not be asked.
        """
        for _ in range(HOPS):
            self._check(href)
            if method == "POST":
                sent = {"json": parameters}
            else:
                sent = {"params": parameters}
            try:
                answer = self.session.request(
                    method or "GET", href, headers=headers, timeout=self.timeout, allow_redirects=False, **sent
                )
            except RequestException as error:
                raise APIError(type(error).__name__) from error
            target = self.session.get_redirect_target(answer)
            if target is None or (method == "POST" and answer.status_code == 303):
                break
            href = urljoin(href, target)
            parameters = {} if method != "POST" and urlsplit(href).query else parameters
        if not 200 <= answer.status_code < 300:
            raise APIError.from_response(answer)
        return answer

    def _check(self, href: str) -> None:
        """Refuses a hop that nothing may be read from, or that leaves the catalog for a host that is not allowed."""
        if not may_lead(self.url, href, settings().asset_hosts):
            parts = urlsplit(href)
            raise RefusedHop(
                f"the catalog at {self.url} leads to {parts.hostname or parts.scheme}, which may not be asked: use "
                "another catalog, or add the host to RANGEGRID_ASSET_HOSTS if you trust it"
            )


@dataclass(frozen=True)
class Api:
    """A STAC API that serves a collection."""

    client: Client
    """URL of the landing page."""
    collection: pystac.Collection
    """The collection."""
    io: CheckedIO
    """HTTP client."""
    forms: list[Form]
    """Forms of request that the server has not refused, the preferred first."""


@lru_cache(maxsize=8)
def open_api(url: str, collection: str) -> Api:
    """Returns the STAC API at `url`, which serves the collection; kept for later calls.

    Raises:
        CatalogUnavailable: Nothing answers there.
        UserError: It cannot be searched, lacks the collection, or leads to a host that may not be asked.
    """
    return _patiently(url, partial(_open, url, collection))


def _open(url: str, collection: str) -> Api:
    io = CheckedIO(url)
    try:
        client = Client.open(url, stac_io=io)
    except (APIError, UserError):
        raise
    except Exception as error:  # pystac raises anything for JSON that is no catalog
        raise PartialAnswer(f"its landing page is no STAC catalog, {type(error).__name__}") from None
    if not client.conforms_to("ITEM_SEARCH"):
        raise UserError(f"{url} cannot be searched: give a STAC API, a stac-geoparquet or an item-collection file")
    with suppress(pystac.STACError, KeyError):
        if found := _collection(client, collection):
            return Api(client, found, io, _forms(client))
    raise UserError(f"{url} has no collection {collection!r}: set RANGEGRID_COLLECTION to one of {_known(client)}")


def _collection(client: Client, collection: str) -> pystac.Collection | None:
    try:
        return client.get_collection(collection)
    except APIError as error:
        if _status(error) not in (400, 404):
            raise
        return None


def _known(client: Client) -> str:
    with suppress(*FAILURES):
        return ", ".join(sorted(c.id for c in client.get_collections())[:20])
    return "those that it has"


def _forms(client: Client) -> list[Form]:
    told = {str(link.extra_fields.get("method") or "GET").upper() for link in client.get_links("search")}
    methods = ("GET",) if told == {"GET"} else ("POST", "GET")
    return [Form(method, boxes) for boxes in (False, True) for method in methods]


def search_api(
    url: str, collection: str, window: Interval, lonlat: NDArray[np.float64], max_cloud_percent: float
) -> Features:
    """Returns the features of a collection that touch any of the points; more where the server cannot filter.

    Args:
        url: Root of the STAC API.
        collection: Collection id.
        window: Time window.
        lonlat: (n, 2) points in degrees.
        max_cloud_percent: Largest `eo:cloud_cover`, told to the server where it conforms to CQL2.

    Raises:
        CatalogUnavailable: The catalog does not answer, or never in whole.
        UserError: It lacks the collection, or leads to a host that may not be asked.
    """
    api = open_api(url, collection)
    refusals: list[Unanswered] = []
    tried: list[Form] = []
    for form in tuple(api.forms):
        try:
            found = Features()
            for place in _places(lonlat, form):
                query = {"method": form.method, "collections": [collection], **place}
                found.add(_answer(api, query, window, max_cloud_percent).all())
        except Unanswered as error:
            refusals.append(error)
            tried.append(form)
            if error.status not in REFUSED:
                break
        else:
            api.forms[:] = [known for known in api.forms if known not in tried]
            return found
    raise refusals[0]


def _places(lonlat: NDArray[np.float64], form: Form) -> list[dict[str, Any]]:
    """Yields the points as a form asks for them: all in one, or a box around those of each degree."""
    if not form.boxes:
        return [{"intersects": {"type": "MultiPoint", "coordinates": np.round(lonlat, 6).tolist()}}]
    _, cells = np.unique(np.floor(lonlat), axis=0, return_inverse=True)
    groups = [lonlat[cells.ravel() == cell] for cell in range(cells.max() + 1)]
    limits = np.array([180, 90])
    corners = [np.clip([g.min(0) - PADDING, g.max(0) + PADDING], -limits, limits) for g in groups]
    return [{"bbox": np.round(box.ravel(), 6).tolist()} for box in corners]


def _answer(api: Api, query: dict[str, Any], window: Interval, max_cloud_percent: float) -> Features:
    """Returns the whole answer to a query; halves the pages after failures that smaller pages may mend."""
    limit = PAGE

    def ask() -> Features:
        nonlocal limit
        try:
            return _filtered(api, query, window, max_cloud_percent, limit)
        except FAILURES as error:
            if not isinstance(error, Expired) and _status(error) != THROTTLED:
                limit = max(limit // 2, SMALLEST_PAGE)
            raise

    return _patiently(api.io.url, ask, lambda: f", {limit} items a page")


def _filtered(api: Api, query: dict[str, Any], window: Interval, max_cloud_percent: float, limit: int) -> Features:
    """Returns the whole answer in pages of `limit`, without the filter where the server answers nothing with it."""
    if api.client.conforms_to("FILTER"):
        cql = {"op": "<=", "args": [{"property": "eo:cloud_cover"}, max_cloud_percent]}
        try:
            clear = _whole(api.io, api.client.search(filter=cql, filter_lang="cql2-json", **query), window, limit)
        except APIError as error:
            if _status(error) not in REFUSED:
                raise
        else:
            if clear:
                return clear
    return _whole(api.io, api.client.search(**query), window, limit)


def _patiently(url: str, call: Callable[[], T], how: Callable[[], str] = str) -> T:
    """Calls until there is a whole answer; `how` names the next request for the log."""

    def tell(error: Exception) -> None:
        log.warning("%s: %s; asking again%s", url, _reason(error), how())

    try:
        return retries.ask(call, ATTEMPTS, _may_mend, tell)
    except UserError:
        raise
    except FAILURES as error:
        raise Unanswered(url, error) from None


def _may_mend(error: Exception) -> bool:
    """Tells whether a retry may help: after a gateway's error or a broken body, but not after a refusal.

    What `RETRY` waits for has been tried again already.
    """
    if isinstance(error, UserError) or not isinstance(error, FAILURES):
        return False
    if isinstance(error, APIError) and _status(error):
        return _status(error) in GATEWAY
    return not isinstance(_cause(error), ConnectionError | Timeout | RetryError | InvalidURL | MissingSchema)


def _status(error: Exception) -> int | None:
    return getattr(error, "status_code", None)


def _cause(error: Exception) -> BaseException:
    if isinstance(error, APIError):
        return error.__cause__ or error
    return error


def _reason(error: Exception) -> str:
    """Returns what went wrong, without the address, which can hold a secret."""
    if isinstance(error, PartialAnswer):
        return str(error)
    status = _status(error)
    if status:
        return f"HTTP status {status}"
    return type(_cause(error)).__name__


class Walk(NamedTuple):
    """The pages of a search that reached its end."""

    found: Features
    """Features of the pages."""
    matched: int
    """Largest count that a page stated; 0 where none did."""
    full: bool
    """Whether the last page has as many items as asked for, so that a next one may be missing."""
    capped: bool
    """Whether the last page may have hit the server's own limit, and no count says that this was all."""

    @property
    def short(self) -> bool:
        """Tells whether a count is above the features that came."""
        return len(self.found) < self.matched

    def middle(self, window: Interval) -> tuple[Interval, ...]:
        """Returns the window cut in two at the middle of the features; None where no cut shortens both parts."""
        times = sorted({moment for feature in self.found.all() for moment in _moment(feature)})
        inside = [at for at in times if window.split(at)]
        if inside:
            return window.split(inside[len(inside) // 2]) or ()
        return ()


def _moment(feature: Any) -> list[Any]:
    """Returns when a feature begins; empty where it does not say."""
    with suppress(KeyError, TypeError, AttributeError, UserError):
        told = feature["properties"]
        return [Interval.parse(told.get("datetime") or told["start_datetime"]).start]
    return []


def _whole(io: StacApiIO, query: ItemSearch, window: Interval, limit: int) -> Features:
    """Returns every feature of a window.

    Where the pages end in doubt, the window is asked for in two parts. A last page that is full may lack the rest: the
    parts are the answer, each whole by the same rule. A count above what came may be an estimate, and a page of ten
    the server's limit: that is settled if the parts, in pages of another size, bring just the same.

    Raises:
        PartialAnswer: What came is not the whole.
    """
    walk = _walk(io, query, window, limit)
    if not (walk.full or walk.capped or walk.short):
        return walk.found
    parts = walk.middle(window)
    if not walk.full:
        again = Features()
        for part in parts or (window,):
            again.add(_walk(io, query, part, max(limit // 2, 1)).found.all())
        if again.keys() == walk.found.keys():
            return walk.found
        if walk.short:
            raise PartialAnswer(f"{len(walk.found)} of {walk.matched} items came, and others when asked again")
    if not parts:
        raise PartialAnswer(f"a page of {len(walk.found)} items is full, and the server names no next one")
    for part in parts:
        walk.found.add(_whole(io, query, part, limit).all())
    return walk.found


def _walk(io: StacApiIO, query: ItemSearch, window: Interval, limit: int) -> Walk:
    """Walks the pages of one search, and returns what they bring.

    An empty page is asked for twice, and is not the end while it names a next one.

    Raises:
        PartialAnswer: A page came before or the pages do not end, unless just as many came as the server counts.
    """
    asked = query.get_parameters() | {"datetime": window.asked, "limit": limit}
    request: Request | None = Request(str(query.method), query.url, asked)
    found, sizes, matched, empty = Features(), [0], 0, 0
    while request and empty < EMPTY_PAGES:
        page = _page(io, request, follows=len(sizes) > 1)
        if not page["features"]:
            page = _page(io, request, follows=len(sizes) > 1)
        matched = max(matched, _count(page, "Matched"))
        if page["features"] and {_key(feature) for feature in page["features"]} <= found.keys():
            break
        found.add(page["features"])
        sizes.append(len(page["features"]))
        empty = 0 if page["features"] else empty + 1
        request = _next(page, request)
    if request and len(found) != matched:
        raise PartialAnswer(f"{len(found)} of {matched or 'more'} items came, then pages that came before or none")
    last, largest = sizes[-1], max(sizes[:-1])
    like_a_cap = last == largest if largest else last in CAPS
    capped = not request and last > 0 and like_a_cap and len(found) != matched
    return Walk(found, matched, full=not request and last == limit, capped=capped)


def _page(io: StacApiIO, request: Request, follows: bool) -> dict[str, Any]:
    try:
        text = io.request(request.url, request.method, request.headers, request.parameters)
    except APIError as error:
        status = _status(error) or 0
        if follows and 400 <= status < 500 and status not in GATEWAY:
            raise Expired(f"the next page answers {status}") from None
        raise
    page = json.loads(text)
    if not isinstance(page, dict) or not isinstance(page.get("features"), list):
        raise PartialAnswer("a page is no feature collection")
    if len(page["features"]) < _count(page, "Returned"):
        raise PartialAnswer(f"a page has {len(page['features'])} of its {_count(page, 'Returned')} items")
    return page


def _count(page: dict[str, Any], name: str) -> int:
    """Returns `numberMatched` or `numberReturned`, also by the names of the context extension; else 0."""
    context = page.get("context")
    older = context.get(name.lower()) if isinstance(context, dict) else None
    told = (page.get(f"number{name}"), older)
    return next((count for count in told if isinstance(count, int) and not isinstance(count, bool)), 0)


def _next(page: dict[str, Any], asked: Request) -> Request | None:
    """Returns the next page by the STAC API's paging: its body may be the whole request or what changes in it.

    What a link leaves unset is left out, or null.
    """
    links = page.get("links")
    if isinstance(links, list):
        listed = [link for link in links if isinstance(link, dict)]
    else:
        listed = []
    link = next((link for link in listed if link.get("rel") == "next"), None)
    if link is None:
        return None
    posts = str(link.get("method") or "GET").upper() == "POST"
    href = link.get("href") or (asked.url if posts and link.get("body") else None)
    if not isinstance(href, str):
        raise PartialAnswer("a page has a next one without address")
    body, headers = ({k: v for k, v in (link.get(n) or {}).items() if v is not None} for n in ("body", "headers"))
    kept = asked.parameters if link.get("merge") else {}
    return Request("POST" if posts else "GET", urljoin(asked.url, href), kept | body if posts else {}, headers or None)
