"""Retrieves on grids: evaluates few nodes, interpolates, and checks random cells before it delivers a tile.

The visual part is an analytic function of the place (harmonics, sines, exponentials), and so are projections where
they are used: its interpolation at Chebyshev nodes of the grid's plane converges exponentially. On tiles of some
degrees 8 x 8 nodes stand for thousands of cells, and 24 x 24 reach float32's rounding. How many a tile needs is found,
not assumed: nodes are added until two checks agree.
Random cells of the tile, evaluated exactly, are all within MARGIN of the error asked for; and at every cell, what the
highest degrees of the interpolant contribute (the error of one with fewer nodes, which is the larger) is within it.
A tile that will not converge is evaluated cell by cell.

The first check is independent of any theory: of a tile where a share s of the cells is beyond the margin, it passes
(1 - s)^CHECKS: 5 % at s = 0.03. The second sees every cell, and can err only where the series does not fall.
The location part is cheap and always exact.

Source: Trefethen, Approximation Theory and Approximation Practice (2013), chapters 5 and 8.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.core.earth.plane import Plane
from tasks.core.retrieval import Encodes, Method, RetrievalIndex

FIRST_NODES = 9  # nodes along one side in the first attempt
CHECKS = 100  # random cells of a tile that are evaluated exactly to check it
QUANTILE = 0.99  # share of a tile's cells that must be within the tolerance
WORTH = 0.5  # share of the cells; with more evaluations than that, evaluating every cell is better
HIGHEST = 2  # highest degrees along each side whose contribution the second check bounds
MARGIN = 0.5  # largest error at the checks, as a share of the tolerance, which is a 99th percentile

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """The cells of one tile that are wanted."""

    x: Float
    """(columns,) x in the plane's units, rising."""
    y: Float
    """(rows,) y in the plane's units."""
    wanted: NDArray[np.bool_]
    """(rows, columns) whether a cell is wanted."""
    plane: Plane
    """The plane of x and y."""

    @property
    def lonlat(self) -> Float:
        """Returns the wanted cells, (m, 2) in degrees, row by row."""
        rows, columns = np.nonzero(self.wanted)
        return self.plane.lonlat(np.column_stack([self.x[columns], self.y[rows]]))

    @property
    def cropped(self) -> "Cells":
        """Returns the cells without rows and columns in which no cell is wanted."""
        rows, columns = self.wanted.any(1), self.wanted.any(0)
        return Cells(self.x[columns], self.y[rows], self.wanted[np.ix_(rows, columns)], self.plane)


