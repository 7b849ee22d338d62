"""Keeps the versions of the grid, and the pointers that tell readers which one to open.

Every version has a directory of its own, which is whole before a pointer names it. So a reader of the old version
is not disturbed, and to publish, or to go back, is one conditional PUT of one small object. Each product line
(`tasks.release.lines`) has one pointer: the line that was first in a storage has `grids/latest.json`, which never
goes over to another line, every other one `grids/latest.LINE.json`; under that name the first one's is found too, as
a copy that is written after it. A pointer is also the record of those who delete: what is condemned in it cannot be
promoted, whoever comes first, and a run under whose hands a version was deleted finds that here.

========== ===========================================================================================
key        meaning
========== ===========================================================================================
grid       URL of the Zarr that readers open
href       the same, relative to the directory of the pointer
line       the product line
fingerprint, promoted, nonce  of this version: its name, when it became the latest, and a mark of that move
drift      drift of its vectors since the version before (`tasks.release.diff.drift`), if it was measured
previous   URL of the version before, if any
history    the versions that were the latest before, newest first, each with the seven keys above
withdrawn  fingerprints of versions that were rolled back: no run promotes them again by itself
condemned  fingerprints of versions that are being deleted
deleted    by fingerprint, a mark of the last deletion
========== ===========================================================================================

A pointer from before there were lines has no `href` and no `line`, and its history may have versions of several lines.
Each version counts in the line of its card, and a line without a pointer begins with those.
"""

import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.cards import GRID, home_of, name_of, read_card
from tasks.products import GridCard
from tasks.release.lines import Layout, Version, choose_line, lines_in, read_line, read_told, versions_in

HISTORY = 100  # versions in a pointer's history
DELETED = 1000  # deletions that a pointer records
ATTEMPTS = 20  # attempts to change a pointer: each failed one is another run's success
READERS = 8  # cards read at a time


class Move(BaseModel):
    """A move of a pointer to a version."""

    model_config = ConfigDict(frozen=True)

    grid: str
    href: str = ""
    line: str = ""
    fingerprint: str = ""
    promoted: str = ""
    nonce: str = ""
    drift: dict[str, float] = {}

    @classmethod
    def to(cls, grid: str, line: str, drift: dict[str, float] | None = None) -> "Move":
        """Returns a move to a version, made now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(grid=grid, line=line, promoted=now, nonce=secrets.token_hex(8), drift=drift or {}).here()

    def here(self) -> "Move":
        """Returns the move as it is in this storage, which may be a copy, and complete."""
        if not self.grid:
            return self
        inside = directory() + "/"
        grid = inside + self.href if self.href else self.grid
        href = grid.removeprefix(inside) if grid.startswith(inside) else ""
        named = {"fingerprint": self.fingerprint or name_of(grid), "line": self.line or read_line(grid)}
        return self.model_copy(update={"grid": grid, "href": href, **named})

    def alone(self) -> "Move":
        """Returns the move without what a pointer holds beside it."""
        return Move(**{name: getattr(self, name) for name in Move.model_fields})


class Pointer(Move):
    """The stored pointer of a line; without a version, `grid` is empty."""

    grid: str = ""
    history: tuple[Move, ...] = ()
    withdrawn: tuple[str, ...] = ()
    condemned: tuple[str, ...] = ()
    deleted: dict[str, str] = {}

    @property
    def own(self) -> list[Move]:
        """Returns the versions of the line that were the latest before, newest first."""
        return [move for move in self.history if move.line == self.line]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def previous(self) -> str | None:
        """Returns the version before."""
        return self.own[0].grid if self.own else None

    @property
    def chain(self) -> list[str]:
        """Returns the fingerprints of the versions that were in force, each once, oldest first, the latest last."""
        newest_first = dict.fromkeys([self.fingerprint, *(move.fingerprint for move in self.own)])
        return list(newest_first)[::-1]

    def changed(self, **values: Any) -> "Pointer":
        """Returns a copy with other values."""
        return self.model_copy(update=values)

    def begun(self, line: str) -> "Pointer":
        """Returns the first pointer of another line: its moves, from before there were lines, are in this history."""
        moves = [move for move in self.history if move.line == line]
        if not moves:
            return Pointer(line=line, deleted=self.deleted)
        earlier = {"history": tuple(moves[1:]), "withdrawn": self.withdrawn, "deleted": self.deleted}
        return Pointer(**moves[0].model_dump(), **earlier)


def directory() -> str:
    """Returns the URL of the directory of all versions."""
    return storage.join(settings().storage_url, "grids")


def pointer_url(line: str = "") -> str:
    """Returns the URL of a line's pointer; without a line, of the first line's, which readers knew before any."""
    return storage.join(directory(), f"latest.{line}.json" if line else "latest.json")


def _read(url: str) -> tuple[Pointer, str | None]:
    try:
        data, tag = storage.read_tagged(url)
    except FileNotFoundError:
        return Pointer(), None
    found = Pointer.model_validate_json(data)
    own = found.alone().here()
    return found.changed(**own.model_dump(), history=tuple(move.here() for move in found.history)), tag


def _located(line: str) -> tuple[str, Pointer, str | None]:
    """Returns URL, pointer and tag of a line's pointer; before the first version, an empty pointer and no tag."""
    first, tag = _read(pointer_url())
    if not line or first.line in ("", line):
        return pointer_url(), first.changed(line=first.line or line), tag
    own, own_tag = _read(pointer_url(line))
    return pointer_url(line), own if own_tag else first.begun(line), own_tag


