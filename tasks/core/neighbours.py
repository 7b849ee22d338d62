"""Sums a sharp geodesic head over the few images that matter, found by a search tree, within a proved bound.

Take chords c_j = |x - x_j| on the unit sphere, the nearest image's c_1, and weights w_j exp(-t c_j^2 / 2), where w_j is
how much image j counts, 1 by default, and W the sum of all w_j. (exp(t x.x_j) is exp(-t c^2 / 2) up to a factor, since
c^2 = 2 - 2 x.x_j.) Relative to the nearest image, each image j beyond the radius r,

    r^2 = c_1^2 + 2 ln(W / (w_1 EPSILON)) / t

weighs less than EPSILON w_j / W, so all of them together less than EPSILON of what is kept. With kept sums (A, a) and
the sums left out (B, b), the selection (A + B) / (a + b) differs from A / a by b / (a + b) * (B / b - A / a): in each
dimension by less than EPSILON times the range of the values, and a by less than EPSILON of itself.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional

from tasks.core.sums import Sums

EPSILON = 1e-8  # largest share of the weight that is left out; float32 rounds to 6e-8
FIRST, GROWTH = 32, 4  # nearest images looked at first, and times as many where these do not reach the radius
WORTH = 16  # times as dear is an image by the tree as one of a matrix product
DENSER = 4.0  # images lie on land, 0.29 of the sphere: so much denser about a place than on average
LEAST_CHORD = 1e-9  # of the unit sphere, 6 mm: the smallest bandwidth, where images lie one upon another
PAIRS = 4_000_000  # places times images looked at together: 64 MB of chords and rows

Float = NDArray[np.float64]


def pays(temperatures: Float, images: int) -> bool:
    """Tells whether so few images matter at most places that the tree costs less than matrix products over all."""
    if not len(temperatures) or not np.median(temperatures) > 0:
        return False
    share = reach(np.median(temperatures), images) / 4  # a cap of chord c has c^2 / 4 of the sphere
    return WORTH * max(FIRST, DENSER * share * images) <= images


def reach(temperatures: Any, images: Any) -> Any:
    """Returns by how much the square of the radius is above the square of the chord to the nearest image.

    Args:
        temperatures: t.
        images: How many times the nearest image all together count: their number where each counts 1.
    """
    return 2 * np.log(images / EPSILON) / temperatures


def reaching(tree: cKDTree, points: Float, k: int) -> Float:
    """Returns the temperatures whose bandwidth is the chord to the k-th nearest image, (m,).

    Where there are fewer images, it is the chord to the last; where that is 0, the nearest image has all the weight.

    Args:
        tree: The images' places as points of the unit sphere.
        points: Places as points of the unit sphere, (m, 3).
        k: Number of the image, from 1.
    """
    chords, _ = tree.query(points, k=[min(k, tree.n)])
    return np.maximum(chords[:, 0], LEAST_CHORD) ** -2.0


def sums_near(
    tree: cKDTree,
    values: Tensor,
    points: Float,
    temperatures: Float,
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> tuple[Sums, NDArray[np.bool_]]:
    """Sums a geodesic head, with weights exp(t x.x_j), over the images that matter.

    Args:
        tree: The images' places as points of the unit sphere.
        values: (n, v).
        points: Places as points of the unit sphere, (m, 3).
        temperatures: t of each place, (m,).
        dtype: Of the sums.
        weights: How much each image counts, (n,); unset, 1.

    Returns:
        The sums, and at which places too many images matter, (m,): there they are 0, to be summed over all images.
    """
    numerator = values.new_zeros(len(points), values.shape[1], dtype=dtype)
    sums = Sums(numerator, numerator.new_zeros(len(points)), numerator.new_zeros(len(points), dtype=torch.float64))
    counts = np.ones(tree.n) if weights is None else weights.double().cpu().numpy()
    left, k = np.arange(len(points)), FIRST
    while len(left) and WORTH * k <= tree.n:
        size = max(1, PAIRS // k)
        parts = [left[start : start + size] for start in range(0, len(left), size)]
        left = np.concatenate([_add(sums, tree, values, points, temperatures, counts, rows, k) for rows in parts])
        k *= GROWTH
    far = np.zeros(len(points), bool)
    far[left] = True
    return sums, far


def _add(
    sums: Sums,
    tree: cKDTree,
    values: Tensor,
    points: Float,
    temperatures: Float,
    counts: Float,
    rows: NDArray[np.int64],
    k: int,
) -> NDArray[np.int64]:
    """Sums over the k nearest images of some places, and returns those for which they do not reach far enough."""
    chords, found = tree.query(points[rows], k=np.arange(1, k + 1))
    squares, t = chords**2, temperatures[rows]
    is_enough = squares[:, -1] >= squares[:, 0] + reach(t, counts.sum() / counts[found[:, 0]])
    done, squares, t, found = rows[is_enough], squares[is_enough], t[is_enough], found[is_enough]
    kernel = np.exp(-t[:, None] * (squares - squares[:, :1]) / 2) * counts[found]
    weights = torch.from_numpy(kernel).to(sums.numerator)
    where = torch.from_numpy(done).to(values.device)
    sums.numerator[where] = weighted(weights, torch.from_numpy(found).to(values.device), values)
    sums.denominator[where] = weights.sum(1)
    sums.shift[where] = torch.from_numpy(t * (1 - squares[:, 0] / 2)).to(values.device)
    return rows[~is_enough]


def weighted(weights: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Returns the weighted sums of some values each, (m, v).

    Args:
        weights: (m, k).
        rows: (m, k) rows of the values.
        values: (n, v).
    """
    if values.dtype != weights.dtype:
        values = values.to(weights.dtype)
    return functional.embedding_bag(rows, values, per_sample_weights=weights, mode="sum")
