"""Deletes products of every kind that no grid in use needs, the oldest first, and what failed runs left behind.

Kept are the newest products of each kind, recent products, imported ones, the grids that `versions.prune` keeps, what
runs are working on, and everything that these were made from. Features are an exception: they can be made again from
the patches, and a finished product does not read them.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from infra import storage
from tasks.release import versions
from tasks.release.inventory import KINDS, ORDER, Product, products
from tasks.release.lines import Version

INPUTS = ("patches", "features", "checkpoints", "databases")  # kinds that a step may be reading unseen
AT_WORK = timedelta(days=1)  # age below which an unfinished product may have a run at work


def prune_all(
    keep: int,
    days: float,
    *,
    unfinished: bool = False,
    delete: bool = False,
    running: Iterable[Mapping[str, Any]] = (),
) -> list[Product]:
    """Deletes the products that nothing keeps.

    Args:
        keep: How many of the newest of each kind, and of each line of grids, are kept.
        days: Products that were written to since so many days ago are kept.
        unfinished: Deletes also what broken runs left.
        delete: Unless it is given, nothing is deleted.
        running: Parameters of the runs that are under way.

    Returns:
        The products that are (or would be) deleted, grids first: what is made of others goes before these.
    """
    every, now = products(), datetime.now(UTC)
    young = {name for name, product in every.items() if product.changed > now - timedelta(days=days)}
    roots = young | _newest(every, keep) | {name for name, product in every.items() if product.is_imported}
    roots |= set(_read_by(running, every)) | _at_work(every, now)
    spared = {every[name].directory for name in _needed(roots, every) if every[name].kind == "grids"}
    doomed_grids = {f"grids/{version.fingerprint}" for version in _prune_grids(keep, unfinished, False, spared)}
    roots |= {name for name, product in every.items() if product.kind == "grids"} - doomed_grids
    needed = _needed(roots, every)
    doomed = [product for name, product in every.items() if name not in needed and product.kind != "grids"]
    doomed = [product for product in doomed if product.is_finished or unfinished]
    doomed.sort(key=lambda product: (ORDER.index(product.kind), _layer(product, every), product.changed), reverse=True)
    found = [every[name] for name in every if name in doomed_grids] + doomed
    if delete:
        _prune_grids(keep, unfinished, True, spared)
        for product in doomed:
            storage.delete(storage.join(product.url, "card.json"))  # first: what is half there is unfinished
            storage.delete(product.url)
    return found


def _prune_grids(keep: int, unfinished: bool, delete: bool, spared: set[str]) -> list[Version]:
    if not versions.pointers():
        return []  # nothing says which grid is in use
    return versions.prune(keep, unfinished=unfinished, dry_run=not delete, spared=frozenset(spared))


def _layer(product: Product, every: Mapping[str, Product]) -> int:
    """Returns how many products of its own kind lie below a product, as databases below one that is joined of them."""
    below = [every[part] for part in product.made_of if every[part].kind == product.kind]
    return 1 + max((_layer(part, every) for part in below), default=-1)


def _newest(every: Mapping[str, Product], keep: int) -> set[str]:
    """Returns the names of the newest finished products of each kind; grids are kept by line instead."""
    kinds = (kind for kind in KINDS if kind != "grids")
    finished = {kind: [p.name for p in every.values() if p.kind == kind and p.is_finished] for kind in kinds}
    return {name for names in finished.values() for name in names[len(names) - min(keep, len(names)) :]}


def _at_work(every: Mapping[str, Product], now: datetime) -> set[str]:
    """Returns the names of products that runs may read or write, by unfinished products that were written recently."""
    lately = [p for p in every.values() if not p.is_finished and p.changed > now - AT_WORK]
    unknown = any(product.kind != "grids" for product in lately)
    inputs = {name for name, product in every.items() if unknown and product.kind in INPUTS}
    return inputs | {product.name for product in lately}


def _read_by(running: Iterable[Mapping[str, Any]], every: Mapping[str, Product]) -> Iterator[str]:
    """Returns the names of products in the parameters of runs, and of the features of their patches."""
    texts = {text.rstrip("/") for parameters in running for text in _texts(parameters)}
    named = {name for name, product in every.items() if any(_is_in(text, product) for text in texts)}
    yield from named
    yield from (name for name, p in every.items() if p.kind == "features" and named & set(p.made_of))


def _is_in(text: str, product: Product) -> bool:
    return f"{text}/".endswith(f"/{product.name}/") or f"/{product.name}/" in text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _needed(roots: Iterable[str], every: Mapping[str, Product]) -> set[str]:
    """Returns the roots, and everything that they were made from, except features."""
    found: set[str] = set()
    left = list(roots)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        if every[name].kind not in ("reports", "ablations"):
            left += [part for part in every[name].made_of if every[part].kind != "features"]
    return found