def read_pointer(line: str = "") -> tuple[Pointer, str | None]:
    """Returns the pointer of a line, by default the first, and its tag; before the first version, empty and None."""
    return _located(line)[1:]


def pointers() -> dict[str, Pointer]:
    """Returns the pointers of all lines that have a version in force, the first line's first."""
    first, _ = read_pointer()
    lines = [first.line, *(move.line for move in first.history if move.line), *lines_in(directory())]
    found = {first.line: first}
    for line in lines:
        if line not in found:
            found[line] = read_pointer(line)[0]
    return {line: pointer for line, pointer in found.items() if pointer.grid}


def change_pointer(change: Callable[[Pointer], Pointer], line: str = "") -> Pointer:
    """Changes the pointer of a line by a function that is called again where another change came first.

    Raises:
        UserError: Others change it all the time; or what `change` raises.
    """
    for _ in range(ATTEMPTS):
        url, pointer, tag = _located(line)
        new = change(pointer)
        if new == pointer or storage.replace(url, new.model_dump_json(indent=2).encode(), tag):
            return new
    raise UserError(f"{pointer_url(line)} was changed by others {ATTEMPTS} times in a row: try again")


def begin(grid: str, asked: str = "", layout: Layout | None = None) -> Pointer:
    """Returns the pointer as a run finds it before it makes a version.

    Args:
        grid: URL of its Zarr.
        asked: The line that it is to be in, if one is named.
        layout: What its readers will rely on; unset, it is there already.

    Raises:
        UserError: The version is being deleted, or is there and in another line.
    """
    pointer, _ = read_pointer(choose_line(grid, asked, layout) if layout else read_line(grid))
    check_uncondemned(pointer, grid)
    return pointer


def promote(grid: str, since: Pointer | None = None, drift: dict[str, float] | None = None) -> Pointer:
    """Makes a version the latest of its line.

    Args:
        grid: URL of its Zarr.
        since: The pointer that the caller knew, of `begin`; unset, the one that is there now.
        drift: How far its vectors turned from those of that pointer's version, where it was measured.

    Returns:
        The pointer as it is then.

    Raises:
        UserError: The version is not finished or is being deleted, or since then was deleted or another the latest.
    """
    known = since or begin(grid)
    move = Move.to(grid, known.line, drift)
    return catalogued(change_pointer(partial(_promoted, move=move, known=known), known.line))


