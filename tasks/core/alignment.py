"""Tests by statistics alone whether two tables belong together row by row.

One table is predicted from the other by a ridge regression between their leading principal components, each half
of the rows from the other half. Where rows belong together, a prediction resembles its own row more than other
rows; where one table was shuffled, it does not. What this cannot see: an exchange among rows that resemble
each other, as of neighbours in a table that is sorted by place.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

Float = NDArray[np.float64]

LEAST_ROWS = 64  # rows, below which chance looks like a relation
MOST_ROWS = 4000  # most rows that are used, evenly spread over the table
COMPONENTS = 48  # principal components of each table
LEAST_DEVIATION = 1e-3  # divides smaller components too: sklearn's `whiten`, without it, blows up rounding errors
RIDGE = 0.1  # penalty of the regression, as a share of the number of rows
RUNS = 16  # runs of neighbouring rows, each of which must belong together too
SIGMAS = 5.0  # standard errors above the shuffled mean from which a score is no chance


@dataclass(frozen=True)
class Alignment:
    """Result of the test; scores are mean cosines between a row and its prediction."""

    score: float
    """Score of the rows as they are."""
    shuffled: float
    """Score of rows with the predictions of other rows."""
    error: float
    """Standard error of `score` if nothing belonged together."""
    broken: tuple[tuple[int, int], ...]
    """Runs of rows, first and one past last, that are no better than shuffled where the whole table is."""

    @property
    def aligned(self) -> bool:
        """Tells whether the tables belong together, in all their runs."""
        return self.score > self.shuffled + SIGMAS * self.error and not self.broken


def alignment(source: NDArray, target: NDArray, seed: int = 0) -> Alignment:
    """Measures whether row i of `source` belongs to row i of `target`.

    Args:
        source: (n, p) numbers.
        target: (n, q) numbers.
        seed: Of the halves and the shuffling.

    Raises:
        ValueError: There are too few rows to tell.
    """
    if len(source) < LEAST_ROWS:
        raise ValueError(f"{len(source)} rows are too few to tell: {LEAST_ROWS} are needed")
    rows = np.linspace(0, len(source) - 1, min(len(source), MOST_ROWS)).astype(int)
    rng = np.random.default_rng(seed)
    x, y = components(source[rows]), components(target[rows])
    predicted = _unit(_cross_predicted(x, y, rng.permutation(len(rows)) % 2))
    y = _unit(y)
    own = (predicted * y).sum(1)
    other = (predicted * y[_displaced(len(rows), rng)]).sum(1)
    spread = float(other.std())
    level, error = float(other.mean()), spread / np.sqrt(len(rows))
    return Alignment(float(own.mean()), level, float(error), _broken(own, level, spread, rows))


def components(table: NDArray) -> Float:
    """Returns the leading principal components of standardised columns, each with variance 1."""
    x = StandardScaler().fit_transform(np.asarray(table, np.float64))
    pca = PCA(min(COMPONENTS, len(x) // 8, x.shape[1]), svd_solver="covariance_eigh")
    found = pca.fit_transform(x)
    return found / (pca.singular_values_ / np.sqrt(len(x))).clip(LEAST_DEVIATION)


def _cross_predicted(x: Float, y: Float, half: NDArray) -> Float:
    """Predicts each row of y from its x, by a regression on the other half of the rows."""
    out = np.empty_like(y)
    for one in (0, 1):
        fit, use = half != one, half == one
        gram = x[fit].T @ x[fit] + RIDGE * fit.sum() * np.eye(x.shape[1])
        out[use] = x[use] @ np.linalg.solve(gram, x[fit].T @ y[fit])
    return out


def _displaced(n: int, rng: np.random.Generator) -> NDArray:
    """Returns a permutation of n rows that leaves none in its place."""
    order = rng.permutation(n)
    out = np.empty(n, int)
    out[order] = np.roll(order, 1)
    return out


def _unit(x: Float) -> Float:
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)


def _broken(own: Float, level: float, spread: float, rows: NDArray) -> tuple[tuple[int, int], ...]:
    """Returns runs at the shuffled level, where the median run is too far above it for chance."""
    runs = np.array_split(np.arange(len(own)), min(RUNS, len(own) // (LEAST_ROWS // 2)))
    found = []
    heights = [(own[run].mean() - level) * np.sqrt(len(run)) / spread for run in runs]
    for run, height in zip(runs, heights, strict=True):
        if height < SIGMAS / 2 < 2 * SIGMAS < np.median(heights):
            found.append((int(rows[run[0]]), int(rows[run[-1]]) + 1))
    return tuple(found)
