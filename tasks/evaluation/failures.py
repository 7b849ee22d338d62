"""Tells where a product fails: errors of its blocked probes by continent, latitude and distance to the database.

The score of a group is accuracy, or 1 - mean squared error / variance of all labels. So the score of the whole is the
mean over the groups, weighted by their numbers of places.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.evaluation.labels import natural_earth
from tasks.evaluation.scoring import Scored, Trial

BANDS = (-90.0, -60.0, -30.0, 0.0, 30.0, 60.0, 90.0)  # degrees of latitude between groups
DISTANCES = (0.0, 25.0, 50.0, 100.0, 200.0, 500.0, np.inf)  # km to the nearest image between groups
FEWEST = 20  # places of a group, below which its score is too uncertain to show
COLUMNS = ["task", "by", "group", "n", "score", "std"]

Lonlat = NDArray[np.float64]


def losses(made: Trial, predicted: NDArray) -> NDArray[np.float64]:
    """Returns the loss at each place: 1 for a wrong class, or the squared error over the variance of the labels."""
    if made.labels.kind == "classification":
        return (predicted != made.labels.labels).astype(np.float64)
    return (predicted - made.labels.labels) ** 2 / made.labels.labels.var()


def where_it_fails(
    scored: Scored, product: str, distance_km: Callable[[Lonlat], NDArray[np.float64]] | None
) -> pd.DataFrame:
    """Returns scores by group of places: columns task, by, group, n, score, and std, the standard error of the score.

    Args:
        scored: The scores.
        product: Name of the embedder.
        distance_km: Gives the distance of places to the nearest image of the database; None without a database.
    """
    parts = []
    for made in scored.trials_of(product):
        lost = losses(made, scored.predicted[product, made.labels.name])
        for by, groups in groupings(made.labels.lonlat, distance_km).items():
            table = pd.DataFrame({"group": groups, "lost": lost}).groupby("group", observed=True, sort=True)["lost"]
            found = table.agg(n="size", score=lambda x: 1 - x.mean(), std="sem").reset_index()
            parts.append(found[found["n"] >= FEWEST].assign(task=made.labels.name, by=by))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def groupings(
    lonlat: Lonlat, distance_km: Callable[[Lonlat], NDArray[np.float64]] | None
) -> dict[str, NDArray | pd.Categorical]:
    """Returns the group of each place, by criterion."""
    continents = natural_earth(lonlat, "continent")
    found: dict[str, NDArray | pd.Categorical] = {
        "continent": np.where(continents == "", "islands", continents),
        "latitude": _cut(lonlat[:, 1], BANDS, "°"),
    }
    if distance_km is not None:
        found["distance to the nearest image"] = _cut(distance_km(lonlat), DISTANCES, " km")
    return found


def _cut(values: NDArray[np.float64], edges: tuple[float, ...], unit: str) -> pd.Categorical:
    names = [f"{a:g} to {b:g}{unit}" if np.isfinite(b) else f"over {a:g}{unit}" for a, b in pairwise(edges)]
    return pd.cut(values, list(edges), labels=names, include_lowest=True)


def spread(failures: pd.DataFrame) -> dict[str, float]:
    """Returns the geographic bias of each task: the score on its best continent minus the score on its worst."""
    by_continent = failures[failures["by"] == "continent"].groupby("task", sort=False)["score"]
    return {str(task): round(float(scores.max() - scores.min()), 4) for task, scores in by_continent}
