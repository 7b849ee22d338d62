"""Projects a database's values to fewer dimensions before retrieval (PCA).

The weights of a soft selection add to 1, so the selection of projected values is the projection of the selection. A
compact product is therefore exact in its own space, at a fraction of the cost.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK = 8192  # rows of values read at a time


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
    """(v, dims) orthonormal columns, by falling variance. The largest entry of each is positive, to fix its sign."""
    explained: float
    """Share of the values' variance that the components keep."""

    @classmethod
    def fit(cls, values: Rows, dims: int = 64) -> "Projection":
        """Fits the components to (n, v) values in two passes over them, block by block.

        Raises:
            ValueError: The values have fewer than `dims` dimensions.
        """
        if not 1 <= dims <= values.shape[1]:
            raise ValueError(f"values of length {values.shape[1]} have no {dims} components: use 1 to that many")
        mean = sum(block.sum(0, dtype=np.float64) for block in _blocks(values)) / values.shape[0]
        variances, vectors = np.linalg.eigh(_covariance(values, mean))
        chosen = vectors[:, ::-1][:, :dims]
        chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(0), np.arange(dims)])
        total = variances.sum()
        if total > 0:
            explained = float(variances[::-1][:dims].sum() / total)
        else:
            explained = 1.0
        return cls(mean.astype(np.float32), chosen.astype(np.float32), explained)

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the values in the compact space, (n, dims)."""
        return np.concatenate([(block - self.mean) @ self.components for block in _blocks(values)])


def _covariance(values: Rows, mean: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.zeros((len(mean), len(mean)))
    for block in _blocks(values):
        centred = block - mean
        total += centred.T @ centred
    return total / values.shape[0]


def _blocks(values: Rows) -> Iterator[NDArray[np.float32]]:
    return (np.asarray(values[start : start + BLOCK]) for start in range(0, max(1, values.shape[0]), BLOCK))
