"""Copies verdicts and pixels from finished samples of the same parameters but another size.

A place's row in the stream does not depend on how many are asked for, nor its verdict and pixels on other places. So
the copies are what reading would give; each patch is checked by its digest. What the other sample lacks, for example
while it is being deleted, is read from the archive. The other sample is never written to.
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
from tasks.products import PatchesCard

SIZE = {"patches", "shard_patches", "max_tries", "max_failed_fraction"}  # parameters that change nothing at a place
# Columns that the parts of another sample must have: earlier versions wrote fewer.
SCREENED = {"row_id", "rank", "reason", "clear_fraction", "saturated_fraction", "dark_share"}
READ = SCREENED | {"position", "href", "sha256", "nodata_fraction", "dark_dn", "offset_check"}
WHERE = ["source", "part"]  # columns: another sample, and the part of it that holds a place


def siblings(made_of: Mapping[str, Any]) -> list[str]:
    """Returns the URLs of finished samples that differ only in their size, the largest first."""
    home, ours = storage.join(settings().storage_url, "patches"), _without_size(made_of)
    sizes: dict[str, int] = {}
    for name in storage.names(home):
        url = storage.join(home, name)
        with suppress(UserError, OSError):  # unfinished, or no sample
            theirs = read_card(url, PatchesCard)
            if _without_size(theirs.made_of) == ours:
                sizes[url] = theirs.recipe.patches or 0
    return sorted(sizes, key=lambda url: (-sizes[url], url))


def _without_size(made_of: Mapping[str, Any]) -> str:
    return fingerprint({name: value for name, value in made_of.items() if name not in SIZE})


def screened(sources: Sequence[str], cell: int, rows: NDArray[np.float64]) -> list[pd.DataFrame]:
    """Returns what other samples found at places of a cell: rows of scenes, as `tasks.patches.screening` makes them.

    Args:
        sources: The other samples.
        cell: Number of the grid-zone cell.
        rows: Row ids of the places.
    """
    found, left = [], set(rows.tolist())
    for table in _screens(sources, cell):
        if set(table.columns) >= SCREENED:
            known = table[table["row_id"].isin(left)]
        else:
            known = table[:0]
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
    """Returns the parts of other samples in which places were read: columns `WHERE`, indexed by row id."""
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
    """Copies patches of a shard from other samples.

    Args:
        plan: Places with `position`, `row_id` and, where another sample read them, `WHERE`.
        pixels: (patch, band, y, x), written where a patch is good.
        start: Position of the first patch.

    Returns:
        Rows of the places that could be copied, as `tasks.patches.reading` stores them, with their positions here.
    """
    if "source" not in plan:  # the run was begun by an earlier version
        return plan[:0]
    groups = [(str(source), str(part), group) for (source, part), group in plan.groupby(WHERE)]
    tables = [
        _copy(source, part, group.set_index("row_id")["position"], pixels, start) for source, part, group in groups
    ]
    return pd.concat(tables) if tables else plan[:0]


def _copy(source: str, part: str, positions: pd.Series, pixels: NDArray[np.uint16], start: int) -> pd.DataFrame:
    """Copies places from one part of another sample; `positions` are their positions here, by row id."""
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
    """Copies a patch (band, y, x), and tells whether its pixels had the stored digest."""
    try:
        pixels = store.read_rows(source, slice(position, position + 1))
    except (UserError, OSError):
        return False
    if len(pixels) != 1 or store.digest(pixels[0]) != digest:
        return False
    patch[:] = pixels[0]
    return True
