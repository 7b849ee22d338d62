"""Scores every embedder on every task, on the paper's split and on held-out blocks, and compares it with a reference.

An embedder is scored on all places. One that may lack vectors, as a grid does at sea, is scored on the places that it
knows, in a section of its own; the reference is scored there again, so that the two are compared on the same places.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from infra.errors import UserError
from tasks.cards import fingerprint
from tasks.core.probes import (
    CLASS_FOLDS,
    METRICS,
    SEED,
    Features,
    Split,
    blocked_folds,
    judge,
    near_duplicates,
    predict,
    random_split,
)
from tasks.evaluation.comparison import compare
from tasks.evaluation.embedders import NOT_GIVEN, Embeddings, Lonlat, Named
from tasks.evaluation.labels import LabelSet
from tasks.params import EvaluateParams

T = TypeVar("T")

REFERENCES = ("location encoder", "coordinates")  # the first of these that is scored, where none is named
EVERYWHERE = "all"  # the section of the embedders that know all places


@dataclass(frozen=True)
class Trial:
    """A task with its splits."""

    labels: LabelSet
    """The task."""
    places: NDArray[np.int64]
    """Row of each of its places among the distinct places of all tasks."""
    random: list[Split]
    """Random splits, the paper's first, or in its place the task's own."""
    blocked: list[Split]
    """Folds of whole blocks, those of one fold seed after those of another; those of each score every place once."""
    facts: dict[str, Any]
    """Facts that are the same for every embedder: counts, and near-duplicates across the splits."""


@dataclass(frozen=True)
class Section:
    """Embedders that are compared on the same places."""

    name: str
    """Whose places these are."""
    embedders: list[Named]
    """What is scored on them, in the order of the table."""
    trials: list[Trial]
    """The tasks on them."""


@dataclass(frozen=True)
class Scored:
    """Results of the scoring."""

    table: pd.DataFrame
    """One row per section, embedder and task."""
    predicted: dict[tuple[str, str], NDArray]
    """Predictions for each place by embedder and task, of the blocked probes of the first fold seed; of an embedder in
    several sections those of the first."""
    sections: list[Section]
    """The embedders that know all places, and those that may not."""
    vectors: dict[str, Callable[[], Embeddings | None]]
    """What gives the vectors of all tasks' distinct places, by embedder."""

    @property
    def trials(self) -> list[Trial]:
        """Returns the tasks on all places."""
        return self.sections[0].trials

    def trials_of(self, embedder: str) -> list[Trial]:
        """Returns the tasks on the places on which an embedder was scored first."""
        return next(one.trials for one in self.sections if embedder in {each.name for each in one.embedders})


def score_all(
    sets: list[LabelSet],
    embedders: list[Named],
    params: EvaluateParams,
    advance: Callable[..., None],
    beside: Sequence[Named] = (),
) -> Scored:
    """Scores every embedder on every task, and compares it with the reference on the same splits.

    Args:
        sets: The tasks. Embedders see their places, never their labels.
        embedders: The embedders; those without weights stay in the table, without scores.
        params: The splits, and the name of the reference.
        advance: Called with 1 after every embedder.
        beside: Embedders of all places that are scored, as the reference is, on the places of those that lack some.

    Raises:
        UserError: A task has too few blocks, or classes that are too rare; or there is no such reference.
    """
    references = find_references(embedders, params.reference)
    places, where = distinct(sets)
    again = [*beside, *(one for one in embedders if one.name in references and not one.partial and one not in beside)]
    vectors = {one: _embedding(one, places, keep=one.partial or one in again) for one in (*again, *embedders)}
    embedders = [_whole(one, vectors) for one in embedders]
    rows: list[dict[str, Any]] = []
    predicted: dict[tuple[str, str], NDArray] = {}
    sections = list(_sections(sets, where, embedders, vectors, again, params))
    for section in sections:
        for one in section.embedders:
            found = vectors[one]()
            features = None if found is None else Features.of(found)
            for made in section.trials:
                row, said = _score(one.name, features, made)
                rows.append(row | {"places": section.name})
                if said is not None:
                    predicted.setdefault((one.name, made.labels.name), said)
            if one.partial or section.name == EVERYWHERE:
                advance(1)
    by_name = {one.name: embedded for one, embedded in vectors.items()}
    return Scored(compare(pd.DataFrame(rows), references), predicted, sections, by_name)


