"""Fuses embedders, vectors side by side, and tells what they are worth together.

The complementarity index is our own definition, after the idea of "Better Together: Evaluating the Complementarity of
Earth Embedding Models" (arXiv 2605.18667), which takes the gain of fused embeddings over the best single one:

    (fused - best part) / (1 - best part)

of accuracy or R², a share of what the best part left to be gained: 0 is no gain, 1 all of it, and below 0 the fused
embedding is worse than its best part.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.artifacts import markdown_table

JOINT = " + "  # between the names of parts in the name of a fused embedder
SPLITS = ("random", "blocked")


def parts_of(spec: str, names: Sequence[str]) -> list[str]:
    """Splits the name of a fused embedder at its plus signs; returns the name alone where it is of one embedder.

    A plus sign may also end a name, as in `range+`, or be in a path or URL: it separates after a known name, after
    `.zarr` or the suffix of a table, and before a known name, a URL, or NAME= of another project's embedder.

    Args:
        spec: What was asked for, such as `geoclip+range+`.
        names: The known names, in lower case.
    """
    known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    named = re.compile(rf"\s*({known})\s*(?:\+(.*)|$)", re.IGNORECASE | re.DOTALL)
    begins = rf"\s*(?:(?:{known})\s*(?:[+=]|$)|[a-z][a-z0-9.-]*://|[\w -]+=)"
    ends = r"\.(?:zarr/?|parquet|geoparquet|pq|csv(?:\.gz)?|tsv(?:\.gz)?)"
    other = re.compile(rf"(.+?(?=\s*\+{begins})|.+?{ends})\s*\+(.*)", re.IGNORECASE | re.DOTALL)
    found: list[str] = []
    rest: str | None = spec
    while rest is not None:
        match = named.match(rest) or other.match(rest)
        part, rest = match.groups() if match else (rest, None)
        found.append(part.strip())
    return found


def side_by_side(
    embedders: Sequence[Callable[[NDArray[np.float64]], NDArray[np.float32]]], lonlat: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Returns the vectors of several embedders side by side, (n, sum of d), all NaN where one has none.

    They are neither scaled nor centred: every probe here scales each dimension to 0..1 on its training part, which
    leaves nothing of a former scale, so that no part drowns another.
    """
    vectors = np.concatenate([embed(lonlat) for embed in embedders], axis=1)
    vectors[~np.isfinite(vectors).all(1)] = np.nan
    return vectors


def complementarity(table: pd.DataFrame, fused: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Returns the complementarity index of every fused embedder for every task.

    Args:
        table: Scores, with columns places, task, embedder, random and blocked; a row for every fused embedder and, on
            the same places, every part.
        fused: Names of the parts, by the name of the fused embedder.

    Returns:
        Columns task, embedder, split, best_part, best, fused, index. NaN where a score is missing, or where the best
        part is perfect.
    """
    rows = []
    for name, parts in fused.items():
        places = table.loc[table["embedder"] == name, "places"].iloc[0]
        for task, scores in table[table["places"] == places].groupby("task", sort=False):
            for split in SPLITS:
                by_name = scores.set_index("embedder")[split].astype(float)
                of_parts, together = by_name.loc[list(parts)], by_name[name]
                best = of_parts.max(skipna=False)
                index = (together - best) / (1 - best) if best < 1 else np.nan
                best_part = "" if np.isnan(best) else of_parts.idxmax()
                rows.append((task, name, split, best_part, best, together, round(index, 4)))
    return pd.DataFrame(rows, columns=["task", "embedder", "split", "best_part", "best", "fused", "index"])


def markdown(indices: pd.DataFrame) -> str:
    """Returns a table of fused embedders by tasks: the index on random / blocked splits, and the better part."""
    tasks = list(indices["task"].unique())
    lines = []
    for name, rows in indices.groupby("embedder", sort=False):
        lines.append([name, *(_told(rows[rows["task"] == task].set_index("split")) for task in tasks)])
    return markdown_table(["complementarity, random / blocked", *tasks], lines)


def _told(rows: pd.DataFrame) -> str:
    if rows["index"].isna().any():
        return "none"
    return f"{rows['index']['random']:+.2f} / {rows['index']['blocked']:+.2f} over {rows['best_part']['blocked']}"
