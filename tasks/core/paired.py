"""Compares scores on the same splits: whether one is above another beyond what the choice of the splits would do.

The splits of a cross-validation share most of their training rows, so their scores are not independent, and the usual
standard error is too small. The interval here is that of the corrected resampled t-test (Nadeau and Bengio 2003,
Inference for the generalization error, Machine Learning 52, 239-281), for repeated folds as in Bouckaert and Frank 2004
(PAKDD, 3-12): the variance of the mean of J differences is (1/J + test/train) times their variance, with J - 1 degrees
of freedom.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

CONFIDENCE = 0.95  # of the two-sided interval

Verdict = Literal["above", "level", "below"]
MARKS = {"above": "▲", "below": "▼"}  # how tables and charts show what is beyond noise


@dataclass(frozen=True)
class Difference:
    """A mean difference of scores with its interval."""

    mean: float
    """Mean over the splits."""
    low: float
    """Lower end of the interval; NaN for one split, which has none."""
    high: float
    """Upper end of the interval."""

    @property
    def verdict(self) -> Verdict:
        """Returns whether it is above or below 0 beyond noise, or level with it."""
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "level"


def paired(ours: ArrayLike, theirs: ArrayLike, test_per_train: float) -> Difference:
    """Returns the difference of two scores on the same splits.

    Args:
        ours: Scores, one per split.
        theirs: The other scores, in the same order of splits.
        test_per_train: Scored rows per training row: 1 / (k - 1) for k folds.

    Raises:
        ValueError: They have different numbers of splits.
    """
    if np.shape(ours) != np.shape(theirs):
        raise ValueError(f"{np.shape(ours)} and {np.shape(theirs)} scores are not of the same splits")
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Difference(mean, np.nan, np.nan)
    error = np.sqrt((1 / count + test_per_train) * differences.var(ddof=1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    return Difference(mean, mean - half, mean + half)