def catalogued(pointer: Pointer) -> Pointer:
    """Makes STAC and the copies of pointers by their lines' names follow the pointer; returns it."""
    from tasks.release.stac import write_collection  # here: what lists or deletes versions waits for no geometry

    found = pointers()
    for position, (line, own) in enumerate(found.items()):
        # The first line's pointer is `latest.json`, so this is a copy to renew; the others have theirs here.
        write = storage.create if position else storage.write
        write(pointer_url(line), own.model_dump_json(indent=2).encode())
    first = next(iter(found.values()), pointer)
    chains = {line: own.chain for line, own in found.items()}
    write_collection(directory(), first.fingerprint, {version.fingerprint: version for version in versions()}, chains)
    return pointer


def _promoted(pointer: Pointer, move: Move, known: Pointer) -> Pointer:
    if pointer.grid == move.grid or move.nonce in {earlier.nonce for earlier in pointer.history}:
        return pointer  # whether by a lost answer of ours or by a run of the same parameters
    check_unmoved(pointer, known)
    check_undeleted(pointer, known, move.grid)
    check_there(pointer, move.grid)
    withdrawn = tuple(name for name in pointer.withdrawn if name != move.fingerprint)
    if pointer.grid:
        history = (pointer.alone(), *pointer.history)[:HISTORY]
    else:
        history = ()
    return pointer.changed(**move.model_dump(), history=history, withdrawn=withdrawn)


def check_unmoved(pointer: Pointer, known: Pointer) -> None:
    """Refuses to move a pointer that another has moved since."""
    if pointer.nonce != known.nonce:
        raise UserError(
            f"{pointer_url()} was moved from {known.fingerprint or 'nothing'} to {pointer.fingerprint} meanwhile, and "
            "stays there: compare with `rangegrid grid diff`, then decide with `rangegrid grid promote`"
        )


def check_undeleted(pointer: Pointer, known: Pointer, grid: str) -> None:
    """Refuses a version that was deleted since a run read the pointer."""
    name = name_of(grid)
    if pointer.deleted.get(name) != known.deleted.get(name):
        raise UserError(f"{grid} was deleted by a prune meanwhile, and no reader was sent to it: run this again")


def check_there(pointer: Pointer, grid: str) -> None:
    """Refuses a version that is unfinished, being deleted, or a card without a grid."""
    check_uncondemned(pointer, grid)
    read_card(home_of(grid), GridCard)
    if not storage.exists(storage.join(grid, "zarr.json")):
        raise UserError(f"{home_of(grid)} has a card and no grid: delete it, and publish it again")


def check_uncondemned(pointer: Pointer, grid: str) -> None:
    """Refuses a version that is being deleted."""
    if name_of(grid) in pointer.condemned:
        raise UserError(f"{grid} is being deleted: end that with `rangegrid grid prune`, then publish it again")


def confirm(grid: str, since: Pointer) -> None:
    """Takes the card of a version back that was deleted while its run was at work; call it once the card is written.

    Who deletes condemns first, then deletes; who makes writes the card first, then looks here: one of both notices.

    Args:
        grid: URL of its Zarr.
        since: The pointer when the run began.

    Raises:
        UserError: It was, or is being, deleted.
    """
    first, own = read_pointer()[0], read_pointer(since.line)[0]
    try:
        for pointer in (first, own):
            check_uncondemned(pointer, grid)
        check_undeleted(own, since, grid)
    except UserError:
        storage.delete(storage.join(home_of(grid), "card.json"))
        raise


def rollback(to: str | None = None, line: str = "") -> Pointer:
    """Goes back to a version that was the latest of its line before; those passed over are withdrawn.

    Args:
        to: URL of its Zarr; unset, the previous one.
        line: Of the previous one; unset, the first line.

    Raises:
        UserError: There is no such version, or another one became the latest at the same moment.
    """
    known, _ = read_pointer(read_line(to) if to else line)
    target = to or known.previous
    if target is None:
        raise UserError(f"there is no version before {known.grid or 'the first'}: nothing to go back to")
    move = Move.to(target, known.line)
    return catalogued(change_pointer(partial(_rolled_back, move=move, known=known), known.line))