def find_references(embedders: list[Named], asked: str | None) -> tuple[str, ...]:
    """Returns names of embedders to compare with: in each section of the table the first that is scored there.

    That is the one that was asked for, then by default one that knows all places, if there is one.

    Raises:
        UserError: There is no such embedder.
    """
    there = {one.name.lower(): one.name for one in embedders if one.embed}
    whole = [one.name for one in embedders if one.embed and not one.partial]
    found = [name for name in (*REFERENCES, *whole) if name in whole][:1]
    if asked is not None:
        name = asked.strip().lower()
        if name not in there:
            raise UserError(f"the reference {asked!r} is not scored: name one of {', '.join(there.values()) or 'more'}")
        found.insert(0, there[name])
    return tuple(found)


def _embedding(one: Named, places: Lonlat, keep: bool) -> Callable[[], Embeddings | None]:
    """Returns what embeds the places, once where the vectors are to be kept."""
    if one.embed is None:
        return lambda: None
    embed = partial(one.embed, places)
    return cache(embed) if keep else embed


def _whole(one: Named, vectors: dict[Named, Callable[[], Any]]) -> Named:
    """Returns an embedder as one that knows all places, if it might lack some and lacks none of these."""
    if not one.tried or not np.isfinite(vectors[one]()[:, 0]).all():
        return one
    whole = replace(one, partial=False)
    vectors[whole] = vectors.pop(one)
    return whole


def _sections(
    sets: list[LabelSet],
    where: list[NDArray[np.int64]],
    embedders: list[Named],
    vectors: dict[Named, Callable[[], Any]],
    beside: list[Named],
    params: EvaluateParams,
) -> Iterator[Section]:
    """Yields the embedders of all places, then those that know the same ones, behind their parts and what is beside."""

    def trials(known: NDArray[np.bool_] | None) -> list[Trial]:
        return [trial(labels, rows, known, params) for labels, rows in zip(sets, where, strict=True)]

    yield Section(EVERYWHERE, [one for one in embedders if not one.partial], trials(None))
    alike: dict[bytes, list[Named]] = {}
    for one in embedders:
        if one.partial:
            alike.setdefault(np.isfinite(vectors[one]()[:, 0]).tobytes(), []).append(one)
    for known, group in alike.items():
        parts = {part for one in group for part in one.parts}
        whole = [one for one in embedders if one.name in parts and not one.partial and one not in beside]
        name = ", ".join(one.name for one in group)
        yield Section(name, [*beside, *whole, *group], trials(np.frombuffer(known, bool)))


def distinct(sets: list[LabelSet]) -> tuple[Lonlat, list[NDArray[np.int64]]]:
    """Returns the distinct places of all tasks, each to be embedded once, and the row of each task's places in them."""
    places, which = np.unique(np.concatenate([s.lonlat for s in sets]), axis=0, return_inverse=True)
    return places, np.split(which.ravel(), np.cumsum([len(s.lonlat) for s in sets])[:-1])