@dataclass(frozen=True)
class _Nodes:
    """Chebyshev nodes on a tile in its plane, with the matrices from values at nodes to values at cells."""

    places: Float
    """(n * n, 2) places of the nodes in degrees; NaN where the plane has no place."""
    down: NDArray[np.float32]
    """(rows, n) matrix from nodes to rows."""
    across: NDArray[np.float32]
    """(columns, n) matrix from nodes to columns."""

    @classmethod
    def over(cls, cells: Cells, n: int) -> "_Nodes":
        x, y = chebyshev(cells.x, n), chebyshev(cells.y, n)
        down, across = barycentric(cells.y, y), barycentric(cells.x, x)
        places = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        return cls(cells.plane.lonlat(places), down.astype(np.float32), across.astype(np.float32))

    def at(self, known: NDArray[np.float32], rows: NDArray, columns: NDArray) -> NDArray[np.float32]:
        """Interpolates single cells, (m, v)."""
        both = self.down[rows][:, :, None] * self.across[columns][:, None, :]
        return both.reshape(len(rows), len(known)) @ known

    def tail(self, known: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the contribution of the highest degrees at all cells, (rows, columns, v)."""
        n = self.across.shape[1]
        low = low_degrees(n, n - HIGHEST).astype(np.float32)
        square = known.reshape(n, n, -1)
        smooth = np.einsum("ij,jkv->ikv", low, low @ square, optimize=True)
        return self.everywhere((square - smooth).reshape(known.shape))

    def everywhere(self, known: NDArray[np.float32]) -> NDArray[np.float32]:
        """Interpolates all cells, (rows, columns, v), first along the columns, then along the rows."""
        n = self.across.shape[1]
        return self.across @ (self.down @ known.reshape(n, -1)).reshape(len(self.down), n, -1)


@dataclass(frozen=True)
class Report:
    """How a tile was made."""

    cells: int
    """Number of cells delivered."""
    evaluated: int
    """Number of places retrieved, with checks and with nodes that did not suffice."""
    nodes: int
    """Number of nodes along one side; 0 where every cell was evaluated."""
    error: float
    """Largest relative error at the checks, at most MARGIN of the tolerance; 0 where every cell was evaluated."""


def embed_cells(
    encoder: Encodes, index: RetrievalIndex, cells: Cells, method: Method, tolerance: float = 1e-3
) -> tuple[NDArray[np.float32], Report]:
    """Embeds a tile's wanted cells.

    Args:
        encoder: The location encoder.
        index: The database.
        cells: The tile.
        method: How to retrieve; a soft one, since hard ones jump and are evaluated cell by cell.
        tolerance: Largest 99th percentile of |error| / |visual part| of a cell; 0 evaluates every cell.

    Returns:
        (m, v + d) visual, then location part, and how they were made. The same tile gives the same numbers.
    """
    places, cells = cells.lonlat, cells.cropped
    queries = encoder.embed(places)
    location, spent = index.location_part(queries), 0
    if tolerance:
        visual, report = _interpolated(encoder, index, cells, method, tolerance)
        if visual is not None:
            return np.concatenate([visual, location], axis=1), report
        spent = report.evaluated
    visual = index.retrieve(queries, places, method)
    return np.concatenate([visual, location], axis=1), Report(len(places), spent + len(places), 0, 0.0)


def _interpolated(
    encoder: Encodes, index: RetrievalIndex, cells: Cells, method: Method, tolerance: float
) -> tuple[NDArray[np.float32] | None, Report]:
    """Returns the visual part, or None where no number of nodes that pays reaches the tolerance."""
    places, goal, count = cells.lonlat, MARGIN * tolerance, int(cells.wanted.sum())
    checks = np.random.default_rng(0).permutation(count)[:CHECKS]
    rows, columns = (along[checks] for along in np.nonzero(cells.wanted))
    exact: NDArray[np.float32] | None = None
    spent, tried, n = len(checks), [], FIRST_NODES
    while spent + n**2 <= count * WORTH:
        nodes = _Nodes.over(cells, n)
        if not np.isfinite(nodes.places).all():  # the tile reaches beyond the plane's domain
            break
        if exact is None:  # with the first nodes: a pass over the database costs the same for some more places
            both = _visual(encoder, index, np.concatenate([places[checks], nodes.places]), method)
            exact, known = both[: len(checks)], both[len(checks) :]
        else:
            known = _visual(encoder, index, nodes.places, method)
        spent += n**2
        error = float(relative_error(nodes.at(known, rows, columns), exact).max())
        if error <= goal:
            visual = nodes.everywhere(known)[cells.wanted]
            error = max(error, beyond(nodes.tail(known)[cells.wanted], visual) * MARGIN)
            if error <= goal:
                return visual, Report(count, spent, n, error)
        tried.append((n, error))
        n = _more(tried, goal)
    return None, Report(0, spent if tried else 0, 0, 0.0)


def _visual(encoder: Encodes, index: RetrievalIndex, places: Float, method: Method) -> NDArray[np.float32]:
    return index.retrieve(encoder.embed(places), places, method)


def _more(tried: list[tuple[int, float]], goal: float) -> int:
    """Returns the number of nodes to try next, at which errors that fall exponentially reach the goal.

    Args:
        tried: Nodes and their errors, so far.
        goal: The error to reach.

    Returns:
        Twice as many as the last at most.
    """
    if len(tried) == 1:
        return FIRST_NODES * 3 // 2
    (before, worse), (nodes, error) = tried[-2:]
    rate = np.log(worse / error) / (nodes - before)
    needed = np.ceil(np.log(error / goal) / rate) if rate > 0 else np.inf
    return nodes + int(np.clip(needed, 2, nodes))


def relative_error(found: NDArray[np.float32], exact: NDArray[np.float32]) -> Float:
    """Returns |error| / |exact| of each row."""
    scale = np.maximum(np.linalg.norm(exact, axis=1), np.finfo(np.float32).tiny)
    return np.linalg.norm(found - exact, axis=1) / scale


def beyond(tail: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Returns the 99th percentile of the tail's relative size."""
    return float(np.quantile(relative_error(found - tail, found), QUANTILE))


def low_degrees(nodes: int, kept: int) -> Float:
    """Returns the matrix (nodes, nodes) from values at Chebyshev nodes to their series below degree `kept`."""
    waves = np.cos(np.pi * np.arange(kept)[:, None] * (np.arange(nodes) + 0.5) / nodes)
    return waves.T @ (waves * np.where(np.arange(kept) > 0, 2, 1)[:, None]) / nodes


def chebyshev(cells: Float, nodes: int) -> Float:
    """Returns Chebyshev nodes of the first kind on the span of the cell centres."""
    low, high = cells.min(), cells.max()
    unit = np.cos(np.pi * (np.arange(nodes) + 0.5) / nodes)
    return (low + high) / 2 + max(high - low, 1e-6) / 2 * unit  # one cell has no span: any will do


def barycentric(at: Float, nodes: Float) -> Float:
    """Returns the matrix (len(at), len(nodes)) that interpolates from values at Chebyshev nodes."""
    n = len(nodes)
    weights = (-1.0) ** np.arange(n) * np.sin(np.pi * (np.arange(n) + 0.5) / n)
    gap = at[:, None] - nodes
    on_node = gap == 0
    matrix = weights / np.where(on_node, 1, gap)
    matrix /= matrix.sum(1, keepdims=True)
    return np.where(on_node.any(1)[:, None], on_node, matrix)
