"""Addresses that people give: a path, `file://`, `s3://` or `http(s)://`, made one kind of URL in one place.

`infra.storage` reads what is there, whatever the scheme; so an address serves wherever one is asked for.
"""

import ipaddress
import os
import re
import socket
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from infra.errors import UserError

WEB = ("http", "https")
UNSAFE = re.compile(r"[\x00-\x1f\\]")  # characters that libraries read differently
USER = re.compile(r"^(\w+://)[^/?#]*@")  # and password
METADATA_HOSTS = ("metadata.google.internal", "metadata.goog", "metadata")
METADATA_NETWORKS = [
    ipaddress.ip_network(text)  # link-local, and where clouds that are not link-local answer for a machine
    for text in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254", "100.100.100.200", "192.0.0.192")
]


def as_url(place: str | os.PathLike[str]) -> str:
    """Returns the URL of a path or of a URL; that of a URL which came from here is the same again.

    A path may be relative, hold `..` and begin with `~`; a URL may hold raw spaces.

    Raises:
        UserError: It is empty, or a `file://` URL of another machine.
    """
    text = os.fspath(place)
    scheme, colon, rest = text.partition("://")
    if not text.strip():
        raise UserError("an address is empty: give a path or a URL")
    if not colon:
        return _of_path(Path(text))
    if scheme.lower() != "file":
        return f"{scheme.lower()}://{rest}"
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise UserError(f"{text} is no file of this machine: give file:///directory/name, or a path")
    return _of_path(Path("/", unquote(path)))


def _of_path(path: Path) -> str:
    if str(path).startswith("~") and not path.exists():
        try:
            path = path.expanduser()
        except RuntimeError:
            raise UserError(f"there is no user of {path}: give the path in full") from None
    return (path.resolve() if ".." in path.parts else path.absolute()).as_uri()


def join(url: str, *parts: str) -> str:
    """Appends path parts to a URL."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def is_web(url: str) -> bool:
    """Tells whether a URL is http or https, which is only read."""
    return urlsplit(url).scheme in WEB


def name_of(url: str) -> str:
    """Returns the name of what is at a URL: the last part of its path."""
    if is_web(url) or url.startswith("file:"):
        return PurePosixPath(unquote(urlsplit(url).path)).name
    return PurePosixPath(url).name


def shown(place: str | os.PathLike[str]) -> str:
    """Returns a URL or a path as it may be told and stored: without user and query, which may hold a secret.

    In a name on disk or in a bucket `?` and `#` are letters like others, and stay.
    """
    plain = USER.sub(r"\1", os.fspath(place))
    if urlsplit(plain).scheme in ("", "file", "s3"):
        return plain
    return urlsplit(plain)._replace(query="", fragment="").geturl()


def absolute(href: str, base: str) -> str:
    if "://" in href or urlsplit(href).scheme:
        return href
    above = urlsplit(base)
    joined = urljoin(urlunsplit(above._replace(scheme="http")), href)  # urljoin knows no s3
    return urlunsplit(urlsplit(joined)._replace(scheme=above.scheme))


def may_read(href: str, local: bool, hosts: tuple[str, ...] = ()) -> bool:
    """Tells whether an item may lead us to this address.

    A catalog from elsewhere must not reach this machine's files, nor the services that hand a cloud machine its
    credentials, by whatever way of writing their address.

    Args:
        href: Absolute address of an asset.
        local: Whether the catalog itself is a file of this machine.
        hosts: Patterns of the hosts and buckets that are allowed; empty: all.
    """
    try:
        parts = urlsplit(href)
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return False
    if UNSAFE.search(href) or (host and hosts and not any(fnmatchcase(host.lower(), allowed) for allowed in hosts)):
        return False
    if parts.scheme in ("http", "https"):
        return bool(host) and not _is_metadata(host)
    if parts.scheme == "s3":
        return bool(host)
    return local and parts.scheme == "file" and not host and not parts.path.startswith("/vsi")


def may_lead(source: str, target: str, hosts: tuple[str, ...]) -> bool:
    """Tells whether we may follow a redirect from one address to another.

    Args:
        source: An address that we were given, or were led to.
        target: Absolute address of a redirect or a link, which must be one of the web.
        hosts: Patterns of the hosts that are allowed beside that of `source`; empty: all.
    """
    try:
        same = urlsplit(target).hostname == urlsplit(source).hostname
    except ValueError:
        return False
    return is_web(target) and may_read(target, local=False, hosts=() if same else hosts)


@lru_cache(maxsize=1024)
def _is_metadata(host: str) -> bool:
    try:
        address = ipaddress.ip_address(socket.inet_aton(host))  # also 0xA9FEA9FE, 2852039166, 169.254.43518
    except OSError:
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return host.lower() in METADATA_HOSTS
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in METADATA_NETWORKS)