def trial(labels: LabelSet, rows: NDArray[np.int64], known: NDArray[np.bool_] | None, params: EvaluateParams) -> Trial:
    """Returns a task on the places that are known, or on all, with its splits and their near-duplicates."""
    here = np.ones(len(rows), bool) if known is None else known[rows]
    kept = labels.at(here)
    seeds = [SEED + i for i in range(params.fold_seeds)]
    try:
        blocked = [
            fold for seed in seeds for fold in blocked_folds(kept.lonlat, kept.block_degrees, params.folds, seed)
        ]
    except ValueError as error:
        raise UserError(f"{labels.name}: {error}, by --block-degrees") from None
    random = [*_own_split(kept), *(random_split(len(kept.labels), SEED + i) for i in range(params.repeats))]
    random = random[: params.repeats]
    if kept.kind == "classification":
        _check_classes(kept, [*random, *blocked])
    facts = {
        "n": len(kept.labels),
        "left_out": int((~here).sum()),
        "block_degrees": kept.block_degrees,
        "folds": params.folds,
        "fold_seeds": params.fold_seeds,
        "labels": digest(kept),
        "near_random": near_duplicates(kept.lonlat, random[0], params.near_km),
        "near_blocked": sum(near_duplicates(kept.lonlat, split, params.near_km) for split in blocked[: params.folds]),
    }
    if kept.scored is not None:
        facts["own_split"] = True
    return Trial(kept, rows[here], random, blocked, facts)


def _own_split(labels: LabelSet) -> list[Split]:
    """Returns the task's own split, which takes the place of the first random one; none where it has none."""
    if labels.scored is None:
        return []
    if labels.scored.all() or not labels.scored.any():
        raise UserError(f"{labels.name}: no place to fit or none to score is left of its own split")
    return [Split(np.flatnonzero(~labels.scored), np.flatnonzero(labels.scored))]


def _check_classes(labels: LabelSet, splits: list[Split]) -> None:
    """Refuses a task whose classes are all too rare for the folds in which the probe chooses its penalty."""
    fewest = min(np.unique(labels.labels[split.train], return_counts=True)[1].max() for split in splits)
    if fewest < CLASS_FOLDS:
        raise UserError(
            f"{labels.name}: the commonest class has {fewest} places to train on, and the protocol's folds need "
            f"{CLASS_FOLDS}: give more places"
        )


def digest(labels: LabelSet) -> str:
    """Returns a fingerprint of places and labels, and of the task's own split where it has one."""
    own = [] if labels.scored is None else [labels.scored.tolist()]
    return fingerprint([labels.lonlat.round(6).tolist(), labels.labels.tolist(), *own])


def _score(name: str, known: Features | None, made: Trial) -> tuple[dict[str, Any], NDArray | None]:
    """Returns one embedder's row for one task, and the predictions for every place."""
    row = {"task": made.labels.name, "metric": METRICS[made.labels.kind], "embedder": name}
    if known is None:
        blank = dict.fromkeys(("random", "random_splits", "blocked", "blocked_splits", "dims"))
        return row | blank | made.facts | {"note": NOT_GIVEN}, None
    features, labels, kind = known.at(made.places), made.labels.labels, made.labels.kind
    splits = [*made.random, *made.blocked]
    said = in_parallel(partial(predict, features, labels, kind), splits)
    scores = [judge(kind, labels[split.test], answer) for split, answer in zip(splits, said, strict=True)]
    count = len(made.random)
    everywhere = np.empty_like(labels)
    for split, answer in list(zip(splits, said, strict=True))[count : count + made.facts["folds"]]:
        everywhere[split.test] = answer
    found = _summary("random", scores[:count]) | _summary("blocked", scores[count:])
    return row | found | {"dims": features.full.shape[1], **made.facts, "note": ""}, everywhere


def _summary(name: str, scores: list[float]) -> dict[str, Any]:
    """Returns the mean of the splits' scores, their sample deviation where there are several, and the scores."""
    std = round(float(np.std(scores, ddof=1)), 4) if len(scores) > 1 else None
    each = [round(score, 6) for score in scores]
    return {name: round(float(np.mean(scores)), 4), f"{name}_std": std, f"{name}_splits": each}


def in_parallel(fit: Callable[..., T], *jobs: Iterable[Any]) -> list[T]:
    """Fits probes side by side, one core each: their matrices are too small for one product to use several cores."""
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(fit, *jobs))
