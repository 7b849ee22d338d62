"""Measures the geographic prior: what places add to an image classifier, as on iNaturalist.

Two ways, by what the file has:

- **A product.** By Bayes with equally likely classes, log P(class | image, place) = log P(class | image) +
  log P(class | place) + const (Mac Aodha et al. 2019). The term of the image comes as an array. The term of the place
  is the paper's probe on an embedding: a ridge regression on ±1 estimates 2 P - 1.
- **One probe**, as the paper's code has it: of embedding and image features side by side.

The file is an `.npz` of plain arrays, with log_probs, features or both:

========= ============= =================================================================
array     dims          meaning
========= ============= =================================================================
lonlat    n, 2          degrees (lon, lat) of all photographs
labels    n             class of each, a column of log_probs
train     n             whether the probe is fitted on a photograph (true) or scored on it
log_probs m, classes    of the m scored photographs, in their order
features  n, d          image features of all photographs
========= ============= =================================================================

Neither targets nor features nor outputs of all photographs are held in memory: `tasks.core.many_classes`.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra import storage
from infra.addresses import as_url, shown
from infra.errors import UserError
from tasks.core.many_classes import BLOCK, ManyClassRidge, fit_many
from tasks.evaluation.embedders import NOT_GIVEN, Embeddings, Named
from tasks.foreign import refuse_bomb

FOLDS = 5  # folds of the paper's code for this task
FLOOR = 1e-3  # smallest probability of a class at any place
TOP = (1, 3, 5)  # values of k of top-k accuracy
WITH_FEATURES = "image features"  # name of the probe on these alone, and of what is joined to an embedding
NEEDED, IMAGES = ("lonlat", "labels", "train"), ("log_probs", "features")


@dataclass(frozen=True)
class Photographs:
    """Photographs to classify."""

    lonlat: NDArray[np.float64]
    """(n, 2) in degrees."""
    labels: NDArray[np.int64]
    """(n,) classes, columns of `log_probs`."""
    train: NDArray[np.bool_]
    """(n,) whether the probe is fitted on a photograph."""
    log_probs: NDArray[np.float32] | None = None
    """(m, classes) log-probabilities of the others, from the image alone; None where they are not given."""
    features: NDArray[np.float32] | None = None
    """(n, d) image features of all, perhaps a file that is mapped; None where they are not given."""


@contextmanager
def read_photographs(source: str) -> Iterator[Photographs]:
    """Opens the arrays of photographs; features stay in a file. Nothing in the file is executed.

    Raises:
        UserError: The file does not exist or lacks an array, or the arrays do not fit together.
    """
    with TemporaryDirectory() as scratch:
        try:
            with storage.as_file(as_url(source)) as path:
                refuse_bomb(path, source, "an .npz of photographs")
                found = _read(path, Path(scratch))
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"there is no file {shown(source)}: give the path of an .npz of photographs") from None
        except Exception as error:  # a hostile file may fail in any way
            raise UserError(
                f"{shown(source)} is no .npz with lonlat, labels, train, and log_probs or features ({error})"
            ) from error
        _check(found, source)
        yield found


def _read(path: Path, scratch: Path) -> Photographs:
    with np.load(path, allow_pickle=False) as file:
        lonlat, labels, train = (file[name] for name in NEEDED)
        log_probs = file["log_probs"].astype("f4", copy=False) if "log_probs" in file else None
        has_features = "features" in file
    features = None
    if has_features:
        with zipfile.ZipFile(path) as archive:
            features = np.load(archive.extract("features.npy", scratch), mmap_mode="r", allow_pickle=False)
    return Photographs(lonlat.astype("f8"), labels, train.astype(bool), log_probs, features)


def _check(found: Photographs, source: str) -> None:
    n, scored = len(found.labels), int((~found.train).sum())
    if found.log_probs is None and found.features is None:
        raise UserError(f"{shown(source)} has neither {' nor '.join(IMAGES)}: give one of them, or both")
    told = scored if found.log_probs is None else len(found.log_probs)
    if found.lonlat.shape != (n, 2) or found.train.shape != (n,) or told != scored or not 0 < scored < n:
        raise UserError(
            f"{shown(source)} has {n} labels, places {found.lonlat.shape}, {scored} to score and log_probs of "
            f"{told}: each label needs a place, each scored one a row of log_probs"
        )
    if found.features is not None and (found.features.ndim != 2 or len(found.features) != n):
        raise UserError(f"{shown(source)} has features {found.features.shape} for {n} labels: give a row for each")
    if found.labels.dtype.kind not in "iu" or found.labels.min() < 0:
        raise UserError(f"{shown(source)} has labels that are not whole numbers from 0 on: number the classes")
    if found.labels.max() >= (classes := _classes(found)):
        raise UserError(f"{shown(source)} has labels that are not columns 0 to {classes - 1} of its log_probs")
    if not np.isfinite(found.lonlat).all() or (found.log_probs is not None and np.isnan(found.log_probs).any()):
        raise UserError(f"{shown(source)} has places or log_probs that are not numbers: mend them")


def _classes(found: Photographs) -> int:
    if found.log_probs is None:
        return int(found.labels.max()) + 1
    return found.log_probs.shape[1]


def geo_prior(found: Photographs, embedders: list[Named]) -> pd.DataFrame:
    """Returns top-1, top-3 and top-5 accuracy of the images alone, and with each embedder.

    Args:
        found: The photographs.
        embedders: The embedders. Each has a row for the product, if there are log_probs, and one for the probe of its
            vectors and the image features, if there are any.

    Returns:
        Columns embedder, top-1, top-3, top-5, note.
    """
    rows: list[dict[str, Any]] = []
    if found.log_probs is not None:
        alone = _Top(found)
        for at in _blocks(len(found.log_probs)):
            alone.take(at, found.log_probs[at])
        rows.append({"embedder": "image alone", **alone.shares(), "note": ""})
    if found.features is not None:
        rows.append({"embedder": WITH_FEATURES, **one_probe(found, None), "note": ""})
    for one in embedders:
        if one.embed is None:
            rows.append({"embedder": one.name, "note": NOT_GIVEN})
            continue
        vectors = one.embed(found.lonlat)
        if missing := int((~np.isfinite(vectors[:, 0])).sum()):
            raise UserError(f"{one.name} has no vector for {missing} of the places")
        if found.log_probs is not None:
            rows.append({"embedder": one.name, **product(found, vectors), "note": ""})
        if found.features is not None:
            joined = f"{one.name} and {WITH_FEATURES}"
            rows.append({"embedder": joined, **one_probe(found, vectors), "note": "one probe"})
    return pd.DataFrame(rows)


def product(found: Photographs, vectors: Embeddings) -> dict[str, float]:
    """Returns the accuracies of log P(class | image) + log P(class | place), by k."""
    assert found.log_probs is not None, "the product is of log-probabilities"
    top = _Top(found)
    for at, prior in log_prior(found, vectors):
        top.take(at, found.log_probs[at] + prior)
    return top.shares()


def log_prior(found: Photographs, vectors: Embeddings) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yields log P(class | place) of some scored photographs, (rows, classes), by a probe fitted on the others."""
    probe = _fitted(found, vectors, None)
    scored = np.flatnonzero(~found.train)
    for at in _blocks(len(scored)):
        share = np.full((len(scored[at]), _classes(found)), FLOOR)
        share[:, probe.classes] = (probe.decide(vectors[scored[at]]) + 1) / 2
        yield at, np.log(np.clip(share, FLOOR, 1))


