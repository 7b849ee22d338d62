"""Fits linear probes on embeddings: the RANGE paper's protocol, and spatially blocked splits beside it.

The paper's protocol, from its text and its released code: MinMaxScaler fitted on the training part; RidgeClassifierCV
with alphas 0.1, 1, 10 and 10 folds for classes (accuracy), RidgeCV with the same alphas and 3 folds for numbers (R2);
one random 80/20 split, PyTorch's `random_split` with seed 42. Random splits leak between neighbours, so whole blocks of
the Earth are held out as well.

The two estimators below are scikit-learn's RidgeCV and RidgeClassifierCV with `cv` a number of folds: the same
penalty, the same predictions (tests hold them to that), several times as fast. Two ways lead to the same held-out
outputs, and the cheaper one is taken. One eigendecomposition of the Gram matrix of all rows serves every penalty and,
by the formula for left-out rows, every fold. Or, where a fold has many rows, a Cholesky factor is made for each fold
and penalty; the Gram matrix of a fold is that of all rows minus that of its held-out rows.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.validation import check_is_fitted, validate_data
from torch.utils.data import random_split as random_rows

from tasks.core.earth.sphere import EARTH_RADIUS_KM, unit_vectors

Kind = Literal["classification", "regression"]
METRICS: dict[Kind, str] = {"classification": "accuracy", "regression": "R²"}
ALPHAS = (0.1, 1.0, 10.0)  # ridge penalties of the paper
NUMBER_FOLDS, CLASS_FOLDS = 3, 10  # folds of the paper that choose the penalty, for numbers and for classes
FEW_DIMS = 300  # below, probes are quick as they are
NEGLIGIBLE = 1e-5  # sum of squares along a direction, a ten-thousandth of the least penalty
FEWER = 0.8  # share of directions up to which fewer are worth the work
WIDER = 4.0  # most that a training part's span may be narrower than all rows', which magnifies what was left out
SHARES, SEED = (0.8, 0.2), 42  # the paper's shares of training and test rows, and its seed

# Rare classes are part of the protocol. For the whole process: probes are fitted in threads, which share the filters.
warnings.filterwarnings("ignore", "The least populated class")


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to score."""

    train: NDArray[np.int64]
    """Indices of the training rows."""
    test: NDArray[np.int64]
    """Indices of the scored rows."""


def random_split(n: int, seed: int = SEED) -> Split:
    """Returns the paper's split of `n` rows, by the function that the paper's code uses."""
    parts = random_rows(range(n), SHARES, torch.Generator().manual_seed(seed))
    return Split(*(np.array(part.indices) for part in parts))


def blocked_folds(lonlat: NDArray[np.float64], degrees: float, folds: int, seed: int = SEED) -> list[Split]:
    """Returns folds of whole blocks: every place is scored once, by a probe that saw no place of its block.

    Args:
        lonlat: Places, (n, 2) in degrees.
        degrees: Side of a block; blocks narrow towards the poles as cells of a grid do.
        folds: Number of folds.
        seed: Seed of the order of the blocks.

    Raises:
        ValueError: There are fewer blocks than folds.
    """
    blocks = block_of(lonlat, degrees)
    count = len(np.unique(blocks))
    if count < folds:
        raise ValueError(
            f"the places lie in {count} blocks of {degrees:g} degrees, too few for {folds} folds: use smaller blocks"
        )
    splitter = GroupKFold(folds, shuffle=True, random_state=seed)
    return [Split(*parts) for parts in splitter.split(lonlat, groups=blocks)]


