"""Addresses that people give: a path, `file://`, `s3://` or `http(s)://`, made one kind of URL in one place.

`infra.storage` reads what is there, whatever the scheme; so an address serves wherever one is asked for.
"""

import os
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from infra.errors import UserError

WEB = ("http", "https")


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


def is_web(url: str) -> bool:
    """Whether a URL is one of the web, which is only read."""
    return urlsplit(url).scheme in WEB


def name_of(url: str) -> str:
    """Returns the name of what is at a URL: the last part of its path."""
    if is_web(url) or url.startswith("file:"):
        return PurePosixPath(unquote(urlsplit(url).path)).name
    return PurePosixPath(url).name


def shown(url: str) -> str:
    """Returns a URL as it may be told and stored: one of the web without user and query, which may hold a signature."""
    if not is_web(url):
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
