"""Joins databases of one checkpoint: the world coarsely and a region densely, each place with its share of the land.

An image of the joined database counts as much as the land that it stands for, by the designs of the samples that cover
its place. A sample of n images on A km² of land has the density d = n / A wherever it was drawn. Where several samples
overlap their densities add (the balance heuristic: Veach and Guibas 1995, Optimally combining sampling techniques),
less the share of images that were dropped because another sample had them already:

    weight = D / (sum of d over the samples there) * (images of these samples there) / (images that are kept there)

D is the density of the sample of the most land, so that its images count 1 where no other sample was drawn. Images are
the same where their place, key and value are; that of the first database stays.

Every image tells where it came from. Beside the arrays of any database (`tasks.database.store`) there are

=========== ======= =====================================================================
array       dtype   meaning
=========== ======= =====================================================================
origins     int64   of which of the samples, in the order of the card's `origins`, it is
origin_rows int64   its row in the database of that sample
held_by     int64   bit i is set where the i-th sample has the image
=========== ======= =====================================================================
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.cards import fingerprint, is_finished, product_url, read_card
from tasks.core.earth.density import land_shares
from tasks.core.earth.land import land_km2
from tasks.database.heads import measured
from tasks.database.same import SAME, marks
from tasks.database.store import (
    LINEAGE,
    create_database,
    finish_database,
    names_of,
    read_array,
    read_blocks,
    write_rows,
    written_shards,
)
from tasks.model.checkpoint import load_checkpoint
from tasks.newest import newest
from tasks.params import JoinParams
from tasks.products import CheckpointCard, DatabaseCard, Origin, PatchesCard
from tasks.tables.regions import region_of
from tasks.units import log, progress

MOST = 62  # samples of one database: as many bits has `held_by`
PLACE = 1e-7  # degrees, a centimetre: places that differ by less are one
BLOCK = 8192  # images held at a time
UNIFORM = ("even", "area")  # designs by which each place on land is as likely as any other

Ints = NDArray[np.int64]


def join_databases(databases: list[str], params: JoinParams = JoinParams()) -> str:
    """Joins databases, and resumes what an earlier run began.

    Args:
        databases: URLs of two or more databases, which may be joined ones; one alone, to estimate its weights.
        params: How to join.

    Returns:
        The URL of the joined database.

    Raises:
        UserError: They do not belong together, or their samples do not tell how dense they are.
    """
    cards = [read_card(url, DatabaseCard) for url in databases]
    check_fit(databases, cards, least=1 if params.weights == "estimated" else 2)
    made_of = {"joined": [card.fingerprint for card in cards], **params.model_dump(exclude={"line"})}
    url = product_url("databases", made_of)
    if is_finished(url):
        return url
    every = Images.of(databases, cards)
    if params.weights == "design":
        check_designs(every.origins)
    kept, held_by = without_doubles(every, databases)
    images = every.taken(kept, held_by)
    log().info("%d images of %s, %d of them there already", len(kept), ", ".join(databases), len(kept) - kept.sum())
    if params.weights == "design":
        weights = shares_of(images)
    else:
        weights = land_shares(images.lonlat)
    write(url, databases, cards[0], images, weights, params.shard_rows)
    finish_database(
        url,
        measure=measure_with(cards[0].checkpoint),
        fingerprint=fingerprint(made_of),
        made_of=made_of,
        checkpoint=cards[0].checkpoint,
        encoder=cards[0].encoder,
        values=cards[0].values,
        line=params.line or cards[0].line,
        attribution="; ".join(dict.fromkeys(card.attribution for card in cards if card.attribution)),
        weighted=True,
        origins=images.origins,
    )
    return url


def check_fit(databases: list[str], cards: list[DatabaseCard], least: int) -> None:
    """Refuses databases that are no part of one: of another checkpoint, encoder, or another kind of values.

    Raises:
        UserError: It names the two, and what differs.
    """
    if len(databases) < least or len({card.fingerprint for card in cards}) < len(cards):
        raise UserError(f"{', '.join(databases)}: give two or more databases, each once")
    first = told(cards[0])
    for url, card in zip(databases[1:], cards[1:], strict=True):
        for name, theirs in told(card).items():
            if theirs != first[name]:
                raise UserError(
                    f"{url} has {name} {theirs} and {databases[0]} {first[name]}: only databases of one checkpoint and "
                    "of the same encoders can be joined. Encode the patches of both with the same"
                )


def told(card: DatabaseCard) -> dict[str, Any]:
    """Returns what databases must have in common, by names for a message."""
    values = card.values.encoder
    return {
        "the checkpoint": card.checkpoint,
        "keys of length": card.key_dim,
        "values of length": card.value_dim,
        "the keys' encoder": card.encoder.name if card.encoder else "unknown",
        "the values' encoder": values.name if values else "unknown",
        "values by the encoder": _fitted(card),
    }


def _fitted(card: DatabaseCard) -> str:
    """Returns what tells encoders of one name apart: the weights of the values' encoder, some fitted to its sample."""
    if card.values.features is None:
        return "of the checkpoint"
    try:
        content = storage.read(storage.join(card.values.features, "encoder.safetensors"))
    except FileNotFoundError:
        return f"of {card.values.features}, which is gone"
    return hashlib.sha256(content).hexdigest()[:12]


