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
WORTH = 16  # times as dear is an image by the tree as one of a matrix product
DENSER = 4.0  # images lie on land, 0.29 of the sphere: so much denser about a place than on average
LEAST_CHORD = 1e-9  # of the unit sphere, 6 mm: the smallest bandwidth, where images lie one upon another
ROUNDING = 1e-9  # by which a radius is larger, so that the nearest image is within it
PAIRS = 1_000_000  # places times images looked at together: 64 MB of rows as Python's integers, and their weights

Float = NDArray[np.float64]


def pays(temperatures: Float, images: int) -> bool:
    """Tells whether so few images matter at most places that the tree costs less than matrix products over all."""
    if not len(temperatures) or not np.median(temperatures) > 0:
        return False
    share = reach(np.median(temperatures), images) / 4  # a cap of chord c has c^2 / 4 of the sphere
    return WORTH * max(1, DENSER * share * images) <= images


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
    nearest, first = tree.query(points)
    radii = np.sqrt(nearest**2 + reach(temperatures, counts.sum() / counts[first])) * (1 + ROUNDING)
    images = tree.query_ball_point(points, radii, return_length=True)
    is_few = WORTH * images <= tree.n
    few = np.flatnonzero(is_few)
    for rows in np.split(few, np.flatnonzero(np.diff(np.cumsum(images[few]) // PAIRS)) + 1):
        if len(rows):
            within = tree.query_ball_point(points[rows], radii[rows], return_sorted=False)
            found, length = np.concatenate(within).astype(np.int64), np.array([len(each) for each in within])
            apart = tree.data[found] - points[rows].repeat(length, axis=0)
            beyond = np.maximum(np.einsum("ij,ij->i", apart, apart) - (nearest[rows] ** 2).repeat(length), 0)
            kernel = np.exp(-temperatures[rows].repeat(length) * beyond / 2) * counts[found]
            _put(sums, torch.from_numpy(rows).to(values.device), values, found, kernel, np.cumsum(length) - length)
    sums.shift.copy_(torch.from_numpy(np.where(is_few, temperatures * (1 - nearest**2 / 2), 0)))
    return sums, ~is_few


def _put(
    sums: Sums, rows: Tensor, values: Tensor, found: NDArray[np.int64], kernel: Float, starts: NDArray[np.int64]
) -> None:
    """Writes the weighted sums of some values each to rows of the sums.

    Args:
        sums: Where to.
        rows: (r,).
        values: (n, v).
        found: Rows of the values, one row's after the other's, (p,).
        kernel: Their weights, (p,).
        starts: Where each row's begin, (r,).
    """
    weights, table = torch.from_numpy(kernel).to(sums.numerator), values.to(sums.numerator.dtype)
    which, offsets = (torch.from_numpy(array).to(values.device) for array in (found, starts))
    sums.numerator[rows] = functional.embedding_bag(which, table, offsets, mode="sum", per_sample_weights=weights)
    sums.denominator[rows] = torch.from_numpy(np.add.reduceat(kernel, starts)).to(sums.denominator)
