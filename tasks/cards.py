"""Reads and writes cards and fingerprints: what made a product, stored beside it as `card.json`.

A product's directory is named by the fingerprint of everything that decides its content. The same parameters
find the same directory and resume; changed ones make a new version; nothing that was good is overwritten.
"""

import hashlib
import json
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from infra import storage
from infra.addresses import as_url
from infra.errors import UserError
from infra.settings import settings

GRID, SUMS, COMPACT = "grid.zarr", "sums.zarr", "compact.zarr"  # in the directory of a grid

Source = tuple[str, str]  # the directory of a kind, and a product's name, fingerprint or digest


class Part(BaseModel):
    """A part of a card: frozen, and open to entries that other versions add."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Card(Part):
    """Entries of the card of any product."""

    directory: ClassVar[str] = ""
    """Name of the directory of all products of the kind."""

    kind: str = ""
    """The kind of product."""
    fingerprint: str = ""
    """The product's name; of a checkpoint the digest of its weights, of an imported database that of its file."""
    made_of: dict[str, Any] = {}
    """Everything that decides the product, exactly as the fingerprint hashes it."""
    line: str = ""
    """The line of products that it belongs to."""
    attribution: str = ""
    """Attribution of the images."""

    @field_validator("line", "made_of", mode="before")
    @classmethod
    def _told(cls, value: Any, info: ValidationInfo) -> Any:
        """Treats null, which cards of earlier versions may have, as a missing entry."""
        return value or cls.model_fields[str(info.field_name)].default

    @property
    def sources(self) -> set[Source]:
        """Returns the products that it was made of, as far as the card names them."""
        return set()

    def stored(self) -> dict[str, Any]:
        """Returns the card as it is stored."""
        return {"kind": self.kind} | self.model_dump(exclude_unset=True)


AnyCard = TypeVar("AnyCard", bound=Card)
AnyPart = TypeVar("AnyPart", bound=Part)


def kind_of(model: type[Card]) -> str:
    """Returns the kind of product whose cards a model reads; nothing of the one that reads all."""
    return model.model_fields["kind"].default


def fingerprint(content: Any) -> str:
    """Returns 12 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def find_card(url: str, model: type[AnyCard]) -> AnyCard | None:
    """Returns the card of the product at `url`; none where nothing finished is there.

    Args:
        url: URL of the product's directory.
        model: The kind of card, such as `GridCard`; `Card` for a product of whatever kind.

    Raises:
        UserError: It is a product of another kind, or its card is damaged.
    """
    try:
        content = storage.read_json(storage.join(url, "card.json"))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the card at {url} is damaged ({error}): make the product again") from error
    kind = kind_of(model)
    if kind and isinstance(content, dict) and content.get("kind") != kind:
        raise UserError(f"{url} holds {content.get('kind')!r}, not {kind!r}: give the URL of a {kind}")
    return parse_card(content, model, url)


def parse_card(content: Any, model: type[AnyPart], url: str) -> AnyPart:
    """Returns what the card at `url` tells that has this content.

    Raises:
        UserError: It is no such card.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
        raise UserError(f"the card at {url} is damaged or foreign ({why}): make the product again") from error


def read_card(url: str, model: type[AnyCard]) -> AnyCard:
    """Returns the card of the finished product at `url`.

    Args:
        url: URL of the product's directory.
        model: The kind of card, such as `GridCard`; `Card` for a product of whatever kind.

    Raises:
        UserError: Nothing finished is there, it is a product of another kind, or its card is damaged.
    """
    card = find_card(url, model)
    if card is None:
        raise UserError(
            f"there is no finished {kind_of(model) or 'product'} at {url}: give the URL that the step printed"
        )
    return card


def is_finished(url: str) -> bool:
    """Tells whether a product is finished: its card, written last, is the completion marker."""
    return storage.exists(storage.join(url, "card.json"))


def write_card(url: str, card: Card) -> None:
    """Writes the card that declares the product at `url` finished."""
    storage.write_json(storage.join(url, "card.json"), card.stored())


def made_before(url: str, model: type[AnyCard], made_of: Any) -> AnyCard | None:
    """Returns the card of the same product made at `url` before, or None where nothing is finished.

    Raises:
        UserError: Another product is there.
    """
    there = find_card(url, Card)
    if there is None:
        return None
    if there.kind != kind_of(model) or there.made_of != made_of:
        raise UserError(f"{url} holds another {there.kind} already: name a directory of its own")
    return read_card(url, model)


def product_url(kind: str, made_of: Any) -> str:
    """Returns the URL of the product made of `made_of`: `<storage>/<kind>/<fingerprint>`."""
    return storage.join(settings().storage_url, kind, fingerprint(made_of))


def home_of(grid: str) -> str:
    """Returns the URL of the product whose Zarr is at a path or URL."""
    return as_url(grid).rstrip("/").removesuffix("/" + GRID)


def whole_of(grid: str) -> str:
    """Returns the URL of the grid beside a compact product at a path or URL, and of another grid its own."""
    url = as_url(grid).rstrip("/")
    home = url.removesuffix("/" + COMPACT)
    return url if home == url else storage.join(home, GRID)


def name_of(grid: str) -> str:
    """Returns the fingerprint of the version whose Zarr is at `grid`."""
    return home_of(grid).rpartition("/")[2]
