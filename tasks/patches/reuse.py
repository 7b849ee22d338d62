"""Reuse: what a finished sample of the same parameters, of another size, has found is copied, not read again.

A place's row in the stream is the same however many are asked for, and what is found there depends on no other place.
So verdicts and pixels are the ones that reading would give, each patch held to its digest; what is not to be had from
the other sample, as while it is deleted, is read from the archive. The other sample is never written to.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.cards import fingerprint, read_card
from tasks.patches import store

SIZE = {"patches", "shard_patches", "max_tries", "max_failed_fraction"}  # parameters that decide nothing at a place
# Columns that the parts of another sample must have: earlier versions wrote fewer.
SCREENED = {"row_id", "rank", "reason", "clear_fraction", "saturated_fraction", "dark_share"}
READ = SCREENED | {"position", "href", "sha256", "nodata_fraction", "dark_dn", "offset_check"}
WHERE = ["source", "part"]  # columns that lead to another sample, and to the part of it in which a place was read


def siblings(made_of: Mapping[str, Any]) -> list[str]:
    """Returns the URLs of finished samples that are made of the same but for their size, the largest first."""
    home, ours = storage.join(settings().storage_url, "patches"), _without_size(made_of)
    sizes: dict[str, int] = {}
    for name in storage.names(home):
        url = storage.join(home, name)
        with suppress(UserError, OSError):  # unfinished, or no sample
            theirs = read_card(url, "patches").get("made_of") or {}
            if _without_size(theirs) == ours:
                sizes[url] = theirs["patches"]
    return sorted(sizes, key=lambda url: (-sizes[url], url))


def _without_size(made_of: Mapping[str, Any]) -> str:
    return fingerprint({name: value for name, value in made_of.items() if name not in SIZE})


def screened(sources: Sequence[str], cell: int, rows: NDArray[np.float64]) -> list[pd.DataFrame]:
    """Returns what other samples found at places of a cell: rows of scenes, as `tasks.patches.screening` makes them.

    Args:
        sources: The other samples.
        cell: The grid-zone cell.
        rows: The places, by their row ids.
    """
    found, left = [], set(rows.tolist())
    for table in _screens(sources, cell):
        known = table[table["row_id"].isin(left)] if set(table.columns) >= SCREENED else table[:0]
        if len(known):
            found.append(known)
            left -= set(known["row_id"])
    return found


def _screens(sources: Sequence[str], cell: int) -> Iterator[pd.DataFrame]:
    for source in sources:
        for number in storage.names(storage.join(source, "screen")):
            with suppress(FileNotFoundError):
                yield store.read_part(source, "screen", int(number), cell)


def places_read(sources: Sequence[str]) -> pd.DataFrame:
    """Returns where other samples have read places: `WHERE`, indexed by row id."""
    tables = [pd.DataFrame(columns=["row_id", *WHERE])]
    for source in sources:
        for number in map(int, storage.names(storage.join(source, "parts"))):
            names = storage.names(storage.join(source, "parts", str(number)))
            shards = [int(name.partition(".")[0]) for name in names]
            with suppress(FileNotFoundError):
                parts = store.read_parts(source, "parts", number, shards, ["row_id"])
                urls = [store.part(source, "parts", number, shard) for shard in shards]
                tables += [part.assign(source=source, part=url) for part, url in zip(parts, urls, strict=True)]
    return pd.concat([table for table in tables if len(table)] or tables).drop_duplicates("row_id").set_index("row_id")


def copy(plan: pd.DataFrame, pixels: NDArray[np.uint16], start: int) -> pd.DataFrame:
    """Copies what other samples read of the places of a shard.

    Args:
        plan: Places with `position`, `row_id` and, where they were read elsewhere, `WHERE`.
        pixels: (patch, band, y, x), written where a patch is good.
        start: Position of the first patch.

    Returns:
        Rows as `tasks.patches.reading` stores them, with their positions here, of the places that could be copied.
    """
    if "source" not in plan:  # of a run that an earlier version began
        return plan[:0]
    groups = [(str(source), str(part), group) for (source, part), group in plan.groupby(WHERE)]
    tables = [
        _copy(source, part, group.set_index("row_id")["position"], pixels, start) for source, part, group in groups
    ]
    return pd.concat(tables) if tables else plan[:0]


def _copy(source: str, part: str, positions: pd.Series, pixels: NDArray[np.uint16], start: int) -> pd.DataFrame:
    """Copies what one part of another sample tells; `positions` are ours by row id."""
    try:
        table = store.read_table(part)
    except FileNotFoundError:
        table = pd.DataFrame()
    if not set(table.columns) >= READ:
        return pd.DataFrame(columns=["position"])
    table = table[table["row_id"].isin(positions.index)]
    theirs, ours = table["position"].to_numpy(), positions[table["row_id"]].to_numpy()
    rows = zip(theirs, ours - start, table["reason"], table["sha256"], strict=True)
    had = [reason != "" or _copied(source, there, pixels[here], digest) for there, here, reason, digest in rows]
    return table.assign(position=ours)[had]


def _copied(source: str, position: int, patch: NDArray[np.uint16], digest: str) -> bool:
    """Copies a patch (band, y, x); tells whether its pixels are those of which the digest was stored."""
    try:
        found = store.read_rows(source, slice(position, position + 1))
    except (UserError, OSError):
        return False
    if len(found) != 1 or store.digest(found[0]) != digest:
        return False
    patch[:] = found[0]
    return True
