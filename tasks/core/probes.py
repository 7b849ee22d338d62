"""Linear probes on embeddings: the RANGE paper's protocol, and spatially blocked splits beside it.

The paper's: MinMaxScaler fitted on the training part; RidgeClassifierCV with alphas 0.1, 1, 10 and 10 folds for
classes (accuracy), RidgeCV with the same alphas and 3 folds for numbers (R2); one random 80/20 split, seed 42.
Random splits leak between neighbours, so whole blocks of the Earth are held out as well.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GroupShuffleSplit, KFold, StratifiedKFold, train_test_split
from sklearn.preprocessing import MinMaxScaler

Kind = Literal["classification", "regression"]
ALPHAS = (0.1, 1.0, 10.0)
FOLDS: dict[str, int] = {"classification": 10, "regression": 3}
TEST_SHARE, SEED = 0.2, 42


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to score."""

    train: NDArray[np.int64]
    """Indices of the training rows."""
    test: NDArray[np.int64]
    """Indices of the scored rows."""


def random_split(n: int) -> Split:
    """The paper's split."""
    return Split(*train_test_split(np.arange(n), test_size=TEST_SHARE, random_state=SEED))


def blocked_split(lonlat: NDArray[np.float64], degrees: float, seed: int = SEED) -> Split:
    """Holds out a fifth of the blocks, whole.

    Args:
        lonlat: Places, (n, 2) in degrees.
        degrees: Side of a block; blocks narrow towards the poles as cells of a grid do.
        seed: Of the choice of blocks.
    """
    blocks = block_of(lonlat, degrees)
    splitter = GroupShuffleSplit(1, test_size=TEST_SHARE, random_state=seed)
    return Split(*next(splitter.split(lonlat, groups=blocks)))


def block_of(lonlat: NDArray[np.float64], degrees: float) -> NDArray[np.int64]:
    """Number of the block that holds each place."""
    cells = np.floor((lonlat + np.array([180.0, 90.0])) / degrees).astype(np.int64)
    return cells[:, 0] * 1000 + cells[:, 1]


def score(features: NDArray[np.float32], labels: NDArray, kind: Kind, split: Split) -> float:
    """Accuracy or R2 of the paper's probe on the rows that it was not fitted on.

    The same as scikit-learn's `make_pipeline(MinMaxScaler(), RidgeClassifierCV(alphas, cv=10))`, or `RidgeCV(alphas,
    cv=3)`, several times as fast: the folds share their Gram matrices.

    Args:
        features: (n, d).
        labels: (n,).
        kind: Whether labels are classes or numbers.
        split: Rows to fit and to score.
    """
    scaler = MinMaxScaler().fit(features[split.train].astype(np.float64))
    train, test = (scaler.transform(features[rows].astype(np.float64)) for rows in (split.train, split.test))
    known, told = labels[split.train], labels[split.test]
    predicted = best_ridge(train, known, kind).predict(test)
    return float(accuracy_score(told, predicted) if kind == "classification" else r2_score(told, predicted))


@dataclass(frozen=True)
class Ridge:
    """A fitted ridge regression, or classifier by the largest of one regression per class."""

    alpha: float
    """The penalty that won the cross-validation."""
    weights: NDArray[np.float64]
    """(d, outputs)."""
    intercept: NDArray[np.float64]
    """(outputs,)."""
    classes: NDArray | None
    """Class of each output."""

    def predict(self, x: NDArray[np.float64]) -> NDArray:
        """Classes or numbers, (n,)."""
        outputs = x @ self.weights + self.intercept
        return outputs[:, 0] if self.classes is None else self.classes[outputs.argmax(1)]


@dataclass(frozen=True)
class Moments:
    """Sums over rows, from which a ridge regression follows; they add and subtract."""

    n: int
    """Number of rows."""
    x: NDArray[np.float64]
    """Sum of features, (d,)."""
    y: NDArray[np.float64]
    """Sum of targets, (outputs,)."""
    xx: NDArray[np.float64]
    """Gram matrix, (d, d)."""
    xy: NDArray[np.float64]
    """(d, outputs)."""

    @classmethod
    def of(cls, x: NDArray[np.float64], y: NDArray[np.float64]) -> "Moments":
        """The sums over the rows of `x` and `y`."""
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.n - other.n, self.x - other.x, self.y - other.y, self.xx - other.xx, self.xy - other.xy)

    def solve(self, alpha: float, classes: NDArray | None) -> Ridge:
        """The ridge regression with an intercept that is not penalised."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        gram = self.xx - self.n * np.outer(mean_x, mean_x)
        gram[np.diag_indices_from(gram)] += alpha
        right = self.xy - self.n * np.outer(mean_x, mean_y)
        factor = scipy.linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
        weights = scipy.linalg.cho_solve(factor, right, check_finite=False)
        intercept = mean_y - mean_x @ weights
        if classes is not None:
            intercept[mean_y <= -1] = -np.inf  # a class that is in no row of this fold cannot be told
        return Ridge(alpha, weights, intercept, classes)


def best_ridge(x: NDArray[np.float64], labels: NDArray, kind: Kind) -> Ridge:
    """The ridge whose penalty has the best mean score over the protocol's folds, fitted to all rows."""
    classes, y = _targets(labels, kind)
    folds = StratifiedKFold(FOLDS[kind]) if kind == "classification" else KFold(FOLDS[kind])
    total = Moments.of(x, y)
    scores = np.zeros(len(ALPHAS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # rare classes are part of the protocol
        parts = list(folds.split(x, labels))
    for _, held in parts:
        rest = total - Moments.of(x[held], y[held])
        for i, alpha in enumerate(ALPHAS):
            predicted = rest.solve(alpha, classes).predict(x[held])
            judge = accuracy_score if kind == "classification" else r2_score
            scores[i] += judge(labels[held], predicted)
    return total.solve(ALPHAS[int(scores.argmax())], classes)


def _targets(labels: NDArray, kind: Kind) -> tuple[NDArray | None, NDArray[np.float64]]:
    if kind == "regression":
        return None, np.asarray(labels, np.float64)[:, None]
    classes, index = np.unique(labels, return_inverse=True)
    return classes, np.where(index[:, None] == np.arange(len(classes)), 1.0, -1.0)
