"""Tells how far predictions from an embedding can be trusted: calibrated regions, and signals that go with the error.

All rests on blocked folds, which score each place once by a probe that saw no place of its block. The region of a
number is an interval around the prediction, that of a class the set of all classes whose output is above a limit. The
places of each fold get regions that were calibrated on those of the other folds; for contrast, also on the test places
of the random split, as is usual.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.neighbors import NearestNeighbors

from tasks.artifacts import markdown_table
from tasks.core.conformal import COVERAGE, GROUPS, NEAREST, Calibration, feature_distance
from tasks.core.earth.sphere import km_of, unit_vectors
from tasks.core.probes import Split, probe
from tasks.evaluation.embedders import Embeddings, Lonlat
from tasks.evaluation.labels import LabelSet
from tasks.evaluation.scoring import Trial, in_parallel

CALIBRATIONS = {"random": 1, "blocked": 1, "blocked, by distance": GROUPS}  # groups by distance of each
FIFTH = 0.2  # share of the places that are called near to the labels, or far
DISTANCE, KM = "feature distance", "km to labels"  # names of the signals that every embedder has
ROUNDED = 4  # decimals of stored shares and correlations


@dataclass(frozen=True)
class HeldOut:
    """What probes say of places that they were not fitted on; a row per place."""

    rows: NDArray[np.int64]
    """(n,) rows of the places in the task."""
    fold: NDArray[np.int64]
    """(n,) number of the split that held the place out."""
    error: NDArray[np.float64]
    """(n,) the absolute error, or 1 for a wrong class."""
    scores: NDArray[np.float64]
    """(n,) how far the label is from the prediction: the absolute error, or 1 - the output of its class."""
    of_classes: NDArray[np.float64]
    """(n, classes) such a score for every class, infinity for one that the probe never saw; (n, 0) for numbers."""
    distance: NDArray[np.float64]
    """(n,) mean distance in feature space to the nearest places that the probe was fitted on."""
    km: NDArray[np.float64]
    """(n,) mean distance in km to the nearest such places."""

    @classmethod
    def join(cls, parts: list["HeldOut"]) -> "HeldOut":
        """Returns the rows of several splits as one."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def sizes(self, limits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the size of each region, (n,): the width of an interval, or the number of classes of a set."""
        if self.of_classes.shape[1]:
            return (self.of_classes <= limits[:, None]).sum(1).astype(np.float64)
        return 2 * limits


@dataclass(frozen=True)
class Uncertainty:
    """The uncertainty of an embedder on a task."""

    labels: LabelSet
    """The task."""
    coverage: list[dict[str, Any]]
    """A row for each of `CALIBRATIONS`."""
    signals: list[dict[str, Any]]
    """A row for each signal: Spearman's correlation with the error."""
    size: NDArray[np.float64]
    """(places,) size of each place's region, calibrated on blocks by distance."""


def uncertainty(made: Trial, features: Embeddings, layers: Mapping[str, NDArray]) -> Uncertainty:
    """Returns the uncertainty of an embedder on a task.

    Args:
        made: The task.
        features: Embeddings of its places, (n, d).
        layers: Evidence of these embeddings by name, each (n,), whose correlation with the error is told too.
    """
    blocked = hold_out(made.labels, features, made.blocked[: made.facts["folds"]])
    random = hold_out(made.labels, features, made.random[:1])
    regions = {name: _limits(name, blocked, random) for name in CALIBRATIONS}
    coverage = [_coverage(name, made.labels, blocked, limits) for name, limits in regions.items()]
    told = {DISTANCE: blocked.distance, KM: blocked.km} | {name: layer[blocked.rows] for name, layer in layers.items()}
    task = {"task": made.labels.name}
    signals = [task | {"signal": name, "spearman": _spearman(layer, blocked.error)} for name, layer in told.items()]
    size = np.empty(len(features))
    size[blocked.rows] = blocked.sizes(regions["blocked, by distance"])
    return Uncertainty(made.labels, coverage, signals, size)


def hold_out(labels: LabelSet, features: Embeddings, splits: list[Split]) -> HeldOut:
    """Fits a probe on the training part of each split, and returns what it says of the other places."""
    return HeldOut.join(in_parallel(partial(_of_split, labels, features), splits, range(len(splits))))


