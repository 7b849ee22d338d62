"""Scores every embedder on every task, on the paper's split and on held-out blocks."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from infra import storage
from infra.errors import UserError
from tasks.artifacts import cell, keep_table, show_table
from tasks.cards import fingerprint
from tasks.core.probes import (
    CLASS_FOLDS,
    METRICS,
    SEED,
    Split,
    blocked_folds,
    judge,
    near_duplicates,
    predict,
    random_split,
)
from tasks.evaluation.embedders import NOT_GIVEN, Embeddings, Lonlat, Named
from tasks.evaluation.labels import LabelSet
from tasks.params import EvaluateParams

SCORES = ("random", "random_std", "blocked", "blocked_std")


@dataclass(frozen=True)
class Trial:
    """A task with its splits."""

    labels: LabelSet
    """The task."""
    places: NDArray[np.int64]
    """Row of each of its places among the distinct places of all tasks."""
    random: list[Split]
    """Random splits, the paper's first."""
    blocked: list[Split]
    """Folds of whole blocks, which score every place once."""
    facts: dict[str, Any]
    """Facts that are the same for every embedder: counts, and near-duplicates across the splits."""


@dataclass(frozen=True)
class Scored:
    """Results of the scoring."""

    table: pd.DataFrame
    """One row per task and embedder."""
    predicted: dict[tuple[str, str], NDArray]
    """Predictions of the blocked folds' probes for each place, by embedder and task."""
    trials: list[Trial]
    """The tasks."""


def score_all(
    sets: list[LabelSet], embedders: list[Named], params: EvaluateParams, advance: Callable[..., None]
) -> Scored:
    """Scores every embedder on every task, all on the same places.

    Places where some embedder has no vector, as a grid has none at sea, are left out for all, and counted.

    Args:
        sets: The tasks. Embedders see their places, never their labels.
        embedders: The embedders; those without weights stay in the table, without scores.
        params: The splits.
        advance: Called with 1 after every embedder.

    Raises:
        UserError: A task has too few blocks, or classes that are too rare.
    """
    places, where = distinct(sets)
    partial = {one.name: one.embed(places) for one in embedders if one.embed and one.partial}
    known = np.all([np.isfinite(v[:, 0]) for v in partial.values()] or [np.ones(len(places), bool)], axis=0)
    trials = [trial(labels, rows, known[rows], params) for labels, rows in zip(sets, where, strict=True)]
    rows, predicted = [], {}
    for one in embedders:
        vectors = partial.pop(one.name, None)
        if vectors is None and one.embed:
            vectors = one.embed(places)
        for made in trials:
            row, said = _score(one.name, vectors, made)
            rows.append(row)
            if said is not None:
                predicted[one.name, made.labels.name] = said
        advance(1)
    table = pd.DataFrame(rows)
    return Scored(table.astype(dict.fromkeys(SCORES, float) | {"dims": "Int64"}), predicted, trials)


def distinct(sets: list[LabelSet]) -> tuple[Lonlat, list[NDArray[np.int64]]]:
    """Returns the distinct places of all tasks, each to be embedded once, and the row of each task's places in them."""
    places, which = np.unique(np.concatenate([s.lonlat for s in sets]), axis=0, return_inverse=True)
    return places, np.split(which.ravel(), np.cumsum([len(s.lonlat) for s in sets])[:-1])


def trial(labels: LabelSet, rows: NDArray[np.int64], known: NDArray[np.bool_], params: EvaluateParams) -> Trial:
    """Returns a task on the places that every embedder knows, with its splits and their near-duplicates."""
    kept = LabelSet(
        labels.name, labels.kind, labels.lonlat[known], labels.labels[known], labels.source, labels.block_degrees
    )
    try:
        blocked = blocked_folds(kept.lonlat, kept.block_degrees, params.folds)
    except ValueError as error:
        raise UserError(f"{labels.name}: {error}, by --block-degrees") from None
    random = [random_split(len(kept.labels), SEED + i) for i in range(params.repeats)]
    if kept.kind == "classification":
        _check_classes(kept, [*random, *blocked])
    facts = {
        "n": len(kept.labels),
        "left_out": int((~known).sum()),
        "block_degrees": kept.block_degrees,
        "folds": params.folds,
        "labels": digest(kept),
        "near_random": near_duplicates(kept.lonlat, random[0], params.near_km),
        "near_blocked": sum(near_duplicates(kept.lonlat, split, params.near_km) for split in blocked),
    }
    return Trial(kept, rows[known], random, blocked, facts)


