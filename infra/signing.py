"""Hrefs as they can be read now. A signature lives for one read: it is stored, logged and shown nowhere."""

import threading
from urllib.parse import urlsplit

from planetary_computer.sas import TOKEN_CACHE, get_token
from planetary_computer.utils import parse_blob_url

from infra import storage

BLOBS = ".blob.core.windows.net"  # Planetary Computer's storage
RETRIES = 3  # of the token endpoint, 0.8 s and doubling: its own default of 10 waits for a quarter of an hour

_one_at_a_time = threading.Lock()


def signed(href: str) -> str:
    """A URL that reads `href` now.

    A Planetary Computer href gets a token of its container, kept in memory until a minute before it expires
    (`PC_SDK_SAS_URL` sets another token endpoint); an `s3://` href is presigned with the keys of the settings.

    Raises:
        OSError: The token endpoint does not answer.
        UserError: There are no keys to sign with.
    """
    parts = urlsplit(href)
    if parts.scheme == "s3":
        return storage.presigned(href)
    if not (parts.hostname or "").endswith(BLOBS):
        return href
    with _one_at_a_time:
        return get_token(*parse_blob_url(parts), retry_total=RETRIES).sign(href).href


def forget(url: str) -> None:
    """Drops the token of a signed URL that was refused; a newer one that came meanwhile stays."""
    with _one_at_a_time:
        for container, token in list(TOKEN_CACHE.items()):
            if token.token in url:
                del TOKEN_CACHE[container]
