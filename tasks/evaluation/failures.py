"""Where a product fails: errors of its blocked probes by continent, by latitude and by distance to the database.

The score of a group is comparable with that of the whole: accuracy, or 1 - mean squared error / variance of all labels,
so that the whole's is the groups' mean, weighted by their places.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.evaluation.labels import natural_earth
from tasks.evaluation.scoring import Scored, Trial

BANDS = (-90.0, -60.0, -30.0, 0.0, 30.0, 60.0, 90.0)  # degrees of latitude
DISTANCES = (0.0, 25.0, 50.0, 100.0, 200.0, 500.0, np.inf)  # km
FEWEST = 20  # places of a group that is told
COLUMNS = ["task", "by", "group", "n", "score", "std"]

Lonlat = NDArray[np.float64]


def losses(made: Trial, predicted: NDArray) -> NDArray[np.float64]:
    """Per place 1 for a wrong class and 0 for a right one, or the squared error over the variance of the labels."""
    if made.labels.kind == "classification":
        return (predicted != made.labels.labels).astype(np.float64)
    return (predicted - made.labels.labels) ** 2 / made.labels.labels.var()


def where_it_fails(
    scored: Scored, product: str, distance_km: Callable[[Lonlat], NDArray[np.float64]] | None
) -> pd.DataFrame:
    """Scores by group of places: columns task, by, group, n, score, std (its standard error).

    Args:
        scored: The scores.
        product: Which embedder's.
        distance_km: Distance of places to the nearest image of the database; none, where there is no database.
    """
    parts = []
    for made in scored.trials:
        lost = losses(made, scored.predicted[product, made.labels.name])
        for by, groups in groupings(made.labels.lonlat, distance_km).items():
            table = pd.DataFrame({"group": groups, "lost": lost}).groupby("group", observed=True, sort=True)["lost"]
            found = table.agg(n="size", score=lambda x: 1 - x.mean(), std="sem").reset_index()
            parts.append(found[found["n"] >= FEWEST].assign(task=made.labels.name, by=by))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def groupings(
    lonlat: Lonlat, distance_km: Callable[[Lonlat], NDArray[np.float64]] | None
) -> dict[str, NDArray | pd.Categorical]:
    """The groups of places, by what they are made."""
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
    """By task, the score on the best continent minus that on the worst: its geographic bias."""
    by_continent = failures[failures["by"] == "continent"].groupby("task", sort=False)["score"]
    return {str(task): round(float(scores.max() - scores.min()), 4) for task, scores in by_continent}