def block_of(lonlat: NDArray[np.float64], degrees: float) -> NDArray[np.int64]:
    """Returns the number of the block that holds each place, (n,)."""
    lon = np.mod(lonlat[:, 0] + 180, 360)
    return (lon // degrees).astype(np.int64) * 100_000 + ((lonlat[:, 1] + 90) // degrees).astype(np.int64)


def near_duplicates(lonlat: NDArray[np.float64], split: Split, km: float) -> int:
    """Counts the scored places with a training place nearer than `km`, through which a split leaks."""
    points = unit_vectors(lonlat)
    chord = 2 * np.sin(km / EARTH_RADIUS_KM / 2)
    distance, _ = cKDTree(points[split.train]).query(points[split.test], distance_upper_bound=chord)
    return int(np.isfinite(distance).sum())


@dataclass(frozen=True)
class Features:
    """Features of all rows, and, where they vary in fewer directions than they have dimensions, what they are in those.

    Retrieved embeddings are means over many images, so 1,280 dimensions vary in some 700. A direction in which the
    scaled features' sum of squares is s moves no prediction by more than s / penalty of what the labels are, so those
    below `NEGLIGIBLE` are left out: a ten-thousandth at the least penalty.
    """

    full: NDArray[np.float32]
    """The features, (n, d)."""
    along: NDArray[np.float64] | None = None
    """Features scaled to 0..1 on all rows, along the directions, (n, r); None where all directions count."""
    axes: NDArray[np.float64] | None = None
    """The directions, orthonormal, (d, r)."""
    span: NDArray[np.float64] | None = None
    """What the scaling on all rows divided by, (d,)."""

    @classmethod
    def of(cls, full: NDArray[np.float32]) -> "Features":
        """Finds the directions in which features vary; rows may be NaN, which no split may hold."""
        known = np.isfinite(full[:, 0])
        if full.shape[1] < FEW_DIMS or known.sum() < 2:
            return cls(full)
        span = spans(full[known])
        scaled = full / span
        centred = scaled[known] - scaled[known].mean(0)
        squares, axes = scipy.linalg.eigh(centred.T @ centred, overwrite_a=True, check_finite=False, driver="evd")
        axes = axes[:, squares > NEGLIGIBLE]
        return cls(full, scaled @ axes, axes, span) if axes.shape[1] < FEWER * full.shape[1] else cls(full)

    def at(self, rows: NDArray[np.int64]) -> "Features":
        """Returns the features of some rows."""
        return Features(self.full[rows], None if self.along is None else self.along[rows], self.axes, self.span)

    def narrow(self, train: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Returns features whose ridge is that of the features scaled to 0..1 on training rows, (n, r).

        None where that is not to be had, since a training part spans too little of what all rows span.
        """
        if self.along is None or self.axes is None or self.span is None:
            return None
        wider = self.span / spans(self.full[train])
        if wider.max() > WIDER:
            return None
        turned = self.axes * wider[:, None]  # the penalty counts lengths, and a factor of the products keeps these
        return self.along @ scipy.linalg.cholesky(turned.T @ turned, lower=True, check_finite=False)


def spans(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns what a MinMaxScaler divides by, (d,): the ranges, and 1 where there is none."""
    ranges = np.ptp(features, axis=0).astype(np.float64)
    return np.where(ranges > 10 * np.finfo(np.float64).eps, ranges, 1.0)


def score(features: NDArray[np.float32], labels: NDArray, kind: Kind, split: Split) -> float:
    """Returns accuracy or R² of the paper's probe on the test rows of a split.

    Args:
        features: (n, d).
        labels: (n,).
        kind: Whether labels are classes or numbers.
        split: Rows to fit and to score.
    """
    return judge(kind, labels[split.test], predict(features, labels, kind, split))


def predict(features: NDArray[np.float32] | Features, labels: NDArray, kind: Kind, split: Split) -> NDArray:
    """Returns the predictions of the paper's probe for the test rows of a split, (test rows,)."""
    if not isinstance(features, Features):
        features = Features(features)
    narrow = features.narrow(split.train)
    if narrow is not None:
        return ridge(kind).fit(narrow[split.train], labels[split.train]).predict(narrow[split.test])
    train, test = (features.full[rows].astype(np.float64) for rows in (split.train, split.test))
    return probe(kind).fit(train, labels[split.train]).predict(test)


def judge(kind: Kind, labels: NDArray, predicted: NDArray) -> float:
    """Returns accuracy for classes, or R² for numbers."""
    return float(accuracy_score(labels, predicted) if kind == "classification" else r2_score(labels, predicted))


def probe(kind: Kind) -> Pipeline:
    """Returns the paper's probe, a scikit-learn pipeline."""
    return make_pipeline(MinMaxScaler(), ridge(kind))


def ridge(kind: Kind) -> "GramRidgeClassifierCV | GramRidgeCV":
    """Returns the paper's probe of features that are scaled already."""
    return GramRidgeClassifierCV() if kind == "classification" else GramRidgeCV()


class GramRidgeCV(RegressorMixin, BaseEstimator):
    """Equivalent of scikit-learn's `RidgeCV(alphas, cv=cv)` for one target."""

    def __init__(self, alphas: tuple[float, ...] = ALPHAS, cv: int = NUMBER_FOLDS) -> None:
        """Takes the penalties to choose from and the number of folds."""
        self.alphas, self.cv = alphas, cv

    def fit(self, X: Any, y: Any) -> Self:
        """Chooses the penalty by cross-validation, and fits it to all rows."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        parts = [held for _, held in KFold(self.cv).split(X)]

        def r2(outputs: NDArray[np.float64], rows: NDArray) -> float:
            return float(r2_score(y[rows], outputs))

        self.alpha_, weights, intercept = _fit(X, y[:, None], parts, self.alphas, r2)
        self.coef_, self.intercept_ = weights[:, 0], intercept[0]
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Returns numbers, (n,)."""
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_ + self.intercept_


class GramRidgeClassifierCV(ClassifierMixin, BaseEstimator):
    """Equivalent of scikit-learn's `RidgeClassifierCV(alphas, cv=cv)`: the largest of a regression per class."""

    def __init__(self, alphas: tuple[float, ...] = ALPHAS, cv: int = CLASS_FOLDS) -> None:
        """Takes the penalties to choose from and the number of folds."""
        self.alphas, self.cv = alphas, cv

    def fit(self, X: Any, y: Any) -> Self:
        """Chooses the penalty by cross-validation, and fits it to all rows."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, index = np.unique(y, return_inverse=True)
        targets = np.where(index[:, None] == np.arange(len(self.classes_)), 1.0, -1.0)
        parts = [held for _, held in StratifiedKFold(self.cv).split(X, y)]

        def accuracy(outputs: NDArray[np.float64], rows: NDArray) -> float:
            unseen = (targets[rows] > 0).sum(0) == (targets > 0).sum(0)  # a class that only these rows have
            return float(np.mean(np.where(unseen, -np.inf, outputs).argmax(1) == index[rows]))

        self.alpha_, self.coef_, self.intercept_ = _fit(X, targets, parts, self.alphas, accuracy)
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Returns scores from about -1, another class, to 1, this class, (n, classes)."""
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_ + self.intercept_

    def predict(self, X: Any) -> NDArray:
        """Returns classes, (n,)."""
        return self.classes_[self.decision_function(X).argmax(1)]


@dataclass(frozen=True)
class Moments:
    """Sums over rows that determine a ridge regression. Those of fewer rows come by subtraction."""

    n: int
    """Number of rows."""
    x: NDArray[np.float64]
    """Sum of features, (d,)."""
    y: NDArray[np.float64]
    """Sum of targets, (outputs,)."""
    xx: NDArray[np.float64]
    """Gram matrix, (d, d)."""
    xy: NDArray[np.float64]
    """Sum of the products of features and targets, (d, outputs)."""

    @classmethod
    def of(cls, x: NDArray[np.float64], y: NDArray[np.float64]) -> "Moments":
        """Sums over the rows of `x` and `y`."""
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.n - other.n, self.x - other.x, self.y - other.y, self.xx - other.xx, self.xy - other.xy)

    @property
    def centred(self) -> NDArray[np.float64]:
        """Returns the Gram matrix of the features minus their means, (d, d)."""
        return self.xx - np.outer(self.x, self.x / self.n)

    def solve(self, alphas: tuple[float, ...]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Returns for each penalty the weights (d, outputs) and the unpenalised intercepts (outputs,)."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        gram, right = self.centred, self.xy - np.outer(self.x, mean_y)
        found = []
        for alpha in alphas:
            penalised = gram.copy()
            penalised[np.diag_indices_from(gram)] += alpha
            factor = scipy.linalg.cho_factor(penalised.T, overwrite_a=True, check_finite=False)
            weights = scipy.linalg.cho_solve(factor, right, check_finite=False)
            found.append((weights, mean_y - mean_x @ weights))
        return found


def _fit(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    parts: list[NDArray],
    alphas: tuple[float, ...],
    score: Callable[[NDArray[np.float64], NDArray], float],
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Returns the penalty with the best mean `score(outputs, rows)` over held-out parts, and the ridge of all rows."""
    total = Moments.of(x, y)
    if spectrum_pays(len(x), x.shape[1], len(parts), len(alphas)):
        held_out = by_spectrum
    else:
        held_out = by_factors
    outputs = held_out(x, y, total, parts, alphas)
    scores = [[score(found[rows], rows) for rows in parts] for found in outputs]
    best = int(np.average(scores, axis=1).argmax())
    ((weights, intercept),) = total.solve(alphas[best : best + 1])
    return alphas[best], weights, intercept


def spectrum_pays(n: int, d: int, folds: int, alphas: int) -> bool:
    """Tells whether one eigendecomposition costs less than a factor for each fold and penalty.

    Measured costs, in multiplications: 10 d^3 for the decomposition, d^3 for a factor, 2 m^3 for a solution among the
    m rows of a fold.
    """
    m = n / folds
    return 10 * d**3 + 2 * n * d**2 + alphas * n * m * (2 * d + 2 * m) < folds * alphas * d**3


def by_spectrum(
    x: NDArray[np.float64], y: NDArray[np.float64], total: Moments, parts: list[NDArray], alphas: tuple[float, ...]
) -> NDArray[np.float64]:
    """Returns the outputs for held-out rows, (alphas, n, outputs), from the fit to all rows.

    Within each fold they are y - (I - H)^-1 residual. H is the hat matrix: in the eigenvectors of the Gram matrix,
    z / (s + alpha) @ z.T + 1 / n.
    """
    values, vectors = scipy.linalg.eigh(total.centred, overwrite_a=True, check_finite=False, driver="evd")
    mean = total.y / total.n
    z = (x - total.x / total.n) @ vectors
    along, out = z.T @ (y - mean), np.empty((len(alphas), *y.shape))
    for i, alpha in enumerate(alphas):
        shrunk = z / (np.maximum(values, 0) + alpha)
        residual = y - mean - shrunk @ along
        for rows in parts:
            left = np.eye(len(rows)) - shrunk[rows] @ z[rows].T - 1 / total.n
            out[i, rows] = y[rows] - scipy.linalg.solve(left, residual[rows], assume_a="pos", check_finite=False)
    return out


def by_factors(
    x: NDArray[np.float64], y: NDArray[np.float64], total: Moments, parts: list[NDArray], alphas: tuple[float, ...]
) -> NDArray[np.float64]:
    """Returns the outputs for held-out rows, (alphas, n, outputs), by a ridge for each fold and penalty."""
    out = np.empty((len(alphas), *y.shape))
    for rows in parts:
        for i, (weights, intercept) in enumerate((total - Moments.of(x[rows], y[rows])).solve(alphas)):
            out[i, rows] = x[rows] @ weights + intercept
    return out
