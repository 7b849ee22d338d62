"""Stores tables of scores, and shows them: JSON with the score of every split, CSV and Markdown."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from infra import storage
from tasks.artifacts import cell, keep_table, markdown_table, show_table
from tasks.core.paired import CONFIDENCE, MARKS
from tasks.evaluation.scoring import EVERYWHERE

SPLITS = ["random_splits", "blocked_splits"]  # columns of lists, which only JSON has


def keep_scores(url: str, name: str, table: pd.DataFrame, key: str, description: str) -> None:
    """Stores a table of scores as JSON, CSV and Markdown, and shows it as the run's artifacts.

    Args:
        url: Directory of the files.
        name: Name of the files, without their suffix.
        table: The scores.
        key: Lower-case name of the artifacts.
        description: What the artifacts show.
    """
    plain = table.drop(columns=SPLITS)
    storage.write_json(storage.join(url, f"{name}.json"), records(table))
    storage.write(storage.join(url, f"{name}.csv"), plain.to_csv(index=False).encode())
    keep_table(storage.join(url, f"{name}.md"), markdown(table), key, description)
    show_table(records(plain), f"{key}-table", description)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows for JSON, with null for missing values."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def named_apart(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with names that tell rows of one embedder in several sections apart, as a chart needs."""
    again = (table["places"] != EVERYWHERE) & (table["embedder"] != table["places"])
    return table.assign(embedder=table["embedder"].mask(again, table["embedder"] + ", " + table["places"]))


def markdown(table: pd.DataFrame) -> str:
    """Returns tables of embedders by tasks, for each section: `random / blocked`, and differences to the reference."""
    parts = []
    for places, rows in table.groupby("places", sort=False):
        title = "random / blocked" if places == EVERYWHERE else f"random / blocked, where {places} is"
        parts.append(_by_task(rows, title, _scores))
        compared = rows[rows["verdict"] != ""]
        if len(compared):
            parts.append(_by_task(compared, f"blocked, minus {compared['reference'].iloc[0]}", _difference))
        parts.append(_counts(rows))
    return "\n\n".join([*parts, _legend(table)])


def _by_task(table: pd.DataFrame, title: str, text: Callable[[Any], str]) -> str:
    """Returns a Markdown table with the text of each row's scores, by embedder and task."""
    metric = table.groupby("task", sort=False)["metric"].first()
    lines = []
    for name, rows in table.groupby("embedder", sort=False):
        cells = {row.task: text(row) for row in rows.itertuples()}
        lines.append([name, *(cells[task] for task in metric.index)])
    return markdown_table([title, *(f"{task} ({metric[task]})" for task in metric.index)], lines)


def _scores(row: Any) -> str:
    if row.note:
        return str(row.note)
    text = f"{_spread(row.random, row.random_std)} / {_spread(row.blocked, row.blocked_std)}"
    return _marked(f"**{text}**" if row.best else text, row.verdict)


def _spread(mean: float, std: float) -> str:
    return f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def _difference(row: Any) -> str:
    interval = f"({row.difference_low:+.3f} to {row.difference_high:+.3f})"
    return _marked(f"{row.difference:+.3f} {interval}", row.verdict)


def _marked(text: str, verdict: str) -> str:
    return f"{text} {MARKS[verdict]}" if verdict in MARKS else text


def _counts(rows: pd.DataFrame) -> str:
    """Returns how many places each task has in a section."""
    first = rows.groupby("task", sort=False)[["n", "left_out"]].first()
    told = [f"{cell(task)} {n:,}" + f" ({out:,} left out)" * bool(out) for task, n, out in first.itertuples()]
    return f"Places: {', '.join(told)}."


def _legend(table: pd.DataFrame) -> str:
    """Returns what the numbers and marks are."""
    row, references = table.iloc[0], [name for name in table["reference"].unique() if name]
    told = f"Blocked: mean ± deviation over {row['folds'] * row['fold_seeds']} splits, {row['folds']} folds of blocks "
    told += f"dealt {row['fold_seeds']} times."
    if references:
        them = cell(" or ".join(references))
        told += (
            f" ▲ ▼: above or below {them} beyond noise, by the {CONFIDENCE:.0%} interval of the "
            "differences on the same splits. Bold: above it beyond noise, and not beyond noise below the highest score."
        )
    return told