def one_probe(found: Photographs, vectors: Embeddings | None) -> dict[str, float]:
    """Returns the accuracies of one probe on vectors and image features side by side, by k."""
    probe = _fitted(found, vectors, found.features)
    top, scored = _Top(found), np.flatnonzero(~found.train)
    for at in _blocks(len(scored)):
        said = np.full((len(scored[at]), _classes(found)), -np.inf)
        said[:, probe.classes] = probe.decide(_beside(vectors, found.features, scored[at]))
        top.take(at, said)
    return top.shares()


def _fitted(found: Photographs, vectors: Embeddings | None, features: NDArray[np.float32] | None) -> ManyClassRidge:
    train = np.flatnonzero(found.train)
    return fit_many(lambda rows: _beside(vectors, features, train[rows]), found.labels[train], FOLDS)


def _beside(
    vectors: Embeddings | None, features: NDArray[np.float32] | None, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Returns vectors and image features of some photographs side by side, or those that are given."""
    return np.concatenate([array[rows] for array in (vectors, features) if array is not None], axis=1)


def _blocks(count: int) -> Iterator[slice]:
    yield from (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


class _Top:
    """Counts the scored photographs whose class is among the k best, for each k."""

    def __init__(self, found: Photographs) -> None:
        self.told = found.labels[~found.train]
        self.right = dict.fromkeys(TOP, 0)

    def take(self, at: slice, scores: NDArray) -> None:
        """Counts some photographs by their scores, (rows, classes)."""
        told = self.told[at]
        rank = (scores > scores[np.arange(len(told)), told][:, None]).sum(1)
        for k in TOP:
            self.right[k] += int((rank < k).sum())

    def shares(self) -> dict[str, float]:
        """Returns the share of the photographs, by k."""
        return {f"top-{k}": round(right / len(self.told), 4) for k, right in self.right.items()}
