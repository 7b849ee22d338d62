"""What lies in a storage and why: every product of every kind, what it is made of, and what is made of it.

A product is named by its directory, `kind/name`, everywhere here. Cards name a checkpoint by the digest of its weights
and other products by fingerprint or URL: all these are looked up.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.cards import GRID, Card, find_card, fingerprint
from tasks.products import CARDS
from tasks.release.lines import read_told, versions_in
from tasks.release.versions import Version, versions

KINDS = {model.directory: model for model in CARDS}  # by the name of their directory
ORDER = list(KINDS)  # what is made of others comes after these
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
    card: Card
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
        return self.is_finished and self.directory != fingerprint(self.card.made_of)


def products() -> dict[str, Product]:
    """Returns all products by name, by kind and age, with what they are made of and used by."""
    known = {version.fingerprint: version for version in versions()}
    places = [(kind, name) for kind in KINDS for name in _directories(kind)]
    with ThreadPoolExecutor(READERS) as pool:
        found = [product for product in pool.map(lambda place: _product(place[0], place[1], known), places) if product]
    found.sort(key=lambda product: (ORDER.index(product.kind), product.changed))
    made_of = {product.name: tuple(_named(product, found)) for product in found}
    used_by = {name: tuple(other for other, parts in made_of.items() if name in parts) for name in made_of}
    return {p.name: replace(p, made_of=made_of[p.name], used_by=used_by[p.name]) for p in found}


def _directories(kind: str) -> list[str]:
    url = storage.join(settings().storage_url, kind)
    return versions_in(url) if kind == "grids" else storage.names(url)


def _product(kind: str, name: str, known: Mapping[str, Version]) -> Product | None:
    url = storage.join(settings().storage_url, kind, name)
    size, changed = storage.measured(url)
    if changed is None:  # an emptied directory
        return None
    if kind == "grids":
        version = known.get(name)
        told = version.told if version else read_told(storage.join(url, GRID))
        state, line = (version.state, version.line) if version else ("unfinished", "")
        return Product(kind, name, size, changed, state, told.card, line)
    card = _card(url, KINDS[kind])
    return Product(kind, name, size, changed, "finished" if card else "unfinished", card or Card())


def _card(url: str, model: type[Card]) -> Card | None:
    """The card of a product; of another kind's, or of one that lacks something, what all cards tell."""
    try:
        return find_card(url, model)
    except UserError:
        return find_card(url, Card)


def _named(product: Product, every: list[Product]) -> Iterator[str]:
    """Names of the products that a product's card tells it was made of."""
    for other in every:
        names = {(other.kind, other.directory), (other.kind, other.card.fingerprint)}
        if other.name != product.name and names & product.card.sources:
            yield other.name
