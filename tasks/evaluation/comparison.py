"""Tells which scores of a table differ beyond noise, by the paired interval of `tasks.core.paired`."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tasks.core.paired import Difference, paired

NUMBERS = ("random", "random_std", "blocked", "blocked_std", "difference", "difference_low", "difference_high")
COLUMNS = ("task", "metric", "embedder", "places", *NUMBERS, "verdict", "best", "reference")  # before all others


def compare(table: pd.DataFrame, references: Sequence[str]) -> pd.DataFrame:
    """Returns a table of scores with what each differs by from the reference's on the same blocked splits.

    Args:
        table: A row per section (`places`), embedder and task, with `blocked`, `blocked_splits` and `folds`; NaN where
            an embedder has no weights.
        references: Names of embedders to compare with: in each section the first that is scored there.

    Returns:
        The table with the further columns `reference`; `difference`, `difference_low` and `difference_high`, its
        interval; `verdict`: above, level or below; and `best`: whether a score is beyond noise above the reference and
        not beyond noise below the highest one. The reference itself is best where all others are below it.
    """
    names = [*COLUMNS, *(name for name in table if name not in COLUMNS)]
    found = table.reindex(columns=names).assign(verdict="", best=False, reference="")
    for _, rows in table[table["blocked"].notna()].groupby(["places", "task"], sort=False):
        there = dict(zip(rows["embedder"], rows.index, strict=True))
        base = next((there[name] for name in references if name in there), None)
        if base is not None:
            told = _told(dict(rows.iterrows()), base)
            found.loc[told.index, told.columns] = told
            found.loc[told.index, "reference"] = rows["embedder"][base]
    return found.astype(dict.fromkeys(NUMBERS, float) | {"dims": "Int64", "best": bool})


def _told(rows: dict[Any, pd.Series], base: Any) -> pd.DataFrame:
    """Returns the columns of the comparison for the rows of one task in one section, by their index."""
    top = max(rows.values(), key=lambda row: row["blocked"])
    others = {index: against(row, rows[base]) for index, row in rows.items() if index != base}
    verdicts = {found.verdict for found in others.values()}
    told: dict[Any, dict[str, Any]] = {base: {"verdict": "", "best": verdicts == {"below"}}}
    for index, found in others.items():
        best = found.verdict == "above" and against(rows[index], top).verdict != "below"
        told[index] = {**_columns(found), "verdict": found.verdict, "best": best}
    return pd.DataFrame.from_dict(told, orient="index")


def _columns(found: Difference) -> dict[str, Any]:
    ends = {"difference": found.mean, "difference_low": found.low, "difference_high": found.high}
    return {name: round(value, 4) for name, value in ends.items()}


def against(row: pd.Series, other: pd.Series) -> Difference:
    """Returns the difference of two rows' blocked scores."""
    return paired(row["blocked_splits"], other["blocked_splits"], 1 / (row["folds"] - 1))
