"""Fits the paper's probe for thousands of classes and many rows: targets are never made, and features come in blocks.

A ridge on ±1 targets needs of these only their sums with the features, and such a sum is twice that of a class's rows
minus that of all. So memory grows with features x classes and with a block of rows, not with rows x classes: of the
437,513 photographs and 8,142 classes of iNaturalist 2018 the targets alone would take 28 GB.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from tasks.core.probes import ALPHAS, Moments

Rows = Callable[[NDArray[np.int64]], NDArray[np.float32]]

BLOCK = 2048  # rows at a time: their outputs for 8,142 classes take 133 MB


@dataclass(frozen=True)
class ManyClassRidge:
    """scikit-learn's `RidgeClassifierCV(alphas, cv=cv)` after a MinMaxScaler, fitted in blocks of rows."""

    classes: NDArray[np.int64]
    """The classes, in order, (c,)."""
    alpha: float
    """The penalty that was chosen."""
    low: NDArray[np.float64]
    """Least value of each feature among the rows that were fitted, (d,)."""
    span: NDArray[np.float64]
    """What the scaling divides by, (d,)."""
    weights: NDArray[np.float64]
    """(d, c)."""
    intercept: NDArray[np.float64]
    """(c,)."""

    def decide(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Returns scores from about -1, another class, to 1, this class, (n, c)."""
        return _scaled(features, self.low, self.span) @ self.weights + self.intercept


def fit_many(rows: Rows, labels: NDArray[np.int64], cv: int, alphas: tuple[float, ...] = ALPHAS) -> ManyClassRidge:
    """Chooses the penalty by stratified folds, and fits it to all rows.

    Args:
        rows: Gives the features of some rows, (n, d). It is called several times for each row.
        labels: Class of each row.
        cv: Number of folds.
        alphas: Penalties to choose from.
    """
    classes, index = np.unique(labels, return_inverse=True)
    everything = np.arange(len(index))
    low, high = _bounds(rows, everything)
    span = np.where(high - low > 10 * np.finfo(np.float64).eps, high - low, 1.0)

    def scaled(chosen: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        for block in _blocks(chosen):
            yield block, _scaled(rows(block), low, span)

    total = _moments(scaled(everything), index, len(classes))
    scores = np.zeros((len(alphas), cv))
    for fold, (_, held) in enumerate(StratifiedKFold(cv).split(index, index)):
        rest = total - _moments(scaled(held), index, len(classes))
        unseen = np.bincount(index[held], minlength=len(classes)) == np.bincount(index, minlength=len(classes))
        for i, alpha in enumerate(alphas):
            ((weights, intercept),) = rest.solve((alpha,))
            intercept = np.where(unseen, -np.inf, intercept)  # a class that only held-out rows have
            right = sum(int(((x @ weights + intercept).argmax(1) == index[at]).sum()) for at, x in scaled(held))
            scores[i, fold] = right / len(held)
    best = int(scores.mean(1).argmax())
    ((weights, intercept),) = total.solve((alphas[best],))
    return ManyClassRidge(classes, alphas[best], low, span, weights, intercept)


def _blocks(chosen: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    yield from (chosen[start : start + BLOCK] for start in range(0, len(chosen), BLOCK))


def _bounds(rows: Rows, chosen: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the least and the largest value of each feature."""
    ends = [(found.min(0), found.max(0)) for found in (rows(block) for block in _blocks(chosen))]
    least, most = zip(*ends, strict=True)
    return np.min(least, axis=0).astype(np.float64), np.max(most, axis=0).astype(np.float64)


def _scaled(features: NDArray[np.float32], low: NDArray, span: NDArray) -> NDArray[np.float64]:
    return (features - low) / span


def _moments(
    blocks: Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]], index: NDArray[np.int64], classes: int
) -> Moments:
    """Returns the sums over rows of features and ±1 targets, whose products come by sums over each class's rows."""
    total: Moments | None = None
    for at, features in blocks:
        of_class = scipy.sparse.csr_array((np.ones(len(at)), (index[at], np.arange(len(at)))), (classes, len(at)))
        counts, x = np.bincount(index[at], minlength=classes).astype(np.float64), features.sum(0)
        by_class = (of_class @ features).T
        block = Moments(len(at), x, 2 * counts - len(at), features.T @ features, 2 * by_class - x[:, None])
        total = block if total is None else total + block
    assert total is not None, "there are rows"
    return total
