"""Features in memory, where training reads them from storage."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FeatureArray:
    """Features in memory."""

    values: NDArray[np.float32]
    """(view, image, feature)."""
    run: int = 1
    """One image is read as well as many."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(view, image, feature)."""
        return self.values.shape

    def take(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features of images, each in the view of the same index, (n, feature)."""
        return self.values[views, rows]
