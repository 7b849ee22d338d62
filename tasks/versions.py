"""Versions of the grid, and the pointer `grids/latest.json` that tells readers which one to open.

Every version has a directory of its own, which is whole before the pointer names it. So a reader of the old version
is not disturbed, and to publish, or to go back, is one conditional PUT of one small object. The pointer is also the
record of those who delete: what is condemned in it cannot be promoted, whoever comes first.

========== ===========================================================================================
key        meaning
========== ===========================================================================================
grid       URL of the Zarr that readers open
fingerprint, promoted, nonce  of this version: its name, when it became the latest, and a mark of that move
drift      how far its vectors turned from those of the version before (`tasks.comparison.drift`), if that was measured
previous   URL of the version before, if any
history    the versions that were the latest before, newest first, each with the five keys above
withdrawn  fingerprints of versions that were rolled back: no run promotes them again by itself
condemned  fingerprints of versions that are being deleted
========== ===========================================================================================
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.cards import read_card
from tasks.stac import names_in, write_collection
from tasks.tiles import GRID
from tasks.updates import home_of

HISTORY = 100  # versions that the pointer remembers
ATTEMPTS = 20  # to change the pointer: each that is lost is another's success


class Move(BaseModel):
    """The pointer came to a version."""

    model_config = ConfigDict(frozen=True)

    grid: str
    fingerprint: str = ""
    promoted: str = ""
    nonce: str = ""
    drift: dict[str, float] = {}

    @classmethod
    def to(cls, grid: str, drift: dict[str, float] | None = None) -> "Move":
        """A move to a version, now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(grid=grid, fingerprint=name_of(grid), promoted=now, nonce=secrets.token_hex(8), drift=drift or {})

    def alone(self) -> "Move":
        """The move without what a pointer holds beside it."""
        return Move(**{name: getattr(self, name) for name in Move.model_fields})


