"""Measures the geographic prior: what places add to an image classifier, as on iNaturalist.

By Bayes with equally likely classes, log P(class | image, place) = log P(class | image) + log P(class | place) + const
(Mac Aodha et al. 2019). The term of the image comes as an array. The term of the place is the paper's probe on an
embedding: a ridge regression on ±1 estimates 2 P - 1.

The file is an `.npz` of plain arrays:

========= ============= =================================================================
array     dims          meaning
========= ============= =================================================================
lonlat    n, 2          degrees (lon, lat) of all photographs
labels    n             class of each, a column of log_probs
train     n             whether the probe is fitted on a photograph (true) or scored on it
log_probs m, classes    of the m scored photographs, in their order
========= ============= =================================================================
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from infra.addresses import shown
from infra.errors import UserError
from tasks.core.probes import GramRidgeClassifierCV
from tasks.evaluation.embedders import NOT_GIVEN, Embeddings, Named
from tasks.foreign import read_file

FOLDS = 5  # folds of the paper's code for this task
FLOOR = 1e-3  # smallest probability of a class at any place
TOP = (1, 3, 5)  # values of k of top-k accuracy


@dataclass(frozen=True)
class Photographs:
    """Photographs to classify."""

    lonlat: NDArray[np.float64]
    """(n, 2) in degrees."""
    labels: NDArray[np.int64]
    """(n,) columns of `log_probs`."""
    train: NDArray[np.bool_]
    """(n,) whether the probe is fitted on a photograph."""
    log_probs: NDArray[np.float64]
    """(m, classes) log-probabilities of the others, from the image alone."""


def read_photographs(source: str) -> Photographs:
    """Reads the arrays of photographs. Nothing in the file is executed.

    Raises:
        UserError: The file does not exist or lacks an array, or the arrays do not fit together.
    """
    try:
        with np.load(io.BytesIO(read_file(source, "an .npz of photographs")), allow_pickle=False) as file:
            found = Photographs(
                file["lonlat"].astype("f8"), file["labels"], file["train"].astype(bool), file["log_probs"].astype("f8")
            )
    except UserError:
        raise
    except Exception as error:  # a hostile file may fail in any way
        raise UserError(f"{shown(source)} is no .npz with lonlat, labels, train and log_probs ({error})") from error
    _check(found, source)
    return found


def _check(found: Photographs, source: str) -> None:
    n, scored = len(found.labels), int((~found.train).sum())
    if found.lonlat.shape != (n, 2) or found.train.shape != (n,) or len(found.log_probs) != scored or not scored:
        raise UserError(
            f"{shown(source)} has {n} labels, places {found.lonlat.shape}, {scored} to score and log_probs of "
            f"{len(found.log_probs)}: each label needs a place, each scored one a row of log_probs"
        )
    classes = found.log_probs.shape[1]
    if found.labels.dtype.kind not in "iu" or found.labels.min() < 0 or found.labels.max() >= classes:
        raise UserError(f"{shown(source)} has labels that are not columns 0 to {classes - 1} of its log_probs")
    if not np.isfinite(found.lonlat).all() or np.isnan(found.log_probs).any():
        raise UserError(f"{shown(source)} has places or log_probs that are not numbers: mend them")


def geo_prior(found: Photographs, embedders: list[Named]) -> pd.DataFrame:
    """Returns top-1, top-3 and top-5 accuracy of the images alone, and with each embedder's prior.

    Args:
        found: The photographs.
        embedders: The embedders.

    Returns:
        Columns embedder, top-1, top-3, top-5, note.
    """
    told = found.labels[~found.train]
    rows: list[dict[str, Any]] = [{"embedder": "image alone", **_top(found.log_probs, told), "note": ""}]
    for one in embedders:
        if one.embed is None:
            rows.append({"embedder": one.name, "note": NOT_GIVEN})
            continue
        vectors = one.embed(found.lonlat)
        if not np.isfinite(vectors[:, 0]).all():
            raise UserError(f"{one.name} has no vector for {int((~np.isfinite(vectors[:, 0])).sum())} of the places")
        rows.append({"embedder": one.name, **_top(found.log_probs + log_prior(found, vectors), told), "note": ""})
    return pd.DataFrame(rows)


def log_prior(found: Photographs, vectors: Embeddings) -> NDArray[np.float64]:
    """Returns log P(class | place) of the scored photographs, (m, classes), by a probe fitted on the others."""
    probe = make_pipeline(MinMaxScaler(), GramRidgeClassifierCV(cv=FOLDS))
    probe.fit(vectors[found.train].astype("f8"), found.labels[found.train])
    share = np.full(found.log_probs.shape, FLOOR)
    share[:, probe.classes_] = (probe.decision_function(vectors[~found.train].astype("f8")) + 1) / 2
    return np.log(np.clip(share, FLOOR, 1))


def _top(scores: NDArray[np.float64], told: NDArray[np.int64]) -> dict[str, float]:
    """Returns the share of rows whose class is among the k best, for each k."""
    rank = (scores > scores[np.arange(len(told)), told][:, None]).sum(1)
    return {f"top-{k}": round(float((rank < k).mean()), 4) for k in TOP}
