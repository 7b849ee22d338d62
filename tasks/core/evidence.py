"""Measures how well an embedding is supported: whether images lie near its place, or it is extrapolated from afar.

Takes one pass over the keys, without the values: about half the cost of the embedding itself.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.core.earth.sphere import km_of, unit_vectors
from tasks.core.retrieval import Method, RetrievalIndex

WEIGHTS = 4_000_000  # weights computed at a time: 16 MB for each half, which stay in the cache


@dataclass(frozen=True)
class Evidence:
    """How well embeddings are supported; one entry per place."""

    images: NDArray[np.float32]
    """(m,) effective number of images, exp of the entropy of the weights: from 1, one image, to n, all alike."""
    largest: NDArray[np.float32]
    """(m,) the largest weight."""
    distance_km: NDArray[np.float64]
    """(m,) great-circle distance to the nearest image of the database."""
    rows: NDArray[np.int64]
    """(m, top) rows of the images with the largest weights, best first."""


def evidence(
    index: RetrievalIndex, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method, top: int = 0
) -> Evidence:
    """Returns the evidence for embeddings.

    Args:
        index: The database.
        queries: Unit location embeddings, (m, d).
        lonlat: Places of the queries, (m, 2) in degrees.
        method: Retrieval method; not `none`.
        top: Number of images to name.

    Raises:
        ValueError: The method retrieves nothing.
    """
    if method.name == "none":
        raise ValueError("without retrieval an embedding rests on no image: there is no evidence to give")
    size, top = max(1, WEIGHTS // len(index)), min(top, len(index))
    images, largest = (np.empty(len(queries), np.float32) for _ in range(2))
    best = np.empty((len(queries), top), np.int64)
    room = Room.of(index, min(size, len(queries)))
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        weights = _weights(index, queries[rows], lonlat[rows], method, room)
        largest[rows] = weights.amax(1).cpu().numpy()
        best[rows] = weights.topk(top, dim=1).indices.cpu().numpy()
        images[rows] = torch.special.entr(weights, out=room.other[: len(weights)]).sum(1).exp().cpu().numpy()
    return Evidence(images, largest, distance_km(index, lonlat), best)


@dataclass(frozen=True)
class Room:
    """Memory that the weights of one block of places after another are computed in.

    New tensors for each block, with the results between them, left the allocator with gigabytes of gaps.
    """

    weights: Tensor
    """(places, images)."""
    other: Tensor
    """(places, images)."""
    places: Tensor
    """(images, 3) unit vectors; float32 gives weights to 1e-5, which is enough."""

    @classmethod
    def of(cls, index: RetrievalIndex, size: int) -> "Room":
        """Makes room for `size` places."""
        weights, other = (index.keys.new_empty(size, len(index)) for _ in range(2))
        return cls(weights, other, index.places.to(index.keys))


def distance_km(index: RetrievalIndex, lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the great-circle distance from each place to the nearest image, (m,) in km on the mean sphere."""
    chord, _ = index.tree.query(unit_vectors(lonlat))
    return km_of(chord)


def _weights(
    index: RetrievalIndex, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method, room: Room
) -> Tensor:
    """Returns the weight of every image for every place, (m, n), in the first rows of the room; rows add to 1.

    Heads side by side count alike.
    """
    g = torch.as_tensor(queries, dtype=index.dtype, device=index.device)
    weights, other = room.weights[: len(g)], room.other[: len(g)]
    if method.name in ("top1", "topk"):
        k = 1 if method.name == "top1" else min(method.k, len(index))
        rows = index.nearest(queries, k)[1]
        return weights.zero_().scatter_(1, rows, index.shares(rows))
    x = torch.as_tensor(unit_vectors(lonlat), device=index.device).to(g)
    weights.zero_()
    for head, share in zip(method.heads, method.shares, strict=True):
        if head.kind == "semantic":
            _softmax(head.at * g, index.keys, other, index)
        else:
            temperatures = torch.as_tensor(index.temperatures(lonlat, head), device=index.device).to(g)
            _softmax(temperatures[:, None] * x, room.places, other, index)
        weights.add_(other, alpha=share)
    return weights


def _softmax(queries: Tensor, keys: Tensor, out: Tensor, index: RetrievalIndex) -> None:
    """Computes the softmax of queries' products with keys, in `out`, each image with its weight in the index."""
    torch.mm(queries, keys.T, out=out)
    index.weigh(out.sub_(out.amax(1, keepdim=True)).exp_())
    out.div_(out.sum(1, keepdim=True))
