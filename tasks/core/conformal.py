"""Calibrates the uncertainty of predictions: conformal intervals and sets, for places near to and far from the labels.

Split conformal prediction (Vovk, Gammerman and Shafer 2005; Lei et al. 2018, doi:10.1080/01621459.2017.1307116): a
score tells how far a prediction is off, and the ceil((n + 1) coverage)-th smallest of n scores of calibration covers
the score of a further place with at least that probability, if the places are exchangeable. Neighbours are not, so
scores of calibration are to come from whole held-out blocks. A threshold for each group of places (Mondrian conformal
prediction, Vovk et al. 2005) keeps the promise in each of them: here the groups are quarters by the distance to the
labelled places in feature space, since far places are predicted worse.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

COVERAGE = 0.9  # share of new places whose label the region is promised to hold
NEAREST = 10  # labelled places of which the mean distance is taken
REFERENCES = 10_000  # most labelled places that are searched: distances to all of 60,000 would cost more than probes
GROUPS = 4  # groups by distance
LEAST = 50  # places of a group, below which there are fewer groups: a threshold of few scores is uncertain


def threshold(scores: NDArray[np.float64], coverage: float = COVERAGE) -> float:
    """Returns the score that covers a further place: the ceil((n + 1) coverage)-th smallest, or infinity if n is less.

    Args:
        scores: (n,) scores of calibration; infinity for a label that the prediction could not be.
        coverage: Promised share of covered places, above 0 and below 1.
    """
    rank = int(np.ceil(np.round((len(scores) + 1) * coverage, 9)))  # rounded, since 10 * 0.9 may be above 9
    if rank > len(scores):
        return np.inf
    return float(np.partition(scores, rank - 1)[rank - 1])


@dataclass(frozen=True)
class Calibration:
    """What turns the distance of a place to the labels into the largest score that its region holds."""

    edges: NDArray[np.float64]
    """(groups - 1,) distances between the groups; none for the same region everywhere."""
    thresholds: NDArray[np.float64]
    """(groups,) largest score of a region in each group; infinity where too few scores were there to promise more."""

    @classmethod
    def fit(
        cls,
        scores: NDArray[np.float64],
        distance: NDArray[np.float64],
        groups: int = GROUPS,
        coverage: float = COVERAGE,
    ) -> Self:
        """Calibrates from places whose labels the predictions did not see.

        Args:
            scores: (n,) scores; infinity for a label that the prediction could not be.
            distance: (n,) distances of the same places, as `feature_distance` gives them.
            groups: Number of groups by distance, of like numbers of places; fewer where there are few places.
            coverage: Promised share of covered places.
        """
        groups = max(1, min(groups, len(scores) // LEAST))
        edges = np.quantile(distance, np.arange(1, groups) / groups)
        group = np.digitize(distance, edges)
        return cls(edges, np.array([threshold(scores[group == i], coverage) for i in range(groups)]))

    def limits(self, distance: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the largest score in the region of each place, (n,): of numbers half the width of the interval."""
        return self.thresholds[np.digitize(distance, self.edges)]


def feature_distance(features: NDArray[np.float32], labelled: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns the mean distance of each place to its nearest labelled places, in standardised features.

    Args:
        features: Embeddings of the places, (n, d).
        labelled: Embeddings of the labelled places, (m, d); of more than `REFERENCES` evenly spread rows are taken.

    Returns:
        (n,), divided by the square root of d: about 1.4 for two independent places.
    """
    scaler = StandardScaler().fit(labelled)
    known = scaler.transform(labelled[:: -(-len(labelled) // REFERENCES)])
    search = NearestNeighbors(n_neighbors=min(NEAREST, len(known)), algorithm="brute").fit(known)
    found, _ = search.kneighbors(scaler.transform(features))
    return found.mean(1, dtype=np.float64) / np.sqrt(features.shape[1])
