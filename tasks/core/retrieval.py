"""Computes retrieval: exact soft attention over a database of images, by the heads of a method (`tasks.core.methods`).

Heads are kept as `Sums`, a numerator and a denominator, which add over parts of a database. Each costs what it must:

- a semantic head is two matrix products per tile of weights, which stays in the cache between them;
- a broad geodesic head has the spectrum of its kernel (`geodesic.Spectrum`) where many places are asked of many
  images, so that the values are read once, and any number of betas costs as much as one;
- a sharp geodesic head looks at the few images that matter (`neighbours`).

Source: RANGE (CVPR 2025), arXiv 2502.19781, and its released code.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, reduce
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from tasks.core import neighbours
from tasks.core.compact import Projection, project
from tasks.core.earth.sphere import unit_vectors
from tasks.core.geodesic import Spectrum, pays
from tasks.core.methods import Head, Method
from tasks.core.sums import Selections, Sums

Precision = Literal["float32", "float64", "tf32", "bf16"]
VALUES = {"float32": torch.float32, "float64": torch.float64, "tf32": torch.float32, "bf16": torch.bfloat16}
SAFE_TEMPERATURE = 60.0  # exp(60) times 1e7 images stays below float32's largest, exp(-60) above its smallest
QUERY_TILE, KEY_TILE = 1000, 2048  # a tile of weights (8 MB) stays in the cache between the two products
GPU_QUERIES, GPU_SHARE = 4096, 0.125  # on a GPU: queries of a tile, and share of the free memory for its weights
BATCH = 500  # places of one batch: its float64 sums and harmonics take 100 MB


class Encodes(Protocol):
    """What `embed` needs of a location encoder."""

    def embed(self, lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
        """Returns unit location embeddings."""


class RetrievalIndex:
    """A database ready for retrieval."""

    def __init__(
        self,
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        locations: NDArray[np.float64],
        *,
        queries: int | None = None,
        device: str = "cpu",
        precision: Precision = "float32",
        location: Projection | None = None,
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        """Takes unit keys (n, d), values (n, v) and locations (n, 2) in degrees (lon, lat).

        Args:
            keys: Unit vectors in the location encoder's space.
            values: What is retrieved.
            locations: Where the images are.
            queries: Places that will be asked for altogether; unset, many. For few, the geodesic half is summed
                directly, since its spectrum costs as much as some thousand places.
            device: Where the arrays live and the products run: `cpu`, `cuda`, `cuda:1`.
            precision: Of the products. `float32` is within 1e-6 of float64 (1e-5 where a query all but equals a
                key, since the rounding of the cosine counts `temperature` times); `float64` takes three times
                as long. `tf32` (cuda alone) rounds the factors to 11 bits; `bf16` rounds weights and values
                to 8 bits, with keys and sums in float32.
            location: What makes the location part of fewer dimensions than the queries have; unset, they are it.
            weights: How much each image counts, (n,) above 0, which every kernel's weight is multiplied by; unset, 1.

        Raises:
            ValueError: The three do not belong together, the keys are not unit vectors, or a weight is not above 0.
        """
        if not len(keys) == len(values) == len(locations) > 0:
            raise ValueError(
                f"{len(keys)} keys, {len(values)} values and {len(locations)} locations are no database: "
                "each image has one of each"
            )
        norms = np.sqrt(np.einsum("ij,ij->i", keys, keys))  # without a copy of the keys
        if not np.allclose(norms, 1, atol=1e-3):
            raise ValueError(f"keys are not unit vectors (norms from {norms.min():g} to {norms.max():g})")
        self.device, self.precision, self.expected, self.location = device, precision, queries, location
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.keys = torch.as_tensor(np.ascontiguousarray(keys, np.float32)).to(device, self.dtype)
        self.values = torch.as_tensor(np.ascontiguousarray(values, np.float32)).to(device, VALUES[precision])
        self.locations = np.asarray(locations, np.float64)
        self.places = torch.as_tensor(unit_vectors(locations)).to(device)
        self.counts = _unequal(weights, len(keys))
        self.weights = None if self.counts is None else torch.as_tensor(self.counts).to(device, self.dtype)
        self.query_tile, self.key_tile = tile_sizes(device, len(keys))
        self._spectra: dict[float, Spectrum] = {}
        self._making = threading.Lock()  # threads of one process share a spectrum, and do not make it twice

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def tree(self) -> cKDTree:
        """Returns a search tree of the images' places as points of the unit sphere."""
        return cKDTree(self.places.cpu().numpy())

    def retrieve(
        self, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method
    ) -> NDArray[np.float32]:
        """Returns the visual part, (m, v), or (m, heads * v) of heads side by side.

        Args:
            queries: Unit location embeddings, (m, d).
            lonlat: The places they embed, (m, 2) in degrees.
            method: How to retrieve; `none` has no visual part and gives (m, 0).
        """
        if method.name == "none":
            return np.empty((len(queries), 0), np.float32)
        self._check(queries, lonlat)
        out = np.empty((len(queries), method.width * self.values.shape[1]), np.float32)
        for rows in _tiles(len(queries), max(BATCH, self.query_tile)):
            out[rows] = self._retrieve(queries[rows], lonlat[rows], method)
        return out

    def _retrieve(
        self, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method
    ) -> NDArray[np.float32]:
        if method.name in ("top1", "topk"):
            rows = self.nearest(queries, 1 if method.name == "top1" else method.k)[1]
            found = self.values[rows].float()
            if self.weights is None:
                return found.mean(1).cpu().numpy()
            shares = self.shares(rows).to(found)
            return (shares[..., None] * found).sum(1).cpu().numpy()
        return self.select(queries, lonlat, method).visual(method)

    def location_part(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the location part of embeddings: the queries, or what is kept of their dimensions."""
        return project(self.location, queries)

    def select(self, queries: NDArray[np.float32], lonlat: NDArray[np.float64], method: Method) -> Selections:
        """Returns the selections of a method's heads, as sums that add over parts of a database.

        The values of one call serve every beta: `selections.mix(0.3)`. Sums of a head `nearest` do not add.

        Raises:
            ValueError: The method selects no weights, or the queries do not fit.
        """
        heads = method.heads
        self._check(queries, lonlat)
        with _tf32(self.precision == "tf32"):
            return Selections(tuple(self._head(queries, lonlat, head) for head in heads))

    def _head(self, queries: NDArray[np.float32], lonlat: NDArray[np.float64], head: Head) -> Sums:
        if head.kind == "semantic":
            return self.by_likeness(queries, head.at)
        if head.kind == "geodesic":
            return self._geodesic(lonlat, head.at)
        return self._by_distance(lonlat, self.temperatures(lonlat, head))

    def temperatures(self, lonlat: NDArray[np.float64], head: Head) -> NDArray[np.float64]:
        """Returns the temperature of a head by distance at each place, (m,)."""
        if head.kind == "nearest":
            return neighbours.reaching(self.tree, unit_vectors(lonlat), int(head.at))
        return np.full(len(lonlat), head.at)

    def shares(self, rows: Tensor) -> Tensor:
        """Returns the share of each of some images in their mean, (m, k), by their weights; rows add to 1."""
        if self.weights is None:
            return torch.full(rows.shape, 1 / rows.shape[1], dtype=self.dtype, device=rows.device)
        weights = self.weights[rows]
        return weights / weights.sum(1, keepdim=True)

    def nearest(self, queries: NDArray[np.float32], k: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and rows of the `k` most similar keys, or all if fewer, best first, each (m, k)."""
        g = torch.as_tensor(queries, dtype=self.dtype, device=self.device)
        with _tf32(self.precision == "tf32"):
            tiles = [self._nearest(g[rows], min(k, len(self))) for rows in _tiles(len(g), self.query_tile)]
        empty = [(g.new_empty(0, k), g.new_empty(0, k, dtype=torch.long))]
        cosines, rows = zip(*(tiles or empty), strict=True)
        return torch.cat(cosines), torch.cat(rows)

    def _nearest(self, g: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = g.new_empty(len(g), 0), g.new_empty(len(g), 0, dtype=torch.long)
        for rows in _tiles(len(self), self.key_tile):
            cosines = g @ self.keys[rows].T
            found = torch.arange(rows.start, rows.start + cosines.shape[1], device=g.device).expand_as(cosines)
            cosines, found = torch.cat([best[0], cosines], 1), torch.cat([best[1], found], 1)
            top, where = cosines.topk(min(k, cosines.shape[1]))
            best = top, found.gather(1, where)
        return best

    def _check(self, queries: NDArray[np.float32], lonlat: NDArray[np.float64]) -> None:
        if queries.shape != (len(lonlat), self.keys.shape[1]):
            raise ValueError(
                f"queries {queries.shape} do not fit {len(lonlat)} places and keys of length {self.keys.shape[1]}: "
                "embed the places with the encoder that the database was made with"
            )

    def by_likeness(self, queries: NDArray[np.float32], temperature: float) -> Sums:
        """Sums a semantic head, image by image."""
        g = torch.as_tensor(queries, dtype=self.dtype, device=self.device)
        sums = Sums(g.new_zeros(len(g), self.values.shape[1]), g.new_zeros(len(g)), g.new_zeros(len(g)))
        if temperature > SAFE_TEMPERATURE:
            sums.shift.copy_(temperature * self.nearest(queries, 1)[0][:, 0])
        for rows in _tiles(len(g), self.query_tile):
            part = Sums(sums.numerator[rows], sums.denominator[rows], sums.shift[rows])
            self._accumulate(part, g[rows] * temperature, hot=temperature > SAFE_TEMPERATURE)
        return sums

    def _accumulate(self, sums: Sums, scaled: Tensor, hot: bool) -> None:
        for rows in _tiles(len(self), self.key_tile):
            weights = scaled @ self.keys[rows].T
            if hot:
                weights.sub_(sums.shift[:, None])
            self._add(sums, weights.exp_(), rows)

    def weigh(self, kernel: Tensor, rows: slice = slice(None)) -> Tensor:
        """Multiplies a kernel of some images, (m, rows), by their weights, in place; and returns it."""
        return kernel if self.weights is None else kernel.mul_(self.weights[rows])

    def _add(self, sums: Sums, weights: Tensor, rows: slice) -> None:
        self.weigh(weights, rows)
        sums.denominator.add_(weights.sum(1))
        if self.values.dtype == weights.dtype:
            sums.numerator.addmm_(weights, self.values[rows])
        else:
            sums.numerator.add_(weights.to(self.values.dtype) @ self.values[rows])

    def _geodesic(self, lonlat: NDArray[np.float64], temperature: float) -> Sums:
        if not pays(temperature, len(self), self.expected):
            return self.by_nearness(lonlat, temperature)
        sums, far = self.spectrum(temperature).sums(lonlat)
        if far.any():
            return sums.replaced(far, self.by_nearness(np.asarray(lonlat)[far], temperature))
        return sums

    def spectrum(self, temperature: float) -> Spectrum:
        """Returns the geodesic half's spectrum of the whole database, computed once."""
        with self._making:
            if temperature not in self._spectra:
                self._spectra[temperature] = Spectrum.of(self.locations, self.values, temperature, self.weights)
            return self._spectra[temperature]

    def by_nearness(self, lonlat: NDArray[np.float64], temperature: float) -> Sums:
        """Sums a geodesic head of one temperature over the images."""
        return self._by_distance(lonlat, np.full(len(lonlat), float(temperature)))

    def _by_distance(self, lonlat: NDArray[np.float64], temperatures: NDArray[np.float64]) -> Sums:
        """Sums over the images that matter where they are few, else image by image."""
        points = unit_vectors(lonlat)
        if not neighbours.pays(temperatures, len(self)):
            return self._by_all(points, temperatures)
        sums, far = neighbours.sums_near(self.tree, self.values, points, temperatures, self.dtype, self.weights)
        if far.any():
            return sums.replaced(far, self._by_all(points[far], temperatures[far]))
        return sums

    def _by_all(self, points: NDArray[np.float64], temperatures: NDArray[np.float64]) -> Sums:
        """Sums image by image; angles in float64, since float32's last bit times the temperature would show."""
        x = torch.as_tensor(points * temperatures[:, None], device=self.device)
        zeros = x.new_zeros((len(x), self.values.shape[1]), dtype=self.dtype)
        sums = Sums(zeros, zeros.new_zeros(len(x)), x.new_zeros(len(x)))
        for rows in _tiles(len(x), self.query_tile):
            part = Sums(sums.numerator[rows], sums.denominator[rows], sums.shift[rows])
            part.shift.copy_(_largest(x[rows], self.places, self.key_tile))
            for images in _tiles(len(self), self.key_tile):
                weights = torch.addmm(-part.shift[:, None], x[rows], self.places[images].T).to(self.dtype).exp_()
                self._add(part, weights, images)
        return sums


def _unequal(weights: NDArray[np.float64] | None, images: int) -> NDArray[np.float64] | None:
    """Returns the weights of images where one is not 1, (n,); none where all are: nothing is multiplied then.

    Raises:
        ValueError: They are not one for each image, or one is not a number above 0.
    """
    if weights is None:
        return None
    weights = np.asarray(weights, np.float64)
    if weights.shape != (images,) or not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(f"weights {weights.shape} of {images} images: give a number above 0 for each")
    return None if (weights == 1).all() else weights


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Lets CUDA round the factors of products to 11 bits (TF32) within, or not; the flag is the whole process's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def tile_sizes(device: str, images: int) -> tuple[int, int]:
    """Returns queries and keys of a tile of weights: what fits a CPU's cache, or a share of a GPU's free memory."""
    if not device.startswith("cuda"):
        return QUERY_TILE, KEY_TILE
    free, _ = torch.cuda.mem_get_info(device)
    return GPU_QUERIES, min(images, max(KEY_TILE, int(GPU_SHARE * free) // (4 * GPU_QUERIES)))


def _largest(queries: Tensor, keys: Tensor, tile: int) -> Tensor:
    """Returns each query's largest product, (m,)."""
    return reduce(torch.maximum, [(queries @ keys[rows].T).amax(1) for rows in _tiles(len(keys), tile)])


def _tiles(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def embed(encoder: Encodes, index: RetrievalIndex, lonlat: NDArray[np.float64], method: Method) -> NDArray[np.float32]:
    """Returns embeddings, (m, v + d): the visual part, then the location part.

    Args:
        encoder: The location encoder in whose space the index's keys live.
        index: The database.
        lonlat: Places, (m, 2) in degrees.
        method: How to retrieve; `none` gives the location part alone.
    """
    queries = encoder.embed(lonlat)
    return np.concatenate([index.retrieve(queries, lonlat, method), index.location_part(queries)], axis=1)
