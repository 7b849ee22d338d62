"""Opens the object store behind a URL, with retries, and turns its errors into one sentence.

Credentials come from the settings at the moment of use and are in no URL, so a URL may be logged, stored and sent to
workers.
"""

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, ObjectStore, S3Store

from infra import retries
from infra.addresses import is_web, shown
from infra.errors import Refused, Unavailable, UserError
from infra.settings import settings

T = TypeVar("T")

ATTEMPTS = 3  # attempts beside obstore's own, which misses short bodies and lost connections
RETRIES: Any = {  # obstore's: some 4 s, as long as a server that restarts needs
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 3},
}
AMBIENT = (  # variables that tell a container where its keys are
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
FAILURES = (BaseError, OSError)
FORBIDDEN = (PermissionError, PermissionDeniedError, UnauthenticatedError)
REFUSED = (AlreadyExistsError, PreconditionError)  # answers of the store, not failures
# obstore tells these causes by a text alone, without a class or a number: object_store has no variant for them, see
# https://docs.rs/object_store/latest/object_store/enum.Error.html
NO_BUCKET = "NoSuchBucket"  # S3's code for a missing bucket, in the error of a missing object
FULL = ("No space left", "os error 28")


def locate(url: str) -> tuple[ObjectStore, str]:
    """Returns the object store that serves `url` (one per bucket and environment), and the key within it.

    Raises:
        UserError: No store serves such a URL.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "file" and rest.startswith("/"):
        return local("/"), unquote(rest).strip("/")
    bucket, _, key = rest.partition("/")  # not by urlsplit: a key may hold # and ?
    if is_web(url):
        raise UserError(f"nothing can be written to {shown(url)}: use a path, file:///directory or s3://bucket/prefix")
    if scheme != "s3" or not bucket:
        raise UserError(f"the storage URL {url!r} is not one of ours: use file:///directory or s3://bucket/prefix")
    return s3(bucket), key.strip("/")


@lru_cache
def local(directory: str) -> LocalStore:
    """Returns the store of a directory of this machine."""
    return LocalStore(directory, mkdir=True)


def s3(bucket: str, prefix: str = "") -> S3Store:
    """Returns the store of a bucket, or of what is below a prefix, as the settings have endpoint and keys."""
    where = settings()
    return s3_at(bucket, prefix, where.s3_endpoint, where.region, *where.s3_keys)


@lru_cache(maxsize=256)
def s3_with(
    bucket: str, endpoint: str, region: str, keys: tuple[str, str] | None, requester_pays: bool = False
) -> S3Store:
    """Returns the store of a bucket of an archive: with these keys and no other ones, none: those of this machine.

    Keys are handed over as a provider of credentials: a session token of the environment, which belongs to other keys,
    would be sent beside them otherwise.
    """
    options: dict[str, Any] = {"credential_provider": lambda: _credential(*keys)} if keys else {}
    return S3Store(
        bucket,
        config={
            "endpoint": endpoint,
            "region": region,
            "virtual_hosted_style_request": False,
            "request_payer": requester_pays,
        },
        client_options={"allow_http": endpoint.startswith("http://")},
        retry_config=RETRIES,
        **options,
    )


def _credential(key: str, secret: str) -> Any:
    return {"access_key_id": key, "secret_access_key": secret, "token": None, "expires_at": None}


@lru_cache(maxsize=256)
def s3_at(bucket: str, prefix: str, endpoint: str | None, region: str, key: str | None, secret: str | None) -> S3Store:
    """Returns the store of a bucket at an endpoint, none: at AWS; without keys nothing is signed."""
    options: dict[str, Any] = {"region": region, "virtual_hosted_style_request": False}
    if endpoint:
        options |= {"endpoint": endpoint}
    if key and secret:
        options |= {"access_key_id": key, "secret_access_key": secret}
    elif not has_ambient_keys():
        options["skip_signature"] = True
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=options,
        client_options={"allow_http": bool(endpoint and endpoint.startswith("http://"))},
        retry_config=RETRIES,
    )


def has_ambient_keys() -> bool:
    """Tells whether this machine may have S3 keys beyond the settings': of a container, or of an EC2 instance.

    One without any asks for no keys and signs nothing: so it reads what is public.
    """
    vendor = Path("/sys/class/dmi/id/sys_vendor")
    told = any(name in os.environ for name in AMBIENT)
    return told or (vendor.exists() and "Amazon EC2" in vendor.read_text())


def patiently(call: Callable[[], T], url: str) -> T:
    """Calls a function, and retries while the store does not answer.

    Raises:
        FileNotFoundError: There is no such object.
        UserError: The store is unreachable, full or forbids it; it names `url`.
    """
    with _told_of(url):
        return retries.ask(call, ATTEMPTS, partial(_mends, url))


async def patiently_async(call: Callable[[], Awaitable[T]], url: str) -> T:
    """Does the same as `patiently` on an event loop."""
    with _told_of(url):
        return await retries.ask_async(call, ATTEMPTS, partial(_mends, url))


@contextmanager
def _told_of(url: str) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        told = _told(error, url)
        if told is error:
            raise
        raise told from error


def _mends(url: str, error: BaseException) -> bool:
    """Tells whether a retry may help against an error."""
    return isinstance(error, FAILURES) and isinstance(_told(error, url), Unavailable)


def _told(error: Exception, url: str) -> Exception:
    """Returns what a failure of a store is told as; what is an answer of the store, as it is."""
    text, place = str(error).strip(), shown(url)
    if NO_BUCKET in text:
        return UserError(f"the bucket of {place} does not exist: create it, or set RANGEGRID_STORAGE_URL")
    if isinstance(error, (*REFUSED, FileNotFoundError)):
        return error
    if isinstance(error, FORBIDDEN):
        return Refused(
            f"access to {place} is forbidden: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "and that they may read and write this bucket"
        )
    if any(sign in text for sign in FULL):
        return UserError(f"no space is left at {place}: free some, or set RANGEGRID_STORAGE_URL elsewhere")
    reason = text.splitlines()[0][:300] if text else type(error).__name__
    return Unavailable(f"{_server(url)} did not serve {place} ({reason}): check that it is up and reachable")


def _server(url: str) -> str:
    if url.startswith("s3:"):
        return settings().s3_endpoint or "the S3 service"
    return urlsplit(url).netloc.rpartition("@")[2] or "the file system"
