"""Linear probes on embeddings: the RANGE paper's protocol, and spatially blocked splits beside it.

The paper's: MinMaxScaler fitted on the training part; RidgeClassifierCV with alphas 0.1, 1, 10 and 10 folds for
classes (accuracy), RidgeCV with the same alphas and 3 folds for numbers (R2); one random 80/20 split, seed 42.
Random splits leak between neighbours, so whole blocks of the Earth are held out as well.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.model_selection import GroupShuffleSplit, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
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


def probe(kind: Kind) -> Pipeline:
    """The paper's probe."""
    ridge = RidgeClassifierCV if kind == "classification" else RidgeCV
    return make_pipeline(MinMaxScaler(), ridge(alphas=ALPHAS, cv=FOLDS[kind]))


def score(features: NDArray[np.float32], labels: NDArray, kind: Kind, split: Split) -> float:
    """Accuracy or R2 of the probe on the rows that it was not fitted on.

    Args:
        features: (n, d).
        labels: (n,).
        kind: Whether labels are classes or numbers.
        split: Rows to fit and to score.
    """
    features = features.astype(np.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # rare classes are part of the protocol
        fitted = probe(kind).fit(features[split.train], labels[split.train])
    return float(fitted.score(features[split.test], labels[split.test]))
