"""Lists what is stored and why: every product of every kind, what it was made from, and what uses it.

A product is named by its directory here, `kind/name`. Cards name a checkpoint by the digest of its weights, and other
products by fingerprint or URL. All of these are looked up.
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
from tasks.release.lines import Version, read_told, versions_in
from tasks.release.versions import versions

KINDS = {model.directory: model for model in CARDS}  # models of cards, by the name of the kind's directory
ORDER = list(KINDS)  # each kind comes after those that it is made from
READERS = 8  # products looked up at a time


@dataclass(frozen=True)
class Product:
    """A product: a directory under that of its kind."""

    kind: str
    """Name of the directory of its kind."""
    directory: str
    """Name of the product's directory."""
    bytes: int
    """Bytes of all its objects."""
    changed: datetime
    """When one of its objects was last written."""
    state: str
    """`finished` or `unfinished`; of a grid, its state as a version."""
    card: Card
    """The card; for an unfinished product, what its metadata tell, if anything."""
    line: str = ""
    """Product line of a grid."""
    made_of: tuple[str, ...] = ()
    """Names of the stored products that it was made from; unknown for most unfinished ones."""
    used_by: tuple[str, ...] = ()
    """Names of the stored products that were made from it."""

    @property
    def name(self) -> str:
        """Returns `kind/directory`."""
        return f"{self.kind}/{self.directory}"

    @property
    def url(self) -> str:
        """Returns the URL of its directory."""
        return storage.join(settings().storage_url, self.kind, self.directory)

    @property
    def is_finished(self) -> bool:
        """Tells whether the product is finished, by its card."""
        return self.state not in ("unfinished", "condemned")

    @property
    def is_imported(self) -> bool:
        """Tells whether no step would make it again under this name: it was imported, or put here by a person."""
        return self.is_finished and self.directory != fingerprint(self.card.made_of)


def products() -> dict[str, Product]:
    """Returns all products by name, in order of kind and age, with what they were made from and what uses them."""
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
    if kind == "grids":
        return versions_in(url)
    return storage.names(url)


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
    """Returns the card of a product; where it does not fit its kind, the entries that all cards have."""
    try:
        return find_card(url, model)
    except UserError:
        return find_card(url, Card)


def _named(product: Product, every: list[Product]) -> Iterator[str]:
    """Yields the names of the products that a product was made from, by its card."""
    for other in every:
        names = {(other.kind, other.directory), (other.kind, other.card.fingerprint)}
        if other.name != product.name and names & product.card.sources:
            yield other.name
