"""Tells by few numbers whether vectors are the same up to the rounding of another batch or machine.

A vector that is encoded again beside other images differs in its last bits. So vectors are compared to SAME of their
length, by a few random projections: a difference shows in at least one of them, unless it is orthogonal to all.
"""

import numpy as np
from numpy.typing import NDArray

SAME = 1e-6  # largest relative difference of equal vectors: ten times their rounding, a tenth of an update's error
PROJECTIONS = 8


def marks(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns (n, PROJECTIONS + 1) numbers that differ by SAME at most where vectors, (n, v), are the same.

    They are the components of directions along random ones, and the log of lengths: both compare relative errors.
    """
    draws = np.random.default_rng(0).normal(size=(vectors.shape[1], PROJECTIONS))
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
    return np.concatenate([vectors / lengths @ draws, np.log(lengths)], axis=1)
