"""Fits the two probes of CoordBench: a ridge whose penalty is chosen on its own folds, and nearest neighbours.

As torchgeo-bench has them (torchgeo_bench/coordbench/probe.py): features in float32, scaled to mean 0 and sample
deviation 1 on the training rows; penalties 1e-4 to 1e6 in steps of half a power; the reported score is the best mean
over the folds, so it is chosen on what it is told of. A task's own test rows are scored once, by the penalty that is
best on folds of the others. Neighbours are the 5 nearest after scikit-learn's StandardScaler.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from tasks.core.probes import Kind

PENALTIES = tuple(float(10.0**power) for power in np.arange(-4.0, 6.5, 0.5))
NEIGHBOURS, FOLDS, SEED, BLOCK_DEGREES = 5, 5, 0, 10.0
NARROWEST = 1e-6  # least deviation that a feature is divided by

Part = tuple[NDArray[np.int64], NDArray[np.int64]]


def known(features: NDArray[np.float32], labels: NDArray, kind: Kind) -> NDArray[np.bool_]:
    """Tells which rows have a label and a whole vector, (n,)."""
    if kind == "regression":
        told = np.isfinite(labels.astype(np.float64))
    else:
        told = np.array([label is not None and (isinstance(label, str) or np.isfinite(label)) for label in labels])
    return told & np.isfinite(features).all(1)


def block_folds(lonlat: NDArray[np.float64], folds: int = FOLDS, degrees: float = BLOCK_DEGREES) -> NDArray[np.int64]:
    """Returns the fold of each place, (n,): all places of a block are in one."""
    lon, lat = np.floor(lonlat.T / degrees).astype(np.int64)
    blocks, which = np.unique(lat * 100_003 + lon, return_inverse=True)
    return (np.random.default_rng(SEED).permutation(len(blocks)) % folds)[which.ravel()]


def parts_of(n: int, fold: NDArray[np.int64] | None, scored: NDArray[np.bool_] | None) -> list[Part]:
    """Returns (training rows, scored rows) of each fold: of blocks, else random; or of the task's own split."""
    if scored is not None:
        return [(np.flatnonzero(~scored), np.flatnonzero(scored))]
    if fold is not None:
        held = [np.flatnonzero(fold == number) for number in np.unique(fold)]
    else:
        order = np.random.default_rng(SEED).permutation(n)
        held = [order[start::FOLDS] for start in range(FOLDS)]
    return _others(held)


def _others(held: Sequence[NDArray[np.int64]]) -> list[Part]:
    return [(np.concatenate([*held[:i], *held[i + 1 :]]), rows) for i, rows in enumerate(held)]


def ridge_scores(
    features: NDArray[np.float32], labels: NDArray, kind: Kind, parts: Sequence[Part], own: bool
) -> list[float]:
    """Returns the score of each part, R² or accuracy, by the penalty that is best for all.

    Args:
        features: (n, d), all finite.
        labels: (n,).
        kind: Whether labels are classes or numbers.
        parts: Training and scored rows.
        own: Whether the one part is the task's own split: then the penalty is chosen on folds of its training rows.
    """
    targets, index = _targets(labels, kind)
    if own:
        ((train, _),) = parts
        inner = _others([train[start::FOLDS] for start in range(FOLDS)])
        penalty = PENALTIES[_best(_by_penalty(features, targets, index, inner))]
        return [scores[0] for scores in _by_penalty(features, targets, index, parts, (penalty,))]
    found = _by_penalty(features, targets, index, parts)
    return found[_best(found)]


def _best(found: list[list[float]]) -> int:
    return int(np.argmax([np.mean(scores) for scores in found]))


def _targets(labels: NDArray, kind: Kind) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """Returns targets, (n, outputs), and the number of each row's class, None for numbers."""
    if kind == "regression":
        return labels.astype(np.float64).astype(np.float32)[:, None], None
    _, index = np.unique(labels, return_inverse=True)
    return np.eye(index.max() + 1, dtype=np.float32)[index], index


def _by_penalty(
    features: NDArray[np.float32],
    targets: NDArray[np.float32],
    index: NDArray[np.int64] | None,
    parts: Sequence[Part],
    penalties: Sequence[float] = PENALTIES,
) -> list[list[float]]:
    """Returns the scores of the parts for each penalty: one decomposition of a part's Gram matrix serves all."""
    columns = [_one_part(features, targets, index, part, penalties) for part in parts]
    return [list(scores) for scores in zip(*columns, strict=True)]


def _one_part(
    features: NDArray[np.float32],
    targets: NDArray[np.float32],
    index: NDArray[np.int64] | None,
    part: Part,
    penalties: Sequence[float],
) -> list[float]:
    train, scored = part
    x, new = _scaled(features[train], features[scored])
    y = targets[train].astype(np.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, new = x - mean_x, new - mean_x
    values, vectors = scipy.linalg.eigh(x.T @ x, overwrite_a=True, check_finite=False)
    along, new = vectors.T @ (x.T @ (y - mean_y)), new @ vectors
    said = (new @ (along / (values + penalty)[:, None]) + mean_y for penalty in penalties)
    if index is None:
        return [_r2(targets[scored], outputs) for outputs in said]
    return [float((outputs.argmax(1) == index[scored]).mean()) for outputs in said]


def _scaled(train: NDArray[np.float32], scored: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales features on the training rows, in float32 by PyTorch, whose rounding the benchmark has too."""
    x, new = torch.from_numpy(train), torch.from_numpy(scored)
    mean, std = x.mean(0, keepdim=True), x.std(0, keepdim=True).clamp_min(NARROWEST)
    return ((x - mean) / std).double().numpy(), ((new - mean) / std).double().numpy()


def _r2(told: NDArray[np.float32], said: NDArray[np.float64]) -> float:
    truth = told.astype(np.float64)
    return float(1 - ((truth - said) ** 2).sum() / max(((truth - truth.mean()) ** 2).sum(), 1e-12))


def neighbour_scores(features: NDArray[np.float32], labels: NDArray, parts: Sequence[Part]) -> list[float]:
    """Returns the accuracy of each part by the classes of the nearest training rows; the first class wins a draw."""
    _, index = np.unique(labels, return_inverse=True)
    return [_accuracy(features, index, *part) for part in parts]


def _accuracy(
    features: NDArray[np.float32], index: NDArray[np.int64], train: NDArray[np.int64], scored: NDArray[np.int64]
) -> float:
    scaler = StandardScaler().fit(features[train])
    x, new = (scaler.transform(features[rows]).astype(np.float32) for rows in (train, scored))
    nearest = KNeighborsClassifier(min(NEIGHBOURS, len(train))).fit(x, index[train])
    return float((nearest.predict(new) == index[scored]).mean())
