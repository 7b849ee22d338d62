"""Reads the ways that an item tells to an asset: its own href and alternates, with what each needs.

The extensions storage (1: region and requester pays of an asset or item; 2: `storage:schemes` by `storage:refs`),
authentication (`auth:schemes` by `auth:refs`) and alternate-assets. No item has keys, and what it tells brings none:
keys go where `RANGEGRID_ARCHIVES` says alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pystac

from infra.imagery.assets import PUBLIC, Access
from infra.settings import Settings

AWS = "amazonaws.com"
TOLD = {"alternate", "auth:refs", "storage:refs", "storage:region", "storage:requester_pays"}  # all that tells of it
WITH_KEYS = ("s3", "signedUrl")  # kinds of access by keys; all beyond them need an account in a browser or a header


class Way(NamedTuple):
    """A way to an asset."""

    href: str
    """Where it is."""
    access: Access
    """What the item tells of it."""
    rank: int
    """0: the settings have its access; 1: it is public; 2: keys are needed; 3: an account is."""


def ways(item: pystac.Item, asset: pystac.Asset, where: Settings) -> list[Way]:
    """Returns the ways to an asset, its own first, as the settings have access to each."""
    told = asset.extra_fields
    if not where.archives and not TOLD & (told.keys() | item.properties.keys()):
        return [Way(asset.href, PUBLIC, 1)]
    others = told.get("alternate")
    listed = others.values() if isinstance(others, Mapping) else ()
    found = [_way(item, asset.href, told, told, where)]
    ways_there = [way for way in listed if isinstance(way, Mapping) and way.get("href")]
    return found + [_way(item, str(way["href"]), way, told, where) for way in ways_there]


def _way(item: pystac.Item, href: str, told: Mapping[str, Any], asset: Mapping[str, Any], where: Settings) -> Way:
    schemes = [scheme for scheme in _referred(item, told, "storage") if "s3" in str(scheme.get("type", "s3"))]
    choices = [_of_scheme(scheme) for scheme in schemes]
    if not choices:
        choices = [_of_fields(href, told, asset, item.properties)]
    access = next((each for each in choices if _is_ours(href, each, where)), choices[0])
    kinds = {str(scheme.get("type")) for scheme in _referred(item, told, "auth")}
    if _is_ours(href, access, where):
        rank = 0
    elif not kinds and not access.requester_pays:
        rank = 1
    else:
        rank = 2 if kinds <= set(WITH_KEYS) else 3
    return Way(href, access, rank)


def _is_ours(href: str, access: Access, where: Settings) -> bool:
    """Tells whether the settings have the access to a host or bucket."""
    return (
        bool(where.archives) and where.archive(*(urlsplit(url).hostname for url in (href, access.endpoint))) is not None
    )


def _referred(item: pystac.Item, told: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """Returns the schemes of storage or authentication that an asset refers to, in its order."""
    schemes = item.properties.get(f"{kind}:schemes") or item.extra_fields.get(f"{kind}:schemes")
    refs = told.get(f"{kind}:refs")
    if not isinstance(schemes, Mapping) or not isinstance(refs, list):
        return []
    return [schemes[ref] for ref in refs if isinstance(schemes.get(ref), Mapping)]


def _of_scheme(scheme: Mapping[str, Any]) -> Access:
    """Returns the access of version 2; of AWS the region is enough, and elsewhere the platform is the endpoint."""
    platform = str(scheme.get("platform") or "")
    if AWS in platform or "{" in platform or not platform.startswith(("http://", "https://")):
        platform = ""
    return Access(platform.rstrip("/"), str(scheme.get("region") or ""), scheme.get("requester_pays") is True)


def _of_fields(href: str, *places: Mapping[str, Any]) -> Access:
    """Returns the access of version 1: fields of the way, of the asset, or of the item."""
    if not href.startswith("s3://"):
        return Access()
    region, pays = (_first(places, f"storage:{name}") for name in ("region", "requester_pays"))
    return Access("", str(region or ""), pays is True)


def _first(places: tuple[Mapping[str, Any], ...], name: str) -> Any:
    return next((place[name] for place in places if place.get(name) is not None), None)