@dataclass(frozen=True)
class Images:
    """Where images are and come from; a row for each."""

    origins: tuple[Origin, ...]
    """The samples."""
    which: Ints
    """(n,) number of the database that it is read from."""
    rows: Ints
    """(n,) row in that database; rising within each."""
    lonlat: NDArray[np.float64]
    """(n, 2) degrees."""
    lineage: Ints
    """(n, 3) LINEAGE: number of its sample, row in the database of that sample, bits of all samples that have it."""

    @classmethod
    def of(cls, databases: list[str], cards: list[DatabaseCard]) -> "Images":
        """Reads the places of all images, and the samples of all databases, each once."""
        origins: dict[str, Origin] = {}
        parts: list[tuple[Ints, Ints, NDArray[np.float64], Ints]] = []
        for number, (url, card) in enumerate(zip(databases, cards, strict=True)):
            theirs = card.origins or (origin_of(card),)
            origins |= {one.database: one for one in theirs if one.database not in origins}
            names = list(origins)
            ours = np.array([names.index(one.database) for one in theirs])
            rows = np.arange(card.images)
            which = np.full(card.images, number)
            parts.append((which, rows, read_array(url, "locations"), _lineage(url, card, ours)))
        if len(origins) > MOST:
            raise UserError(f"the databases are of {len(origins)} samples: join {MOST} at most")
        which, rows, lonlat, lineage = (np.concatenate(part) for part in zip(*parts, strict=True))
        return cls(tuple(origins.values()), which, rows, lonlat, lineage)

    def taken(self, kept: NDArray[np.bool_], held_by: Ints) -> "Images":
        """Returns those that are kept, with the samples that have them."""
        lineage = np.column_stack([self.lineage[:, :2], held_by])[kept]
        return Images(self.origins, self.which[kept], self.rows[kept], self.lonlat[kept], lineage)


def _lineage(url: str, card: DatabaseCard, ours: Ints) -> Ints:
    """Returns the lineage of a database's images, (n, 3), where its i-th sample has the number ours[i]."""
    if not card.origins:
        rows = np.arange(card.images)
        return np.column_stack([np.full_like(rows, ours[0]), rows, np.full_like(rows, 1 << int(ours[0]))])
    origin, row, held = (read_array(url, name) for name in LINEAGE)
    bits = sum(((held >> i) & 1) << int(number) for i, number in enumerate(ours))
    return np.column_stack([ours[origin], row, bits])


def origin_of(card: DatabaseCard) -> Origin:
    """Returns the sample of a database, with its design where its patches are there and tell one."""
    origin = Origin(database=card.fingerprint, patches=card.patches, images=card.images)
    if card.patches is None or card.weighted:
        return origin
    try:
        patches = read_card(home_of_patches(card.patches), PatchesCard)
    except UserError:
        return origin
    recipe = patches.recipe
    if recipe.places not in UNIFORM:
        return origin
    area: dict[str, Any] = {"south": recipe.south, "north": recipe.north}
    cut, region = patches.region, None
    if cut:
        area["region"], region = cut.geometry, region_of(home_of_patches(card.patches), cut.geometry)
    return origin.model_copy(update={**area, "land_km2": land_km2(recipe.south, recipe.north, region)})


def check_designs(origins: tuple[Origin, ...]) -> None:
    """Refuses samples that do not tell how dense they are.

    Raises:
        UserError: It names the first.
    """
    for origin in origins:
        if origin.land_km2 is None:
            raise UserError(
                f"the database {origin.database} does not tell how densely it samples the land (it is imported, its "
                "patches are gone, or its places are of a list, by tile or by class): give --weights estimated"
            )


