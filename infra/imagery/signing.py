"""Signs hrefs just before a read. A signature is never stored, logged or shown."""

import threading
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import obstore
import requests
from obstore.exceptions import BaseError
from planetary_computer.sas import TOKEN_CACHE, SASToken
from planetary_computer.settings import Settings as TokenSettings
from planetary_computer.utils import parse_blob_url
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from infra.addresses import may_lead, shown
from infra.buckets import FORBIDDEN, NO_BUCKET, s3_at
from infra.errors import RefusedHop, Unavailable
from infra.settings import settings

BLOBS = ".blob.core.windows.net"  # hosts of Planetary Computer's storage
RETRY = Retry(total=3, backoff_factor=0.8, status_forcelist=[429, 500, 502, 503, 504])  # retries of the token endpoint
TIMEOUT = 60.0  # seconds for the token endpoint's answer
SPARE = 60  # seconds before its end at which a token is replaced
KEY_HEADER = "Ocp-Apim-Subscription-Key"  # header of a key for Planetary Computer's token endpoint
NOTHING = "rangegrid-no-such-prefix/"  # listing this prefix tells only whether a bucket exists

_one_at_a_time = threading.Lock()
_regions: dict[str, str] = {}  # by bucket, as AWS told them


def signs(href: str) -> bool:
    """Returns whether `signed` makes the signature: one that the href came with is not needed."""
    parts = urlsplit(href)
    return parts.scheme == "s3" or (parts.hostname or "").endswith(BLOBS)


def signed(href: str) -> str:
    """Returns a URL that reads `href` now.

    A Planetary Computer href gets a token of its container, kept in memory until a minute before it expires
    (`PC_SDK_SAS_URL` sets another token endpoint). An `s3://` href is presigned with the keys of the settings, for
    their endpoint where that has the bucket, else for AWS; without keys it is asked for as the public asks.

    Raises:
        OSError: The token endpoint does not answer.
        RefusedHop: The token endpoint redirects to where nothing may be read from.
        Unavailable: The endpoint of the settings does not answer.
    """
    parts = urlsplit(href)
    if parts.scheme == "s3":
        return _of_bucket(parts.netloc, parts.path.strip("/"))
    if not signs(href):
        return href
    with _one_at_a_time:
        return _token(*parse_blob_url(parts)).sign(shown(href)).href


def forget(url: str) -> None:
    """Drops the token of a signed URL that was refused, unless a newer one came meanwhile."""
    with _one_at_a_time:
        for container, token in list(TOKEN_CACHE.items()):
            if token.token in url:
                del TOKEN_CACHE[container]


def redirected(url: str, location: str) -> str:
    """Returns the address that a redirect from `url` leads to, if it is on the same host or may be read.

    Raises:
        RefusedHop: Nothing may be read from there.
    """
    target = urljoin(url, location)
    if not may_lead(url, target, settings().asset_hosts):
        where = urlsplit(target).hostname or f"{urlsplit(target).scheme}:"
        raise RefusedHop(f"a redirect leads to {where}, where nothing may be read from; see RANGEGRID_ASSET_HOSTS")
    return target


class _Session(requests.Session):
    """Follows redirects that are allowed, and sends no key to another host."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        return target and redirected(resp.url, target)

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        super().rebuild_auth(prepared_request, response)
        if urlsplit(prepared_request.url).hostname != urlsplit(response.url).hostname:
            prepared_request.headers.pop(KEY_HEADER, None)


def _token(account: str, container: str) -> SASToken:
    """Fetches the token of a container, like `planetary_computer.sas.get_token`, but follows no redirect unchecked."""
    where = f"{TokenSettings.get().sas_url}/{account}/{container}"
    token = TOKEN_CACHE.get(where)
    if token is None or token.ttl() < SPARE:
        key = TokenSettings.get().subscription_key
        with _Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=RETRY))
            session.mount("https://", HTTPAdapter(max_retries=RETRY))
            answer = session.get(where, headers={KEY_HEADER: key} if key else None, timeout=TIMEOUT)
        answer.raise_for_status()
        token = TOKEN_CACHE[where] = SASToken(**answer.json())
    return token


def _of_bucket(bucket: str, key: str) -> str:
    """Returns a URL that reads an object of S3: at the settings' endpoint where that has the bucket, else at AWS."""
    where = settings()
    keys = where.s3_keys
    if where.s3_endpoint and _is_own(bucket, where.s3_endpoint, where.region, *keys):
        own = where.s3_endpoint
    else:
        own = None
    region = where.region if own else _regions.get(bucket, where.region)
    if own or not where.s3_endpoint:  # keys of an endpoint of one's own are none of AWS's
        try:
            return obstore.sign(s3_at(bucket, "", own, region, *keys), "GET", key, timedelta(hours=1))
        except BaseError:  # there are no keys to sign with
            pass
    return f"{own or f'https://s3.{region}.amazonaws.com'}/{bucket}/{quote(key)}"


def _is_own(bucket: str, endpoint: str, *access: Any) -> bool:
    """Tells whether a bucket is at the settings' endpoint: the products' bucket is, others are asked for once."""
    return urlsplit(settings().storage_url).netloc == bucket or _has(bucket, endpoint, *access)


@lru_cache(maxsize=256)
def _has(bucket: str, endpoint: str, *access: Any) -> bool:
    try:
        obstore.list_with_delimiter(s3_at(bucket, "", endpoint, *access), NOTHING)
    except FORBIDDEN:
        return True
    except (BaseError, OSError) as error:
        if NO_BUCKET in str(error):
            return False
        raise Unavailable(
            f"RANGEGRID_S3_ENDPOINT does not say whether it has the bucket {bucket}: check that it is up"
        ) from None
    return True


def learn_region(href: str, headers: Mapping[str, str]) -> bool:
    """Notes the region that AWS names for a bucket, and tells whether it differs from the one that was asked."""
    bucket, told = urlsplit(href).netloc, headers.get("x-amz-bucket-region")
    if not href.startswith("s3://") or not told or told == _regions.get(bucket, settings().region):
        return False
    _regions[bucket] = told
    return True
