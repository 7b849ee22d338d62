"""Finds the newest product of a product line, which a schedule builds on instead of a fixed URL.

A product is in the line that its card names, which is that of what it is made of; a sample's is its parameter `line`.
The line is no part of a fingerprint: where a run of another line finds its product there already, a mark beside the
card, `lines/<line>`, puts the product into that line too.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.cards import GRID, AnyCard, Card, kind_of, read_card
from tasks.params import Params, PipelineParams
from tasks.products import CheckpointCard, DatabaseCard, GridCard, PatchesCard

NEWEST = "newest"
UNNAMED = "-"  # marker of the line without a name
READS = 16  # cards read at a time


def is_newest(text: Any) -> bool:
    """Tells whether a URL is left open: `newest`, or `newest:LINE`."""
    return isinstance(text, str) and text.partition(":")[0] == NEWEST


def lines_of(url: str, card: Card) -> dict[str, datetime]:
    """Returns the lines that a finished product is in, and since when."""
    marks = storage.names(storage.join(url, "lines"))
    places = {"" if mark == UNNAMED else mark: storage.join(url, "lines", mark) for mark in marks}
    places[card.line] = storage.join(url, "card.json")
    return {line: storage.modified(place) for line, place in places.items()}


def enter(url: str, line: str) -> None:
    """Adds a finished product to a line, unless the line has it."""
    if line not in lines_of(url, read_card(url, Card)):
        storage.create(storage.join(url, "lines", line or UNNAMED), b"{}")


def inherit(url: str, patches: str) -> None:
    """Adds a finished product to the lines of the patches that it was made of."""
    for line in lines_of(patches, read_card(patches, PatchesCard)):
        enter(url, line)


def resolve(asked: Mapping[str, Any], at: datetime) -> dict[str, Any]:
    """Returns the parameters of a run with everything settled that was left open.

    Args:
        asked: URLs by the parameters' names, and parameter models.
        at: When the run was due: rolling windows of time end there.

    Returns:
        The same with dates in place of rolling windows, and in place of `newest` the product of that kind which was
        finished last in its line; of a database the checkpoint and the grid that belong to it.

    Raises:
        UserError: The line has no such product yet.
    """
    found = dict(asked)
    found |= {name: value.at(at) for name, value in asked.items() if isinstance(value, Params)}
    if isinstance(params := found.get("params"), PipelineParams) and params.base:
        base = resolve(dict(zip(("checkpoint", "database"), params.base, strict=True)), at)
        found["params"] = params.model_copy(update={"base": tuple(base.values())})
    if is_newest(found.get("patches")):
        found["patches"] = newest(PatchesCard, found["patches"])
    if is_newest(found.get("database")):
        found["database"] = _database(found["database"], found.get("checkpoint"))
    if named := found.get("databases"):
        found["databases"] = [newest(DatabaseCard, url) if is_newest(url) else url for url in named]
    if is_newest(found.get("checkpoint")):
        found["checkpoint"] = _checkpoint(found["checkpoint"], found.get("database"))
    if is_newest(found.get("grid")):
        found["grid"] = _grid(found["grid"], found.get("database"))
    return found


def _database(asked: str, checkpoint: str | None) -> str:
    """Returns the newest database of a line; beside a checkpoint given by URL, the newest encoded with it."""
    if checkpoint is None or is_newest(checkpoint):
        return newest(DatabaseCard, asked)
    ours = read_card(checkpoint, CheckpointCard).fingerprint
    return newest(DatabaseCard, asked, lambda card: card.checkpoint == ours)


def _checkpoint(asked: str, database: str | None) -> str:
    """Returns the newest checkpoint of a line; beside a database, the one that made its keys, of any line."""
    if database is None:
        return newest(CheckpointCard, asked)
    wanted = read_card(database, DatabaseCard).checkpoint
    return newest(CheckpointCard, asked, lambda card: card.fingerprint == wanted, everywhere=True)


def _grid(asked: str, database: str | None) -> str:
    """Returns the newest grid of a line, or of any where none is named; beside a database, of grids made from it."""
    named = ":" in asked
    found = newest(GridCard, asked, lambda card: database in (None, card.database), everywhere=not named)
    return storage.join(found, GRID)


def newest(
    model: type[AnyCard], asked: str, fits: Callable[[AnyCard], bool] | None = None, *, everywhere: bool = False
) -> str:
    """Returns the URL of the product of a kind that was finished last.

    Args:
        model: The kind of its card.
        asked: `newest`, for products without a line, or `newest:LINE`.
        fits: Whether a product comes into question, by its card; unset, any does.
        everywhere: In whatever line.

    Raises:
        UserError: There is none.
    """
    line = asked.partition(":")[2]
    home = storage.join(settings().storage_url, model.directory)

    def finished(name: str) -> tuple[datetime, str] | None:
        url = storage.join(home, name)
        try:
            card = read_card(url, model)
            lines = lines_of(url, card)
        except (UserError, OSError):  # unfinished, deleted meanwhile, or no product
            return None
        times = [when for named, when in lines.items() if everywhere or named == line]
        if not times or (fits and not fits(card)):
            return None
        return max(times), url

    with ThreadPoolExecutor(READS) as pool:
        found = [one for one in pool.map(finished, storage.names(home)) if one]
    if not found:
        named = f"the line {line!r}" if line else "the line without a name"
        raise UserError(
            f"{asked!r}: no finished {kind_of(model)} of {named} is under {home} that fits: run the step that makes "
            "it, or give a URL"
        )
    return max(found)[1]
