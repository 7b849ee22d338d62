"""What lies in a storage and why: every product of every kind, what it is made of, and what is made of it.

A product is named by its directory, `kind/name`, everywhere here. Cards name a checkpoint by the digest of its weights
and other products by fingerprint or URL: all these are looked up.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from infra import storage
from infra.settings import settings
from tasks.cards import GRID, fingerprint, home_of
from tasks.release.lines import facts_of, versions_in
from tasks.release.versions import versions

KINDS = ("patches", "features", "checkpoints", "databases", "grids", "reports", "ablations")
READERS = 8  # products that are looked at at a time


@dataclass(frozen=True)
class Product:
    """A directory under that of its kind."""

    kind: str
    """Name of the directory of its kind."""
    directory: str
    """Its own name."""
    bytes: int
    """Of all its objects."""
    changed: datetime
    """When one of them was last written."""
    state: str
    """`finished` or `unfinished`; of a grid, its state as a version."""
    card: dict[str, Any]
    """Its card; while it is unfinished, what its metadata tell, if anything."""
    line: str = ""
    """Of a grid, its product line."""
    made_of: tuple[str, ...] = ()
    """Names of the products here that it was made of; none is known of most that are unfinished."""
    used_by: tuple[str, ...] = ()
    """Names of the products here that are made of it."""

    @property
    def name(self) -> str:
        """`kind/directory`."""
        return f"{self.kind}/{self.directory}"

    @property
    def url(self) -> str:
        """URL of its directory."""
        return storage.join(settings().storage_url, self.kind, self.directory)

    @property
    def is_finished(self) -> bool:
        """Whether its card is there."""
        return self.state not in ("unfinished", "condemned")

    @property
    def is_imported(self) -> bool:
        """Whether no step of ours would make it again under this name: imported, or put here by a person."""
        return self.is_finished and self.directory != fingerprint(self.card.get("made_of"))


def products() -> dict[str, Product]:
    """Returns all products by name, by kind and age, with what they are made of and used by."""
    known = {version.fingerprint: version for version in versions()}
    places = [(kind, name) for kind in KINDS for name in _directories(kind)]
    with ThreadPoolExecutor(READERS) as pool:
        found = [product for product in pool.map(lambda place: _product(place[0], place[1], known), places) if product]
    found.sort(key=lambda product: (KINDS.index(product.kind), product.changed))
    made_of = {product.name: tuple(_named(product, found)) for product in found}
    used_by = {name: tuple(other for other, parts in made_of.items() if name in parts) for name in made_of}
    return {p.name: replace(p, made_of=made_of[p.name], used_by=used_by[p.name]) for p in found}


def _directories(kind: str) -> list[str]:
    url = storage.join(settings().storage_url, kind)
    return versions_in(url) if kind == "grids" else storage.names(url)


def _product(kind: str, name: str, known: Mapping[str, Any]) -> Product | None:
    url = storage.join(settings().storage_url, kind, name)
    size, changed = storage.measured(url)
    if changed is None:  # an emptied directory
        return None
    if kind == "grids":
        version = known.get(name)
        card = (version and version.card) or facts_of(storage.join(url, GRID))
        state, line = (version.state, version.line) if version else ("unfinished", "")
        return Product(kind, name, size, changed, state, card, line)
    try:
        return Product(kind, name, size, changed, "finished", storage.read_json(storage.join(url, "card.json")))
    except FileNotFoundError:
        return Product(kind, name, size, changed, "unfinished", {})


def _named(product: Product, every: list[Product]) -> Iterator[str]:
    """Names of the products that a product's card tells it was made of."""
    claims = set(_claims(product.card))
    for other in every:
        names = {(other.kind, other.directory), (other.kind, other.card.get("fingerprint"))}
        if other.name != product.name and names & claims:
            yield other.name


def _claims(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kinds and names, fingerprints or digests of what a card tells it was made of."""
    told = {**card, **(card.get("made_of") or {})}
    values = card.get("values")
    for kind, *mentions in (
        ("patches", told.get("patches")),
        ("features", values.get("features") if isinstance(values, dict) else None, _features(told)),
        ("checkpoints", card.get("checkpoint"), told.get("checkpoint")),
        ("databases", told.get("database"), card.get("database"), *(told.get("databases") or [])),
        ("grids", told.get("parent"), told.get("grid")),
    ):
        yield from ((str(kind), home_of(text).rpartition("/")[2]) for text in mentions if isinstance(text, str))


def _features(made_of: Mapping[str, Any]) -> str | None:
    """The name of the features that a checkpoint was trained on."""
    encoder = made_of.get("encoder")
    if not (isinstance(encoder, dict) and "views" in made_of and "patches" in made_of):
        return None
    return fingerprint({"patches": made_of["patches"], "views": made_of["views"], **encoder})
