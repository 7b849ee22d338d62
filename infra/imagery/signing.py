"""Signs hrefs just before a read. A signature is never stored, logged or shown."""

import re
import threading
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import obstore
import requests
from obstore.exceptions import BaseError
from planetary_computer.sas import TOKEN_CACHE, SASToken
from planetary_computer.settings import Settings as TokenSettings
from planetary_computer.utils import parse_blob_url
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from infra.addresses import may_lead, shown
from infra.buckets import FORBIDDEN, NO_BUCKET, has_ambient_keys, s3_at, s3_with
from infra.errors import RefusedHop, Unavailable, UserError
from infra.imagery import assets
from infra.imagery.assets import Access, Asset
from infra.settings import Archive, settings

BLOBS = re.compile(r"sentinel2l2a\d+\.blob\.core\.windows\.net")  # Planetary Computer's; other accounts are not
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
    own = settings().archive(parts.hostname)
    if own is not None and parts.scheme != "s3":
        return bool(own.sas_token or own.keys)
    return parts.scheme == "s3" or _is_planetary(parts)


def _is_planetary(parts: SplitResult) -> bool:
    return BLOBS.fullmatch(parts.hostname or "") is not None


def signed(asset: Asset | str) -> str:
    """Returns a URL that reads an asset now.

    A host or bucket of `RANGEGRID_ARCHIVES` is read as that says. Else a Planetary Computer href gets a token of its
    container, kept in memory until a minute before it expires (`PC_SDK_SAS_URL` sets another token endpoint). An
    `s3://` href is asked for as the public asks at the endpoint that its item tells; where it tells none, it is
    presigned with the keys of the settings, for their endpoint where that has the bucket, else for AWS.

    Raises:
        OSError: The token endpoint does not answer.
        RefusedHop: The token endpoint redirects to where nothing may be read from.
        Unavailable: The endpoint of the settings does not answer.
        UserError: `RANGEGRID_ARCHIVES` does not tell where its keys belong.
    """
    known = assets.of(asset)
    parts = urlsplit(known.href)
    own = settings().archive(parts.hostname, urlsplit(known.access.endpoint).hostname)
    if parts.scheme == "s3" and own is not None:
        return _of_archive(parts.netloc, parts.path.strip("/"), known.access, own)
    if parts.scheme == "s3":
        return _of_bucket(parts.netloc, parts.path.strip("/"), known.access)
    if own is not None:
        return _of_host(parts, own)
    if not _is_planetary(parts):
        return known.href
    with _one_at_a_time:
        return _token(*parse_blob_url(parts)).sign(shown(known.href)).href


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


def _of_host(parts: SplitResult, own: Archive) -> str:
    """Returns a URL of a host of the settings: with its token, or presigned for the bucket that begins its path."""
    if own.sas_token:
        return parts._replace(query=own.sas_token.get_secret_value().lstrip("?")).geturl()
    if own.keys is None:
        return parts.geturl()
    bucket, _, key = unquote(parts.path).strip("/").partition("/")
    endpoint = f"{parts.scheme}://{parts.netloc}"
    return _presigned(bucket, key, endpoint, own.region or settings().region, own.keys, own.requester_pays)


def _of_archive(bucket: str, key: str, told: Access, own: Archive) -> str:
    """Returns a URL of an object of a bucket of the settings; where they tell no endpoint, the item may if named there.

    Raises:
        UserError: There are keys, and where they belong is told by the item alone.
    """
    where, endpoint = settings(), own.endpoint
    if endpoint is None and told.endpoint:
        if own.keys and where.archive(urlsplit(told.endpoint).hostname) is not own:
            raise UserError(
                f"RANGEGRID_ARCHIVES has keys for {bucket} without an endpoint, and the item's is "
                f"{shown(told.endpoint)}: give the endpoint that the keys are for"
            )
        endpoint = told.endpoint
    region = own.region or _region(bucket, told)
    place, keys = endpoint or f"https://s3.{region}.amazonaws.com", own.keys
    if keys is None and not endpoint and not own.unsigned and not where.s3_endpoint:  # AWS's own keys
        keys = _both(where.s3_keys)
        if keys is None and not has_ambient_keys():
            return f"{place}/{bucket}/{quote(key)}"
    elif keys is None:
        return f"{place}/{bucket}/{quote(key)}"
    return _presigned(bucket, key, place, region, keys, own.requester_pays)


def _both(keys: tuple[str | None, str | None]) -> tuple[str, str] | None:
    return (keys[0], keys[1]) if keys[0] and keys[1] else None


def _presigned(
    bucket: str, key: str, endpoint: str, region: str, keys: tuple[str, str] | None, requester_pays: bool
) -> str:
    store = s3_with(bucket, endpoint, region, keys, requester_pays)
    return str(obstore.sign(store, "GET", key, timedelta(hours=1)))


def _of_bucket(bucket: str, key: str, told: Access) -> str:
    """Returns a URL that reads an object of S3: where its item tells, at the settings' endpoint, or at AWS.

    Keys are sent to the endpoint that they are for: to no other one that an item tells.
    """
    where = settings()
    keys = where.s3_keys
    if told.endpoint and told.endpoint != (where.s3_endpoint or "").rstrip("/"):
        return f"{told.endpoint}/{bucket}/{quote(key)}"
    if where.s3_endpoint and _is_own(bucket, where.s3_endpoint, where.region, *keys):
        own = where.s3_endpoint
    else:
        own = None
    region = where.region if own else _region(bucket, told)
    if own or not where.s3_endpoint:  # keys of an endpoint of one's own are none of AWS's
        try:
            return obstore.sign(s3_at(bucket, "", own, region, *keys), "GET", key, timedelta(hours=1))
        except BaseError:  # there are no keys to sign with
            pass
    return f"{own or f'https://s3.{region}.amazonaws.com'}/{bucket}/{quote(key)}"


def _region(bucket: str, told: Access) -> str:
    """Returns a bucket's region: as AWS told it, else as the item does, which may err, else that of the settings."""
    return _regions.get(bucket) or told.region or settings().region


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


def learn_region(asset: Asset | str, headers: Mapping[str, str]) -> bool:
    """Notes the region that AWS names for a bucket, and tells whether it differs from the one that was asked."""
    known = assets.of(asset)
    bucket, told = urlsplit(known.href).netloc, headers.get("x-amz-bucket-region")
    if not known.href.startswith("s3://") or not told or told == _region(bucket, known.access):
        return False
    _regions[bucket] = told
    return True
