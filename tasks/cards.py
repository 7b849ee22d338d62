"""Cards and fingerprints: what made a product, stored beside it as `card.json`.

A product's directory is named by the fingerprint of everything that decides its content. The same parameters
find the same directory and resume; changed ones make a new version; nothing that was good is overwritten.
"""

import hashlib
import json
from typing import Any, Literal

from infra import storage
from infra.addresses import as_url
from infra.errors import UserError
from infra.settings import settings

FORMER_LAND: Literal["centre"] = "centre"  # which cells are land of a grid whose card does not tell: of the first ones
GRID, SUMS = "grid.zarr", "sums.zarr"  # in the directory of a grid


def fingerprint(content: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_card(url: str, kind: str) -> dict[str, Any]:
    """The card of the finished product at `url`.

    Raises:
        UserError: Nothing finished is there, or it is a product of another kind.
    """
    try:
        card = storage.read_json(storage.join(url, "card.json"))
    except FileNotFoundError:
        raise UserError(f"there is no finished {kind} at {url}: give the URL that the step printed") from None
    if card.get("kind") != kind:
        raise UserError(f"{url} holds {card.get('kind')!r}, not {kind!r}: give the URL of a {kind}")
    return card


def is_finished(url: str) -> bool:
    """Whether the product's card, which is written last, is there."""
    return storage.exists(storage.join(url, "card.json"))


def write_card(url: str, kind: str, **content: Any) -> dict[str, Any]:
    """Writes the card that declares the product at `url` finished."""
    card = {"kind": kind, **content}
    storage.write_json(storage.join(url, "card.json"), card)
    return card


def made_before(url: str, kind: str, made_of: Any) -> dict[str, Any] | None:
    """The card of the same product made at `url` before; none where nothing is finished.

    Raises:
        UserError: Another product is there.
    """
    if not is_finished(url):
        return None
    card = storage.read_json(storage.join(url, "card.json"))
    if card.get("kind") != kind or card.get("made_of") != made_of:
        raise UserError(f"{url} holds another {card.get('kind')} already: name a directory of its own")
    return card


def product_url(kind: str, made_of: Any) -> str:
    """Where the product made of `made_of` lives: `<storage>/<kind>/<fingerprint>`."""
    return storage.join(settings().storage_url, kind, fingerprint(made_of))


def home_of(grid: str) -> str:
    """Returns the URL of the product whose Zarr is at a path or URL."""
    return as_url(grid).rstrip("/").removesuffix("/" + GRID)


def name_of(grid: str) -> str:
    """Returns the fingerprint of the version whose Zarr is at `grid`."""
    return home_of(grid).rpartition("/")[2]