def _rolled_back(pointer: Pointer, move: Move, known: Pointer) -> Pointer:
    if move.nonce == pointer.nonce:
        return pointer
    check_unmoved(pointer, known)
    grids = [earlier.grid for earlier in pointer.own]
    if move.grid not in grids:
        raise UserError(f"{move.grid} was not the latest before: use `rangegrid grid promote`")
    check_there(pointer, move.grid)
    place = grids.index(move.grid)
    passed = [pointer.fingerprint, *(name_of(grid) for grid in grids[:place])]
    withdrawn = tuple(name for name in dict.fromkeys([*pointer.withdrawn, *passed]) if name != move.fingerprint)
    over = {name_of(grid) for grid in grids[: place + 1]}
    history = tuple(earlier for earlier in pointer.history if earlier.fingerprint not in over)
    return pointer.changed(**move.model_dump(), history=history, withdrawn=withdrawn)


def versions() -> list[Version]:
    """Returns all versions: finished ones first, newest first."""
    known = pointers()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda name: _version(name, known), versions_in(directory())))
    there = [
        version for version in found if version.finished or storage.size(home_of(version.grid))
    ]  # no empty directory
    return sorted(there, key=_age)


def _age(version: Version) -> tuple[bool, float, str]:
    """Returns a key that sorts finished versions first, the newest first."""
    if version.finished is None:
        return True, 0.0, version.grid
    return False, -version.finished.timestamp(), version.grid


def _version(name: str, known: dict[str, Pointer]) -> Version:
    home, grid = storage.join(directory(), name), storage.join(directory(), name, GRID)
    told = read_told(grid)
    if told.is_finished:
        finished = storage.modified(storage.join(home, "card.json"))
    else:
        finished = None
    state = _state(name, grid, told.line, known.values(), told.is_finished)
    return Version(name, grid, state, finished, told)


def _state(name: str, grid: str, line: str, known: Iterable[Pointer], finished: bool) -> str:
    marks = {
        "condemned": any(name in pointer.condemned for pointer in known),
        "unfinished": not finished,
        "latest": any(grid == pointer.grid for pointer in known),
        "previous": any(grid == pointer.previous for pointer in known),
        "withdrawn": any(name in pointer.withdrawn for pointer in known if pointer.line == line),
    }
    return next((state for state, holds in marks.items() if holds), "kept")


def find(name: str) -> str:
    """Returns the URL of a version's Zarr.

    Args:
        name: `latest` or `previous` of the first line, `latest.LINE` or `previous.LINE` of another, a fingerprint or
            the first digits of one, or the URL or path of a grid.

    Raises:
        UserError: There is none, or several begin so.
    """
    if "/" in name:
        return storage.as_url(name.rstrip("/"))
    which, _, line = name.partition(".")
    if which in ("latest", "previous"):
        pointer, _ = read_pointer(line)
        grid = pointer.grid if which == "latest" else pointer.previous
        if not grid:
            raise UserError(f"there is no {name} version in {directory()}: promote one with `rangegrid grid promote`")
        return grid
    begin = [found for found in versions_in(directory()) if found.startswith(name)]
    if len(begin) != 1:
        known = ", ".join(begin) or "none"
        raise UserError(f"{name!r} names {known} of the versions in {directory()}: `rangegrid grid list` shows all")
    return storage.join(directory(), begin[0], GRID)