class Pointer(Move):
    """The stored pointer; without a version, `grid` is empty."""

    grid: str = ""
    history: tuple[Move, ...] = ()
    withdrawn: tuple[str, ...] = ()
    condemned: tuple[str, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def previous(self) -> str | None:
        """The version before."""
        return self.history[0].grid if self.history else None

    def changed(self, **values: Any) -> "Pointer":
        """The same with other values."""
        return self.model_copy(update=values)


@dataclass(frozen=True)
class Version:
    """A directory under `grids/`."""

    fingerprint: str
    """Its name."""
    grid: str
    """URL of its Zarr."""
    state: str
    """`latest`, `previous`, `withdrawn`, `kept`, `unfinished` or `condemned`."""
    finished: datetime | None
    """When its card was written."""
    card: dict[str, Any]
    """Its card; empty while it is unfinished."""

    @property
    def parent(self) -> str | None:
        """Fingerprint of the version whose sums it was made from."""
        return self.card.get("made_of", {}).get("parent")


def name_of(grid: str) -> str:
    """The fingerprint of the version whose Zarr is at `grid`."""
    return home_of(grid).rpartition("/")[2]


def directory() -> str:
    """URL of the directory of all versions."""
    return storage.join(settings().storage_url, "grids")


def pointer_url() -> str:
    """URL of the pointer."""
    return storage.join(directory(), "latest.json")


def read_pointer() -> tuple[Pointer, str | None]:
    """The pointer and its tag; an empty one, and none, before the first version."""
    try:
        data, tag = storage.read_tagged(pointer_url())
    except FileNotFoundError:
        return Pointer(), None
    found = Pointer.model_validate_json(data)
    return found.changed(fingerprint=found.fingerprint or name_of(found.grid)), tag


def change_pointer(change: Callable[[Pointer], Pointer]) -> Pointer:
    """Changes the pointer by a function that is called again where another change came first.

    Raises:
        UserError: Others change it all the time; or what `change` raises.
    """
    for _ in range(ATTEMPTS):
        pointer, tag = read_pointer()
        new = change(pointer)
        if new == pointer or storage.replace(pointer_url(), new.model_dump_json(indent=2).encode(), tag):
            return new
    raise UserError(f"{pointer_url()} was changed by others {ATTEMPTS} times in a row: try again")


def begin(grid: str) -> Pointer:
    """The pointer as a run finds it that is going to make a version.

    Raises:
        UserError: The version is being deleted.
    """
    pointer, _ = read_pointer()
    check_uncondemned(pointer, grid)
    return pointer


def promote(grid: str, since: Pointer | None = None, drift: dict[str, float] | None = None) -> Pointer:
    """Makes a version the latest.

    Args:
        grid: URL of its Zarr.
        since: The pointer that the caller knew; unset, the one that is there now.
        drift: How far its vectors turned from those of that pointer's version, where it was measured.

    Returns:
        The pointer as it is then.

    Raises:
        UserError: The version is not finished or is being deleted, or another one became the latest since.
    """
    known = since or read_pointer()[0]
    return catalogued(change_pointer(partial(_promoted, move=Move.to(grid, drift), known=known)))


def catalogued(pointer: Pointer) -> Pointer:
    """Makes the STAC collection follow the pointer, which it returns."""
    write_collection(directory(), pointer.fingerprint)
    return pointer


def _promoted(pointer: Pointer, move: Move, known: Pointer) -> Pointer:
    if pointer.grid == move.grid or move.nonce in {earlier.nonce for earlier in pointer.history}:
        return pointer  # whether by a lost answer of ours or by a run of the same parameters
    check_unmoved(pointer, known)
    check_there(pointer, move.grid)
    withdrawn = tuple(name for name in pointer.withdrawn if name != move.fingerprint)
    history = (pointer.alone(), *pointer.history)[:HISTORY] if pointer.grid else ()
    return Pointer(**move.model_dump(), history=history, withdrawn=withdrawn, condemned=pointer.condemned)


def check_unmoved(pointer: Pointer, known: Pointer) -> None:
    """Refuses to move a pointer that another has moved since."""
    if pointer.nonce != known.nonce:
        raise UserError(
            f"{pointer_url()} was moved from {known.fingerprint or 'nothing'} to {pointer.fingerprint} meanwhile, and "
            "stays there: compare with `rangegrid grid diff`, then decide with `rangegrid grid promote`"
        )


def check_there(pointer: Pointer, grid: str) -> None:
    """Refuses a version that is unfinished or being deleted."""
    check_uncondemned(pointer, grid)
    read_card(home_of(grid), "grid")


def check_uncondemned(pointer: Pointer, grid: str) -> None:
    """Refuses a version that is being deleted."""
    if name_of(grid) in pointer.condemned:
        raise UserError(f"{grid} is being deleted: end that with `rangegrid grid prune`, then publish it again")


def rollback(to: str | None = None) -> Pointer:
    """Goes back to a version that was the latest before; those passed over are withdrawn.

    Args:
        to: URL of its Zarr; unset, the previous one.

    Raises:
        UserError: There is no such version, or another one became the latest at the same moment.
    """
    known, _ = read_pointer()
    target = to or known.previous
    if target is None:
        raise UserError(f"there is no version before {known.grid or 'the first'}: nothing to go back to")
    return catalogued(change_pointer(partial(_rolled_back, move=Move.to(target), known=known)))


def _rolled_back(pointer: Pointer, move: Move, known: Pointer) -> Pointer:
    if move.nonce == pointer.nonce:
        return pointer
    check_unmoved(pointer, known)
    grids = [earlier.grid for earlier in pointer.history]
    if move.grid not in grids:
        raise UserError(f"{move.grid} was not the latest before: use `rangegrid grid promote`")
    check_there(pointer, move.grid)
    place = grids.index(move.grid)
    passed = [pointer.fingerprint, *(name_of(grid) for grid in grids[:place])]
    withdrawn = tuple(dict.fromkeys([*pointer.withdrawn, *passed]))
    withdrawn = tuple(name for name in withdrawn if name != move.fingerprint)
    return Pointer(
        **move.model_dump(), history=pointer.history[place + 1 :], withdrawn=withdrawn, condemned=pointer.condemned
    )


def versions(pointer: Pointer | None = None) -> list[Version]:
    """All versions: finished ones first, newest first."""
    pointer = pointer or read_pointer()[0]
    found = [_version(name, pointer) for name in names_in(directory())]
    there = [version for version in found if version.card or storage.size(home_of(version.grid))]  # no empty directory
    return sorted(there, key=lambda v: (v.finished is None, -v.finished.timestamp() if v.finished else 0, v.grid))


def _version(name: str, pointer: Pointer) -> Version:
    card_url = storage.join(directory(), name, "card.json")
    grid = storage.join(directory(), name, GRID)
    try:
        card, finished = storage.read_json(card_url), storage.modified(card_url)
    except FileNotFoundError:
        card, finished = {}, None
    return Version(name, grid, _state(name, grid, pointer, bool(card)), finished, card)


def _state(name: str, grid: str, pointer: Pointer, finished: bool) -> str:
    marks = {
        "condemned": name in pointer.condemned,
        "unfinished": not finished,
        "latest": grid == pointer.grid,
        "previous": grid == pointer.previous,
        "withdrawn": name in pointer.withdrawn,
    }
    return next((state for state, holds in marks.items() if holds), "kept")


def find(name: str) -> str:
    """The URL of a version's Zarr.

    Args:
        name: `latest`, `previous`, a fingerprint or the first digits of one, or the URL or path of a grid.

    Raises:
        UserError: There is none, or several begin so.
    """
    if "/" in name:
        return storage.as_url(name.rstrip("/"))
    if name in ("latest", "previous"):
        pointer, _ = read_pointer()
        grid = pointer.grid if name == "latest" else pointer.previous
        if not grid:
            raise UserError(f"there is no {name} version in {directory()}: promote one with `rangegrid grid promote`")
        return grid
    begin = [found for found in names_in(directory()) if found.startswith(name)]
    if len(begin) != 1:
        known = ", ".join(begin) or "none"
        raise UserError(f"{name!r} names {known} of the versions in {directory()}: `rangegrid grid list` shows all")
    return storage.join(directory(), begin[0], GRID)


def prune(keep: int, *, unfinished: bool = False, dry_run: bool = False) -> list[Version]:
    """Deletes old versions; what a killed prune left is deleted too.

    Kept are the newest, the latest, the previous one, and the parents of those, from whose sums they are made.

    Args:
        keep: How many of the newest are kept.
        unfinished: Deletes unfinished versions too: give it while no run publishes.
        dry_run: Deletes nothing.

    Returns:
        The versions that are (or would be) deleted.

    Raises:
        UserError: Nothing is promoted.
    """
    doomed: list[Version] = []

    def condemn(pointer: Pointer) -> Pointer:
        doomed[:] = to_prune(versions(pointer), pointer, keep, unfinished)
        names = {version.fingerprint for version in doomed}
        history = tuple(move for move in pointer.history if move.fingerprint not in names)
        withdrawn = tuple(name for name in pointer.withdrawn if name not in names)
        return pointer.changed(history=history, withdrawn=withdrawn, condemned=tuple(sorted(names)))

    if dry_run:
        condemn(read_pointer()[0])
        return doomed
    change_pointer(condemn)
    for version in doomed:
        storage.delete(storage.join(directory(), version.fingerprint, "card.json"))
        storage.delete(storage.join(directory(), version.fingerprint))
    gone = {version.fingerprint for version in doomed}
    catalogued(change_pointer(lambda p: p.changed(condemned=tuple(name for name in p.condemned if name not in gone))))
    return doomed


def to_prune(found: list[Version], pointer: Pointer, keep: int, unfinished: bool) -> list[Version]:
    """The versions that nothing keeps, of those that `versions` found.

    Raises:
        UserError: Nothing is promoted, so nothing says what is in use.
    """
    if not pointer.grid:
        raise UserError(f"no version in {directory()} is the latest: promote one first, with `rangegrid grid promote`")
    finished = [version for version in found if version.state not in ("condemned", "unfinished")]
    kept = [*finished[:keep], *(version for version in finished if version.state in ("latest", "previous"))]
    names = {version.fingerprint for version in kept} | {version.parent for version in kept}
    doomed = [version for version in finished if version.fingerprint not in names]
    return doomed + [v for v in found if v.state == "condemned" or (unfinished and v.state == "unfinished")]
