"""Finds the leading components of embeddings, by which a few numbers of a cell serve pictures, likeness and classes.

Every part of a vector counts alike: a part is divided by the root of its total variance, as in the evaluation's fused
embedders, so that likeness does not depend on the units of the parts. The components are ordered by variance: any
prefix keeps the most that its length can. docs/grid.md compares other codes (`python -m tests.benchmarks.compact`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.core.compact import Projection
from tasks.core.quantize import CODES, MARGIN, NODATA_CODE

BLOCKS, CELLS = 512, 100  # blocks of land and cells of each by which components and scales are found
DIGITS = 3  # significant digits of a scale: later ones depend on the machine, and a rerun must agree


@dataclass(frozen=True)
class Leading:
    """The leading components of embeddings and the scale of the int8 codes of each."""

    mean: NDArray[np.float32]
    """(dim,)."""
    axes: NDArray[np.float32]
    """(dim, components) columns: `(vector - mean) @ axes` are the components."""
    scale: NDArray[np.float32]
    """(components,) difference between the values of neighbouring codes."""
    kept: NDArray[np.float32]
    """(components,) share of the sample's variance that the components up to each keep."""

    @classmethod
    def fit(cls, vectors: NDArray[np.float32], parts: Mapping[str, tuple[int, int]], most: int) -> "Leading":
        """Fits the components to a sample.

        Args:
            vectors: The sample, (n, dim), finite.
            parts: First dimension of each part, and the one after its last; together all dimensions.
            most: Components to find; where the vectors have fewer dimensions, as many as these.
        """
        weights = np.ones(vectors.shape[1], np.float32)
        for start, stop in parts.values():
            weights[start:stop] = 1 / (np.sqrt(vectors[:, start:stop].var(0, dtype=np.float64).sum()) or 1)
        found = Projection.fit(vectors * weights, min(most, len(weights)))
        axes, mean = found.components * weights[:, None], found.mean / weights
        values = (vectors - mean) @ axes
        total = (vectors * weights).var(0, dtype=np.float64).sum() or 1.0
        kept = np.minimum(values.var(0, dtype=np.float64).cumsum() / total, 1).round(6)
        return cls(mean, axes, scales(values), kept.astype(np.float32))

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[np.int8]:
        """Returns the codes of vectors (dim, ...), (components, ...); NODATA_CODE throughout where a vector is NaN.

        A value beyond the scale gets the nearest code.
        """
        flat = vectors.reshape(len(vectors), -1)
        known = np.isfinite(flat).all(0)
        codes = np.full((len(self.scale), flat.shape[1]), NODATA_CODE, np.int8)
        values = self.axes.T @ (flat[:, known] - self.mean[:, None]) / self.scale[:, None]
        codes[:, known] = np.clip(np.rint(values), -CODES, CODES)
        return codes.reshape(-1, *vectors.shape[1:])

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Returns the values of codes (components, ...), NaN where they are NODATA_CODE."""
        return scaled(codes, self.scale)


def scales(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the scale of the codes of each column of values (n, components), (components,)."""
    largest = np.abs(values).max(0) * (1 + MARGIN)
    return np.array([_rounded(value / CODES) for value in largest], np.float32)


def scaled(codes: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the values of codes, NaN where they are NODATA_CODE, by the scale of each along the first dimension."""
    values = codes * scale.reshape(*scale.shape, *[1] * (codes.ndim - scale.ndim))
    return np.where(codes == NODATA_CODE, np.float32(np.nan), values)


def pooled(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Returns the means of two by two cells' codes, (components, rows / 2, columns / 2), of those that have data.

    An odd last row or column has cells of its own alone.
    """
    _, rows, columns = codes.shape
    even = np.pad(codes, ((0, 0), (0, rows % 2), (0, columns % 2)), constant_values=NODATA_CODE)
    parts = even.reshape(len(codes), even.shape[1] // 2, 2, even.shape[2] // 2, 2)
    known = parts != NODATA_CODE
    count = known.sum((2, 4))
    total = np.where(known, parts, 0).sum((2, 4), dtype=np.int32)
    return np.where(count, np.rint(total / np.maximum(count, 1)), NODATA_CODE).astype(np.int8)


def _rounded(value: float) -> float:
    """Rounds a scale up to DIGITS significant digits; 1 for a component that is 0 throughout."""
    if value < np.finfo(np.float32).tiny:
        return 1.0
    unit = 10.0 ** (np.floor(np.log10(value)) - DIGITS + 1)
    return float(np.ceil(value / unit) * unit)
