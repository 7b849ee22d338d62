"""Gives the points of R2, a sequence of low discrepancy in the unit square: all of a range, or those in a box.

The points of a range are part of a lattice in the three dimensions of number, x and y. By a basis of short vectors
those in a box are found at a cost that grows with their number, not with the range's.
"""

from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

# 2**64 over the plastic number 1.32471795724474602596 and over its square: the steps of R2, a point sequence of low
# discrepancy (Roberts 2018), in 2**-64 of a side. Whole numbers wrap where they should, so the n-th point is within
# n * 2**-64 of the true one, 5.5e-12 of the hundred millionth; n * step in float64 would be off by 1e-8 there.
STEPS = np.array([0xC13FA9A902A6328F, 0x91E10DA5C79E7B1D], np.uint64)
ONE = 1 << 64  # a side of the unit square, in the unit of STEPS
ROUNDING = 1e-9  # sides of the unit square by which a box is widened before its points are looked at exactly

Box = tuple[float, float, float, float]


def recurrence(start: int, count: int, shift: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Returns some points of R2 in the unit square: the n-th lies at shift + n * `STEPS`, modulo 1.

    Args:
        start: Number of the first point.
        count: Number of points.
        shift: (2,) in 2**-64 of a side.

    Returns:
        (count, 2), at least 0 and below 1.
    """
    return _points(np.arange(start, start + count, dtype=np.uint64), shift)


def _points(numbers: NDArray[np.uint64], shift: NDArray[np.uint64]) -> NDArray[np.float64]:
    turns = numbers[:, None] * STEPS + shift  # modulo 2**64
    return np.ldexp((turns >> np.uint64(11)).astype(np.float64), -53)  # 53 bits, which float64 holds exactly


def recurrence_in(start: int, count: int, shift: NDArray[np.uint64], box: Box) -> NDArray[np.float64]:
    """Returns the points of `recurrence` that lie in a box, in their order.

    Args:
        start: Number of the first point.
        count: Number of points in the whole square.
        shift: (2,) in 2**-64 of a side.
        box: Left, low, right and high side in the unit square; right is beyond 1 where the box goes on from the left.

    Returns:
        (n, 2), at least 0 and below 1.
    """
    left, low, right, high = box
    first = _points(np.array([start], np.uint64), shift)[0]
    sides = np.array([count, right - left + 2 * ROUNDING, high - low + 2 * ROUNDING])
    corner = np.array([0, left - ROUNDING - first[0], low - ROUNDING - first[1]]) / sides
    numbers, basis = _short_basis(sides)
    ends = np.array(list(product(*zip(corner, corner + 1, strict=True)))) @ np.linalg.inv(basis)
    spans = [np.arange(np.floor(a), np.ceil(b) + 1) for a, b in zip(ends.min(0), ends.max(0), strict=True)]
    times = np.stack(np.meshgrid(*spans, indexing="ij"), axis=-1).reshape(-1, 3)
    near = (np.abs(times @ basis - corner - 0.5) <= 0.5 + ROUNDING).all(1)
    found = times[near].astype(np.int64) @ numbers
    found = np.unique(found[(found >= 0) & (found < count)]).astype(np.uint64)
    points = _points(found + np.uint64(start), shift)
    inside = (points[:, 1] >= low) & (points[:, 1] < high)
    if right - left < 1:
        inside &= (points[:, 0] - left) % 1 < right - left
    return points[inside]


def _short_basis(sides: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns three short vectors that span the lattice: their numbers of points, (3,), and themselves, (3, 3).

    Args:
        sides: The box, in numbers, x and y, in whose sides the vectors are measured.
    """
    exact = [[1, int(STEPS[0]), int(STEPS[1])], [0, ONE, 0], [0, 0, ONE]]
    unit = sides * [1, float(ONE), float(ONE)]
    changed = True
    while changed:
        changed = False
        for i, j in permutations(range(3), 2):
            one, other = (np.array(exact[k], np.float64) / unit for k in (i, j))
            times = int(np.rint(one @ other / (other @ other)))
            if times and (one - times * other) @ (one - times * other) < (one @ one) * (1 - ROUNDING):
                exact[i] = [a - times * b for a, b in zip(exact[i], exact[j], strict=True)]
                changed = True
    return np.array([vector[0] for vector in exact]), np.array(exact, np.float64) / unit