def _of_split(labels: LabelSet, features: Embeddings, split: Split, number: int) -> HeldOut:
    train, test = features[split.train], features[split.test]
    truth = labels.labels[split.test]
    fitted = probe(labels.kind).fit(train.astype(np.float64), labels.labels[split.train])
    said = fitted.predict(test.astype(np.float64))
    if labels.kind == "classification":
        classes = np.unique(labels.labels)
        of_classes = np.full((len(test), len(classes)), np.inf)
        of_classes[:, np.searchsorted(classes, fitted[-1].classes_)] = 1 - fitted.decision_function(test.astype("f8"))
        scores, error = of_classes[np.arange(len(test)), np.searchsorted(classes, truth)], said != truth
    else:
        of_classes, error = np.empty((len(test), 0)), np.abs(said - truth)
        scores = error
    km = _km(labels.lonlat[split.test], labels.lonlat[split.train])
    fold = np.full(len(test), number)
    return HeldOut(split.test, fold, error.astype(np.float64), scores, of_classes, feature_distance(test, train), km)


def _km(lonlat: Lonlat, labelled: Lonlat) -> NDArray[np.float64]:
    """Returns the mean distance of each place to its nearest labelled places, (n,) in km."""
    search = NearestNeighbors(n_neighbors=min(NEAREST, len(labelled))).fit(unit_vectors(labelled))
    chord, _ = search.kneighbors(unit_vectors(lonlat))
    return km_of(chord).mean(1)


def _limits(calibration: str, blocked: HeldOut, random: HeldOut) -> NDArray[np.float64]:
    """Returns the largest score of the region of each place, (n,), calibrated without its fold."""
    limits = np.empty(len(blocked.rows))
    for fold in np.unique(blocked.fold):
        inside = blocked.fold == fold
        if calibration == "random":
            scores, distance = random.scores, random.distance
        else:
            scores, distance = blocked.scores[~inside], blocked.distance[~inside]
        found = Calibration.fit(scores, distance, CALIBRATIONS[calibration])
        limits[inside] = found.limits(blocked.distance[inside])
    return limits


def _coverage(calibration: str, labels: LabelSet, held: HeldOut, limits: NDArray[np.float64]) -> dict[str, Any]:
    """Returns the share of labels in their regions: of all places, by fold, and near to and far from the labels."""
    covered = held.scores <= limits
    by_fold = pd.Series(covered).groupby(held.fold).mean()
    near, far = np.quantile(held.distance, [FIFTH, 1 - FIFTH])
    numbers = labels.kind == "regression"
    shares = {
        "covered": covered.mean(),
        "covered_std": by_fold.std(),
        "covered_least": by_fold.min(),
        "covered_near": covered[held.distance <= near].mean(),
        "covered_far": covered[held.distance >= far].mean(),
    }
    return {
        "task": labels.name,
        "calibration": calibration,
        "promised": COVERAGE,
        **{name: round(float(share), ROUNDED) for name, share in shares.items()},
        "size": float(held.sizes(limits).mean()),
        "size_of": "interval" if numbers else "classes",
        "label_std": float(labels.labels.std()) if numbers else None,
    }


def _spearman(signal: NDArray, error: NDArray[np.float64]) -> float | None:
    """Returns Spearman's correlation with the error; None where one of both is the same everywhere."""
    if np.ptp(signal) == 0 or np.ptp(error) == 0:
        return None
    return round(float(spearmanr(signal, error).statistic), ROUNDED)


def markdown(uncertainty: pd.DataFrame, signals: pd.DataFrame) -> str:
    """Returns two tables by task: the coverage and size of each calibration, and the correlations of the signals."""
    calibrations, names = uncertainty["calibration"].unique(), signals["signal"].unique()
    covered = []
    for task, rows in uncertainty.groupby("task", sort=False):
        covered.append([task, *(_covered(row) for _, row in rows.iterrows())])
    correlated = []
    for task, rows in signals.groupby("task", sort=False):
        told = rows.set_index("signal")["spearman"]
        correlated.append([task, *(_number(told[name]) for name in names)])
    first = markdown_table([f"covered of {COVERAGE:.2f} promised; mean size", *calibrations], covered)
    return "\n\n".join([first, markdown_table(["Spearman's correlation with the error", *names], correlated)])


def _covered(row: pd.Series) -> str:
    shares = f"{row['covered']:.2f} ± {row['covered_std']:.2f}, far {row['covered_far']:.2f}"
    if row["size_of"] == "classes":
        return f"{shares}; {row['size']:.1f} classes"
    return f"{shares}; ± {row['size'] / 2:.4g}"


def _number(value: float | None) -> str:
    return "none" if value is None or np.isnan(value) else f"{value:+.2f}"
