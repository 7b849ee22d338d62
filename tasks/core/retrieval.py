"""RANGE and RANGE+ retrieval: exact soft attention over a database of images.

With unit vectors g (query), k_j (key), x (place), x_j (place of image j) and values v_j:

- RANGE:  sum_j softmax_j(t * g.k_j) v_j, with t = 15;
- RANGE+: beta * sum_j softmax_j(12 * g.k_j) v_j + (1 - beta) * sum_j softmax_j(40 * x.x_j) v_j.

|cos| <= 1 bounds the logits, so exp(t * (cos - 1)) is at most 1 and needs no running maximum: numerators and
denominators of database tiles add. Source: RANGE (CVPR 2025), arXiv 2502.19781, and its released code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Name = Literal["range+", "range", "top1", "topk", "none"]
TEMPERATURES = {"range": 15.0, "range+": 12.0}
SAFE_TEMPERATURE = 40.0  # exp(-2 * 40) is above float32's smallest normal number: no weight underflows
QUERY_TILE, KEY_TILE = 500, 4096  # tiles of weights (8 MB) stay in the cache between the two products


@dataclass(frozen=True)
class Method:
    """A way to retrieve."""

    name: Name = "range+"
    """Soft (`range`, `range+`), hard (`top1`, `topk`) or no retrieval."""
    beta: float = 0.5
    """Share of the semantic half in RANGE+; 1 is purely semantic."""
    k: int = 10
    """Images that `topk` averages."""
    temperature: float | None = None
    """Semantic temperature; unset, the paper's: 15 for RANGE, 12 for RANGE+."""
    geodesic_temperature: float = 40.0
    """Temperature of the geodesic half."""

    def __post_init__(self) -> None:
        known = ("range+", "range", "top1", "topk", "none")
        if self.name not in known:
            raise ValueError(f"retrieval method {self.name!r} is unknown: use one of {', '.join(known)}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta {self.beta} is not between 0 (geodesic) and 1 (semantic)")
        if self.k < 1:
            raise ValueError(f"k {self.k} is not positive: topk averages at least one image")

    @property
    def semantic(self) -> float:
        """The semantic temperature in force."""
        return TEMPERATURES.get(self.name, 15.0) if self.temperature is None else self.temperature


class Encodes(Protocol):
    """What `embed` needs of a location encoder."""

    def embed(self, lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
        """Unit location embeddings."""


class RetrievalIndex:
    """A database ready for retrieval."""

    def __init__(self, keys: NDArray[np.float32], values: NDArray[np.float32], locations: NDArray[np.float64]) -> None:
        """Takes unit keys (n, d), values (n, v) and locations (n, 2) in degrees (lon, lat).

        Raises:
            ValueError: The three do not belong together, or the keys are not unit vectors.
        """
        if not len(keys) == len(values) == len(locations) > 0:
            raise ValueError(
                f"{len(keys)} keys, {len(values)} values and {len(locations)} locations are no database: "
                "each image has one of each"
            )
        norms = np.linalg.norm(keys, axis=1)
        if not np.allclose(norms, 1, atol=1e-3):
            raise ValueError(f"keys are not unit vectors (norms from {norms.min():g} to {norms.max():g})")
        self.keys = torch.as_tensor(np.ascontiguousarray(keys, np.float32))
        self.values = torch.as_tensor(np.ascontiguousarray(values, np.float32))
        self.places = torch.as_tensor(unit_vectors(locations).astype(np.float32))

    def retrieve(
        self, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method
    ) -> NDArray[np.float32]:
        """The visual part, (m, v).

        Args:
            queries: Unit location embeddings, (m, d).
            lonlat: The places they embed, (m, 2) in degrees.
            method: How to retrieve; not `none`, which has no visual part.
        """
        g = torch.as_tensor(queries, dtype=torch.float32)
        x = torch.as_tensor(unit_vectors(lonlat).astype(np.float32))
        parts = [self._tile(g[rows], x[rows], method) for rows in _tiles(len(g), QUERY_TILE)]
        return torch.cat(parts).numpy() if parts else np.empty((0, self.values.shape[1]), np.float32)

    def _tile(self, g: Tensor, x: Tensor, method: Method) -> Tensor:
        if method.name == "none":
            return g.new_empty(len(g), 0)
        if method.name in ("top1", "topk"):
            k = 1 if method.name == "top1" else min(method.k, len(self.keys))
            nearest = (g @ self.keys.T).topk(k).indices
            return self.values[nearest].mean(1)
        semantic = self._soft(g, self.keys, method.semantic)
        if method.name == "range" or method.beta == 1:
            return semantic
        geodesic = self._soft(x, self.places, method.geodesic_temperature)
        return torch.lerp(geodesic, semantic, method.beta)

    def _soft(self, queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        top = _largest(queries, keys) if temperature > SAFE_TEMPERATURE else 1.0
        numerator = queries.new_zeros(len(queries), self.values.shape[1])
        denominator = queries.new_zeros(len(queries))
        for rows in _tiles(len(keys), KEY_TILE):
            weights = (queries @ keys[rows].T).sub_(top).mul_(temperature).exp_()
            denominator += weights.sum(1)
            numerator.addmm_(weights, self.values[rows])
        return numerator / denominator[:, None]


def _largest(queries: Tensor, keys: Tensor) -> Tensor:
    """Each query's largest cosine, (m, 1)."""
    tiles = [(queries @ keys[rows].T).amax(1) for rows in _tiles(len(keys), KEY_TILE)]
    return torch.stack(tiles).amax(0)[:, None]


def _tiles(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def unit_vectors(lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places in degrees (lon, lat), (n, 2), as points of the unit sphere, (n, 3)."""
    lon, lat = np.radians(np.asarray(lonlat, np.float64)).T
    return np.column_stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])


def embed(encoder: Encodes, index: RetrievalIndex, lonlat: NDArray[np.float64], method: Method) -> NDArray[np.float32]:
    """RANGE embeddings, (m, v + d): the visual part, then the unit location part.

    Args:
        encoder: The location encoder in whose space the index's keys live.
        index: The database.
        lonlat: Places, (m, 2) in degrees.
        method: How to retrieve; `none` gives the location part alone.
    """
    queries = encoder.embed(lonlat)
    return np.concatenate([index.retrieve(queries, lonlat, method), queries], axis=1)
