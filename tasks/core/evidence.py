"""What an embedding rests on: whether its place was seen, or is extrapolated from others.

One pass over the keys, without the values: about half of what the embedding itself costs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.core.retrieval import Method, RetrievalIndex, unit_vectors

EARTH_RADIUS_KM = 6371.0088  # the mean radius (IUGG)
WEIGHTS = 4_000_000  # at a time: 16 MB of each half stay in the cache


@dataclass(frozen=True)
class Evidence:
    """One entry per place."""

    images: NDArray[np.float32]
    """(m,) effective number of images, exp of the weights' entropy: 1 where one decides, n where all do alike."""
    largest: NDArray[np.float32]
    """(m,) the largest weight."""
    distance_km: NDArray[np.float64]
    """(m,) great-circle distance to the nearest image of the database."""
    rows: NDArray[np.int64]
    """(m, top) rows of the images with the largest weights, best first."""


def evidence(
    index: RetrievalIndex, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method, top: int = 0
) -> Evidence:
    """The evidence for embeddings.

    Args:
        index: The database.
        queries: Unit location embeddings, (m, d).
        lonlat: The places they embed, (m, 2) in degrees.
        method: How they are retrieved; not `none`.
        top: How many images to name.

    Raises:
        ValueError: The method retrieves nothing.
    """
    if method.name == "none":
        raise ValueError("without retrieval an embedding rests on no image: there is no evidence to give")
    size, top = max(1, WEIGHTS // len(index)), min(top, len(index))
    parts = []
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        parts.append(_summary(_weights(index, queries[rows], lonlat[rows], method), top))
    images, largest, best = zip(*parts or [_summary(torch.empty(0, len(index)), top)], strict=True)
    distance = distance_km(index, lonlat)
    return Evidence(np.concatenate(images), np.concatenate(largest), distance, np.concatenate(best))


def distance_km(index: RetrievalIndex, lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Great-circle distance from each place to the nearest image, (m,) in km on the mean sphere."""
    chord, _ = index.tree.query(unit_vectors(lonlat))
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chord / 2, 1))


def _summary(weights: Tensor, top: int) -> tuple[NDArray, NDArray, NDArray]:
    images = torch.special.entr(weights).sum(1).exp()
    best = weights.topk(top, dim=1).indices
    return images.cpu().numpy(), weights.amax(1).cpu().numpy(), best.cpu().numpy()


def _weights(
    index: RetrievalIndex, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method
) -> Tensor:
    """The weight of every image for every place, (m, n); rows add to 1."""
    g = torch.as_tensor(queries, dtype=index.dtype, device=index.device)
    if method.name in ("top1", "topk"):
        k = 1 if method.name == "top1" else min(method.k, len(index))
        return g.new_zeros(len(g), len(index)).scatter_(1, index.nearest(queries, k)[1], 1 / k)
    weights = torch.softmax(method.semantic * g @ index.keys.T, 1)
    if not method.has_geodesic:
        return weights
    x = torch.as_tensor(unit_vectors(lonlat), device=index.device).to(g)  # float32 serves: a weight to 1e-5
    geodesic = torch.softmax(method.geodesic_temperature * x @ index.places.to(g).T, 1)
    return geodesic.lerp_(weights, method.beta)
