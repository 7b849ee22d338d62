"""Chooses the temperatures and bandwidths of heads without labels: by how well they restore images that were left out.

At the place of an image the head answers from the other images, and its answer is compared with the image's own values
(leave-one-out cross-validation of a kernel regression). Two kinds of leaving out bound what a user's place is like:

- *one out*: only the image itself. A place among images, as far from the nearest as images are apart.
- *block out*: all images of its block of 10 degrees, or of a region's smaller ones. A place where no image is near.

Sharper kernels win the first, broader ones the second. A head is chosen by the mean of both. For a product of a region
the images that are left out are those in it: where they are denser than elsewhere, sharper kernels serve.

Source: Stone (1974), Cross-validatory choice and assessment of statistical predictions; blocks after Roberts et al.
(2017), Cross-validation strategies for data with temporal, spatial, hierarchical, or phylogenetic structure.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.core.compact import BLOCK, Projection, Rows
from tasks.core.earth.sphere import unit_vectors
from tasks.core.methods import Head, Kind
from tasks.core.probes import block_of

ASKED, PAIRS = 500, 100_000_000  # images left out, fewer where their pairs with all images are more than that
LEAST = 100  # fewest images left out: of fewer images there is nothing to choose by
TOGETHER = 10_000_000  # pairs held at a time: 80 MB each of some arrays
DIMS = 64  # rotated components of the standardised values that are restored
BLOCK_DEGREES = 10.0
TRIED: dict[Kind, tuple[float, ...]] = {
    "semantic": (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128),
    "geodesic": (10, 40, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000),
    "nearest": (1, 2, 4, 8, 16, 32, 64, 128, 256),
}

Float = NDArray[np.float64]


class Queries(Protocol):
    """Location embeddings of images' places: all in memory, or embedded as they are asked for."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> Any:
        """Returns those of some rows as an array, (m, d)."""


@dataclass(frozen=True)
class Curve:
    """How well heads of one kind restore what was left out."""

    kind: Kind
    """The kind of head."""
    at: tuple[float, ...]
    """Temperatures, or numbers of images, that were tried."""
    one_out: tuple[float, ...]
    """Share of the values' variance restored where one image is left out."""
    block_out: tuple[float, ...]
    """Share restored where all images of a block are left out."""

    @property
    def chosen(self) -> Head:
        """Returns the head with the best mean of both."""
        return Head(self.kind, self.at[int(np.argmax(np.add(self.one_out, self.block_out)))])

    @property
    def told(self) -> dict[str, Any]:
        """Returns the curve as the card of a database tells it, with what it chose."""
        return asdict(self) | {"chosen": str(self.chosen)}


def curves(
    queries: Queries,
    keys: Rows,
    values: Rows,
    locations: Float,
    weights: Float | None = None,
    within: NDArray[np.bool_] | None = None,
    block_degrees: float = BLOCK_DEGREES,
) -> list[Curve]:
    """Measures every head of TRIED on a database.

    Args:
        queries: Unit location embeddings of the images' places, (n, d); those of some rows are asked for.
        keys: Unit keys, (n, d), read in blocks.
        values: (n, v), read in blocks.
        locations: (n, 2) degrees (lon, lat).
        weights: How much each image counts, (n,): in the heads, and among those that are left out; unset, 1.
        within: Which images may be left out, (n,); unset, all. The others are there to restore them.
        block_degrees: Side of the blocks that are left out.

    Returns:
        A curve for each kind of head; none where there are fewer than LEAST images or one block alone.
    """
    count, blocks = len(locations), block_of(locations, block_degrees)
    may = np.arange(count) if within is None else np.flatnonzero(within)
    if len(may) < LEAST or len(np.unique(blocks[may])) < 2:
        return []
    wanted = _components(Projection.rotated(values, min(DIMS, *values.shape), weights=weights), values)
    asked = may[drawn(len(may), max(LEAST, min(ASKED, PAIRS // count)), None if weights is None else weights[may])]
    counts = np.ones(count) if weights is None else weights
    points = unit_vectors(locations)
    others = count - np.unique(blocks, return_counts=True)[1].max()  # images that are left where a block is out
    tried = {kind: tuple(at for at in every if kind != "nearest" or at <= others) for kind, every in TRIED.items()}
    lost = {kind: np.zeros((2, len(every))) for kind, every in tried.items()}
    for start in range(0, len(asked), rows := max(1, TOGETHER // count)):
        some = asked[start : start + rows]
        left_out = some[:, None] == np.arange(count), blocks[some][:, None] == blocks
        for kind, every in tried.items():
            if kind == "semantic":
                cosines = _products(queries[some], keys)
            else:
                cosines = points[some] @ points.T
            lost[kind] += [
                _lost(np.where(out, -np.inf, cosines), wanted, some, kind, every, counts) for out in left_out
            ]
    total = ((wanted[asked] - np.average(wanted, 0, weights)) ** 2).sum()
    shares = {kind: (1 - sums / total).round(4).tolist() for kind, sums in lost.items()}
    return [Curve(kind, tried[kind], *map(tuple, shares[kind])) for kind in tried]


def _components(projection: Projection, values: Rows) -> Float:
    """Returns the components of all values, (n, dims), reading block by block."""
    found = np.empty((values.shape[0], projection.components.shape[1]))
    for start in range(0, len(found), BLOCK):
        rows = slice(start, start + BLOCK)
        found[rows] = projection.apply(values[rows])
    return found


def _products(queries: NDArray[np.float32], keys: Rows) -> Float:
    """Returns the cosines of some queries with all keys, (m, n), reading block by block."""
    blocks = (slice(start, start + BLOCK) for start in range(0, keys.shape[0], BLOCK))
    products = [queries.astype(np.float64) @ np.asarray(keys[rows], np.float64).T for rows in blocks]
    return np.concatenate(products, axis=1)


def drawn(count: int, most: int, weights: Float | None) -> NDArray[np.int64]:
    """Draws `most` of so many images, or all if fewer, the same at each call; likelier the more an image counts."""
    rng = np.random.default_rng(0)
    if weights is None or (weights == 1).all():
        return rng.permutation(count)[:most]
    return np.argsort(rng.exponential(size=count) / weights)[:most]  # Efraimidis and Spirakis (2006)


def _lost(
    cosines: Float, wanted: Float, asked: NDArray[np.int64], kind: Kind, tried: tuple[float, ...], counts: Float
) -> Float:
    """Returns the squared errors of heads at images, summed, for each number tried.

    Args:
        cosines: Of the images' places or embeddings with all images, (m, n); -inf for those that are left out.
        wanted: Values, (n, v).
        asked: Rows of the m images.
        kind: Kind of the heads.
        tried: Numbers of the heads.
        counts: How much each image counts, (n,).
    """
    kernels = (kernel * counts for kernel in _weights(cosines, kind, tried))
    told = (weights @ wanted / weights.sum(1, keepdims=True) for weights in kernels)
    return np.array([((wanted[asked] - found) ** 2).sum() for found in told])


def _weights(cosines: Float, kind: Kind, tried: tuple[float, ...]) -> Iterator[Float]:
    """Yields the kernels of images by their cosines, (m, n), -inf for those that are left out."""
    excess = cosines - cosines.max(1, keepdims=True)
    if kind == "nearest":
        most = int(max(tried))
        nearest = -np.sort(np.partition(-cosines, most - 1, axis=1)[:, :most], axis=1)
    for at in tried:
        if kind == "nearest":
            yield np.exp(excess / np.maximum(2 - 2 * nearest[:, int(at) - 1 : int(at)], np.finfo(np.float64).tiny))
        else:
            yield np.exp(at * excess)