def _check_classes(labels: LabelSet, splits: list[Split]) -> None:
    """Refuses a task whose classes are all too rare for the folds in which the probe chooses its penalty."""
    fewest = min(np.unique(labels.labels[split.train], return_counts=True)[1].max() for split in splits)
    if fewest < CLASS_FOLDS:
        raise UserError(
            f"{labels.name}: the commonest class has {fewest} places to train on, and the protocol's folds need "
            f"{CLASS_FOLDS}: give more places"
        )


def digest(labels: LabelSet) -> str:
    """Returns a fingerprint of places and labels."""
    return fingerprint([labels.lonlat.round(6).tolist(), labels.labels.tolist()])


def keep_scores(url: str, name: str, table: pd.DataFrame, key: str, description: str) -> None:
    """Stores a table of scores as JSON, CSV and Markdown, and shows it as the run's artifacts.

    Args:
        url: Directory of the files.
        name: Name of the files, without their suffix.
        table: The scores.
        key: Lower-case name of the artifacts.
        description: What the artifacts show.
    """
    rows = records(table)
    storage.write_json(storage.join(url, f"{name}.json"), rows)
    storage.write(storage.join(url, f"{name}.csv"), table.to_csv(index=False).encode())
    keep_table(storage.join(url, f"{name}.md"), markdown(table), key, description)
    show_table(rows, f"{key}-table", description)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows for JSON, with null for missing values."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _score(name: str, vectors: Embeddings | None, made: Trial) -> tuple[dict[str, Any], NDArray | None]:
    """Returns one embedder's row for one task, and its blocked probes' predictions for every place."""
    row = {"task": made.labels.name, "metric": METRICS[made.labels.kind], "embedder": name}
    if vectors is None:
        return row | dict.fromkeys(SCORES) | {"dims": None, **made.facts, "note": NOT_GIVEN}, None
    features, labels, kind = vectors[made.places], made.labels.labels, made.labels.kind
    splits = [*made.random, *made.blocked]
    said = list(_parallel([(features, labels, kind, split) for split in splits]))
    scores = [judge(kind, labels[split.test], answer) for split, answer in zip(splits, said, strict=True)]
    random, blocked = scores[: len(made.random)], scores[len(made.random) :]
    everywhere = np.empty_like(labels)
    for split, answer in zip(made.blocked, said[len(made.random) :], strict=True):
        everywhere[split.test] = answer
    found = {
        "random": round(float(np.mean(random)), 4),
        "random_std": round(float(np.std(random)), 4) if len(random) > 1 else None,
        "blocked": round(float(np.mean(blocked)), 4),
        "blocked_std": round(float(np.std(blocked)), 4),
    }
    return row | found | {"dims": features.shape[1], **made.facts, "note": ""}, everywhere


def _parallel(jobs: list[tuple[Any, ...]]) -> Iterator[NDArray]:
    """Fits probes side by side, one core each: their matrices are too small for one product to use several cores."""
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda job: predict(*job), jobs)


def markdown(table: pd.DataFrame) -> str:
    """Returns a table of embedders by tasks, `random / blocked`, with the best blocked score of a task in bold."""
    tasks = list(table["task"].unique())
    metric = table.groupby("task")["metric"].first()
    best = table.groupby("task")["blocked"].max()
    lines = ["| random / blocked | " + " | ".join(f"{cell(task)} ({metric[task]})" for task in tasks) + " |"]
    lines.append("|---" * (len(tasks) + 1) + "|")
    for name, rows in table.groupby("embedder", sort=False):
        cells = [_cell(rows[rows["task"] == task].iloc[0], best[task]) for task in tasks]
        lines.append(f"| {cell(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: pd.Series, best: float) -> str:
    if row["note"]:
        return str(row["note"])
    text = f"{_spread(row['random'], row['random_std'])} / {_spread(row['blocked'], row['blocked_std'])}"
    if row["blocked"] == best:
        return f"**{text}**"
    return text


def _spread(mean: float, std: float | None) -> str:
    if std is None or np.isnan(std):
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {std:.2f}"
