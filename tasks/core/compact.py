"""Projects a database's values to fewer dimensions before retrieval (PCA).

The weights of a soft selection add to 1, so the selection of projected values is the projection of the selection. A
compact product is therefore exact in its own space, at a fraction of the cost.

Components that are set side by side are of standardised values, so that no feature counts more for its unit, and
rotated: each of the new dimensions then has about the same variance, a mixture of all components. What rescales
dimensions one by one, such as a probe's MinMaxScaler or int8, would otherwise blow up the least components to the size
of the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK = 8192  # rows of values read at a time
Weights = NDArray[np.float64] | None


class Rows(Protocol):
    """A table in memory, or a stored one that is read in blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns (n, v)."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Returns some rows as an array."""


@dataclass(frozen=True)
class Projection:
    """The principal components of a database's values."""

    mean: NDArray[np.float32]
    """(v,)."""
    components: NDArray[np.float32]
    """(v, dims) columns: orthonormal, by falling variance, the largest entry of each positive to fix its sign. Or
    rotated, of values divided by `deviation`."""
    explained: float
    """Share of the values' variance that the components keep."""
    deviation: NDArray[np.float32] | None = None
    """(v,) standard deviations, where the components are of standardised values."""

    @classmethod
    def fit(cls, values: Rows, dims: int = 64, weights: Weights = None) -> "Projection":
        """Fits the components to (n, v) values in two passes over them, block by block.

        Args:
            values: (n, v).
            dims: Number of components.
            weights: How much each row counts, (n,); unset, 1.

        Raises:
            ValueError: The values have fewer than `dims` dimensions.
        """
        if not 1 <= dims <= values.shape[1]:
            raise ValueError(f"values of length {values.shape[1]} have no {dims} components: use 1 to that many")
        mean, covariance = _moments(values, weights)
        chosen, explained = _principal(covariance, dims)
        return cls(mean.astype(np.float32), chosen.astype(np.float32), explained)

    @classmethod
    def rotated(cls, values: Rows, dims: int, standardise: bool = True, weights: Weights = None) -> "Projection":
        """Fits components of standardised (n, v) values, or of the values as they are, and rotates them at random.

        The rotation depends on `dims` alone.

        Args:
            values: (n, v).
            dims: Number of components.
            standardise: Whether each of the values is divided by its deviation first.
            weights: How much each row counts, (n,); unset, 1.

        Raises:
            ValueError: The values have fewer than `dims` dimensions.
        """
        if not 1 <= dims <= values.shape[1]:
            raise ValueError(f"values of length {values.shape[1]} have no {dims} components: use 1 to that many")
        mean, covariance = _moments(values, weights)
        if standardise:
            deviation = np.sqrt(np.diag(covariance))
            deviation[deviation == 0] = 1.0
        else:
            deviation = np.ones(len(mean))
        chosen, explained = _principal(covariance / np.outer(deviation, deviation), dims)
        turned = chosen @ rotation(dims) / deviation[:, None]
        return cls(mean.astype(np.float32), turned.astype(np.float32), explained, deviation.astype(np.float32))

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Returns the values in the compact space, (n, dims)."""
        return np.concatenate([(block - self.mean) @ self.components for block in _blocks(values)])

    def restore(self, compact: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the values that are nearest to those of compact ones, (n, v)."""
        found = compact @ self.components.T
        return (found if self.deviation is None else found * self.deviation**2) + self.mean


@dataclass(frozen=True)
class Compact:
    """What makes a product's vectors of fewer dimensions."""

    values: Projection | None = None
    """Projects the values, and so each head; None: they are as they are."""
    location: Projection | None = None
    """Projects the location part; None: it is as it is."""


def project(projection: Projection | None, vectors: NDArray[Any]) -> NDArray[Any]:
    """Returns vectors in the compact space, (n, dims), in their precision; as they are without a projection."""
    return vectors if projection is None else projection.apply(vectors)


def rotation(dims: int) -> NDArray[np.float64]:
    """Returns a random rotation, (dims, dims), always the same."""
    factor, triangle = np.linalg.qr(np.random.default_rng(0).normal(size=(dims, dims)))
    return factor * np.sign(np.diag(triangle))  # which makes the factors unique


def _principal(covariance: NDArray[np.float64], dims: int) -> tuple[NDArray[np.float64], float]:
    """Returns the first eigenvectors, (v, dims), and their share of the variance."""
    variances, vectors = np.linalg.eigh(covariance)
    chosen = vectors[:, ::-1][:, :dims]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(0), np.arange(dims)])
    total = variances.sum()
    if total > 0:
        return chosen, float(variances[::-1][:dims].sum() / total)
    return chosen, 1.0


def _moments(values: Rows, weights: Weights) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns mean and covariance, in two passes."""
    total = values.shape[0] if weights is None else weights.sum()
    mean = sum(_weighed(block, some).sum(0, dtype=np.float64) for block, some in _pairs(values, weights)) / total
    return mean, _covariance(values, weights, mean) / total


def _covariance(values: Rows, weights: Weights, mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the covariance times the sum of the weights."""
    sums = np.zeros((len(mean), len(mean)))
    for block, some in _pairs(values, weights):
        centred = block - mean
        sums += _weighed(centred, some).T @ centred
    return sums


def _weighed(block: NDArray[Any], weights: Weights) -> NDArray[Any]:
    return block if weights is None else block * weights[:, None]


def _pairs(values: Rows, weights: Weights) -> Iterator[tuple[NDArray[np.float32], Weights]]:
    """Returns blocks of rows, each with its weights."""
    for i, block in enumerate(_blocks(values)):
        yield block, None if weights is None else weights[i * BLOCK : (i + 1) * BLOCK]


def _blocks(values: Rows) -> Iterator[NDArray[np.float32]]:
    return (np.asarray(values[start : start + BLOCK]) for start in range(0, max(1, values.shape[0]), BLOCK))