def prune(
    keep: int,
    *,
    unfinished: bool = False,
    dry_run: bool = False,
    line: str = "",
    spared: frozenset[str] = frozenset(),
) -> list[Version]:
    """Deletes old versions of each line, and what a killed prune left.

    Kept are the newest of each line, the latest, the previous one, and the parents of those, from whose sums they are
    made. A line without a latest is left as it is: nothing says what of it is in use.

    Args:
        keep: How many of the newest of each line are kept.
        unfinished: Deletes unfinished versions too: give it while no run publishes.
        dry_run: Deletes nothing.
        line: The only line to prune; unset, all.
        spared: Fingerprints of versions that are kept whatever else holds.

    Returns:
        The versions that are (or would be) deleted.

    Raises:
        UserError: Nothing is promoted.
    """
    known = pointers()
    if not known or (line and line not in known):
        which = f"of the line {line} in" if line else "in"
        raise UserError(
            f"no version {which} {directory()} is the latest: promote one first, with `rangegrid grid promote`"
        )
    deleted: dict[str, Version] = {}
    for each in [line] if line else list(known):
        choose = partial(to_prune, line=each, keep=keep, unfinished=unfinished, spared=spared)
        deleted |= {version.fingerprint: version for version in _prune(each, choose, dry_run)}
    if unfinished and not line:
        choose = partial(_stray, known=set(known), spared=spared)
        deleted |= {version.fingerprint: version for version in _prune(next(iter(known)), choose, dry_run)}
    if not dry_run:
        catalogued(read_pointer()[0])
    return list(deleted.values())


def _prune(line: str, choose: Callable[[list[Version]], list[Version]], dry_run: bool) -> list[Version]:
    """Deletes the versions that `choose` finds, and those whose deletion was begun, by way of the pointer of a line."""
    doomed: list[Version] = []

    def condemn(pointer: Pointer) -> Pointer:
        found = versions()
        begun = [version for version in found if version.fingerprint in pointer.condemned]
        chosen = [version for version in choose(found) if version.grid not in (pointer.grid, pointer.previous)]
        doomed[:] = {version.fingerprint: version for version in [*chosen, *begun]}.values()
        names = {version.fingerprint for version in doomed}
        history = tuple(move for move in pointer.history if move.fingerprint not in names)
        withdrawn = tuple(name for name in pointer.withdrawn if name not in names)
        return pointer.changed(history=history, withdrawn=withdrawn, condemned=tuple(sorted(names)))

    if dry_run:
        condemn(read_pointer(line)[0])
        return doomed
    change_pointer(condemn, line)
    gone = [version for version in doomed if not _finished_since(version)]
    for version in gone:
        storage.delete(storage.join(directory(), version.fingerprint, "card.json"))
        storage.delete(storage.join(directory(), version.fingerprint))
    change_pointer(partial(_deleted, doomed=doomed, gone=gone, mark=secrets.token_hex(8)), line)
    return gone


def _finished_since(version: Version) -> bool:
    """Tells whether a run has finished an unfinished version, perhaps with a pointer read before it was condemned."""
    return version.state == "unfinished" and storage.exists(storage.join(home_of(version.grid), "card.json"))


def _deleted(pointer: Pointer, doomed: list[Version], gone: list[Version], mark: str) -> Pointer:
    names = {version.fingerprint for version in doomed}
    marks = pointer.deleted | {version.fingerprint: mark for version in gone}
    left = tuple(name for name in pointer.condemned if name not in names)
    return pointer.changed(condemned=left, deleted=dict(list(marks.items())[-DELETED:]))


def to_prune(
    found: list[Version], line: str, keep: int, unfinished: bool = False, spared: frozenset[str] = frozenset()
) -> list[Version]:
    """Returns the versions of a line that nothing keeps."""
    finished = [version for version in found if version.state not in ("condemned", "unfinished")]
    newest = [version for each in {v.line for v in finished} for version in _of(finished, each)[:keep]]
    kept = [*newest, *(version for version in finished if version.state in ("latest", "previous"))]
    names = {version.fingerprint for version in kept} | {version.parent for version in kept} | spared
    doomed = [version for version in _of(finished, line) if version.fingerprint not in names]
    begun = [version for version in _of(found, line) if unfinished and version.state == "unfinished"]
    return doomed + [version for version in begun if version.fingerprint not in spared]


def _stray(found: list[Version], known: set[str], spared: frozenset[str]) -> list[Version]:
    """Returns the unfinished versions of lines without a latest, or of an unknown line."""
    begun = [version for version in found if version.state == "unfinished" and version.line not in known]
    return [version for version in begun if version.fingerprint not in spared]


def _of(found: list[Version], line: str) -> list[Version]:
    return [version for version in found if version.line == line]