def without_doubles(every: Images, databases: list[str]) -> tuple[NDArray[np.bool_], Ints]:
    """Tells which images are kept, (n,), and by which samples each is held, (n,), as bits.

    Only images that share their place with another are read.
    """
    places = np.round(every.lonlat / PLACE).astype(np.int64)
    places[:, 0] %= round(360 / PLACE)
    _, place, count = np.unique(places, axis=0, return_inverse=True, return_counts=True)
    place = place.ravel()
    shared = np.flatnonzero(count[place] > 1)
    kept, held_by = np.ones(len(places), bool), every.lineage[:, 2].copy()
    if len(shared):
        found = marks_of(every, databases, shared)
        order = np.lexsort([found[:, 0], place[shared]])  # the same beside each other
        rows, found = shared[order], found[order]
        again = (np.diff(place[rows]) == 0) & (np.abs(np.diff(found, axis=0)) <= SAME).all(1)
        first = np.flatnonzero(np.append(True, ~again))
        sizes = np.diff(np.append(first, len(rows)))
        held_by[rows] = np.repeat(np.bitwise_or.reduceat(held_by[rows], first), sizes)
        kept[rows] = rows == np.repeat(np.minimum.reduceat(rows, first), sizes)
    return kept, held_by


def marks_of(every: Images, databases: list[str], some: Ints) -> NDArray[np.float64]:
    """Returns the marks of some images by which they are compared, (m, marks), reading block by block."""
    found = []
    for number, url in enumerate(databases):
        rows = every.rows[some[every.which[some] == number]]
        start = 0
        for data in read_blocks(url, BLOCK):
            stop = start + len(data.keys)
            here = rows[(rows >= start) & (rows < stop)] - start
            found.append(np.concatenate([marks(data.keys[here]), marks(data.values[here])], axis=1))
            start = stop
    return np.concatenate(found)


def shares_of(images: Images) -> NDArray[np.float64]:
    """Returns how much each image counts, (n,), by the designs of the samples that cover its place."""
    held_by, covered = images.lineage[:, 2], np.zeros(len(images.rows), np.int64)
    densities = np.zeros(len(covered))
    for i, origin in enumerate(images.origins):
        there = covers(origin, images.lonlat) | ((held_by >> i) & 1).astype(bool)
        covered |= there.astype(np.int64) << i
        densities[there] += origin.density
    copies = sum((held_by >> i) & 1 for i in range(len(images.origins)))
    _, stratum = np.unique(covered, return_inverse=True)
    once = np.bincount(stratum, copies) / np.bincount(stratum)
    largest = max(images.origins, key=lambda origin: (origin.land_km2, origin.database))
    return largest.density / densities * once[stratum]


def covers(origin: Origin, lonlat: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tells whether a sample was drawn where each place is, (n,)."""
    lat = lonlat[:, 1]
    there = (lat >= origin.south) & (lat <= origin.north)
    if origin.region:
        there[there] = region_of(home_of_patches(str(origin.patches)), origin.region).holds(lonlat[there])
    return there


def home_of_patches(name: str) -> str:
    """Returns the URL of patches by their fingerprint."""
    return storage.join(settings().storage_url, PatchesCard.directory, name)


def write(
    url: str, databases: list[str], first: DatabaseCard, images: Images, weights: NDArray[np.float64], shard_rows: int
) -> None:
    """Writes the shards that are missing, reading the databases block by block."""
    count = len(weights)
    create_database(url, count, first.key_dim, first.value_dim, shard_rows, weighted=True, joined=True)
    done, start = written_shards(url), 0
    beside = {"weights": weights} | dict(zip(LINEAGE, images.lineage.T, strict=True))
    with progress("join", count) as advance:
        for rows in _shards(databases, images, shard_rows):
            size = len(rows["keys"])
            if start // shard_rows not in done:
                write_rows(url, start, rows | {name: array[start : start + size] for name, array in beside.items()})
            start += size
            advance(size)


def _shards(databases: list[str], images: Images, size: int) -> Iterator[dict[str, NDArray]]:
    """Yields the arrays of the images, so many at a time."""
    held: list[dict[str, NDArray]] = []
    for number, url in enumerate(databases):
        rows, start = images.rows[images.which == number], 0
        for data in read_blocks(url, BLOCK):
            here = rows[(rows >= start) & (rows < start + len(data.keys))] - start
            start += len(data.keys)
            held.append({name: getattr(data, name)[here] for name in names_of()})
            if sum(len(part["keys"]) for part in held) >= size:
                *full, rest = _cut(held, size)
                yield from full
                held = [rest]
    yield from (part for part in _cut(held, size) if len(part["keys"]))


def _cut(held: list[dict[str, NDArray]], size: int) -> Iterator[dict[str, NDArray]]:
    """Yields rows that are held, so many at a time, and at the end what is left, perhaps nothing."""
    whole = {name: np.concatenate([part[name] for part in held]) for name in names_of()}
    for start in range(0, len(whole["keys"]) + 1, size):
        yield {name: array[start : start + size] for name, array in whole.items()}


def measure_with(checkpoint: str) -> Any:
    """Returns what measures how well heads restore images; None where the checkpoint is no longer stored."""
    try:
        url = newest(CheckpointCard, "newest", lambda card: card.fingerprint == checkpoint, everywhere=True)
    except UserError:
        return None
    return partial(measured, load_checkpoint(url).location)
