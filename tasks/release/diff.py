"""Compares two versions of a grid: which cells moved, by how much, and where.

Both are read tile by tile on Dask, and each tile returns two numbers a cell. Drift is measured at a few cells, the
canaries, which are the same in all versions of a grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from tasks.cards import name_of
from tasks.core.earth.grid import GridSpec, Tile
from tasks.grid import store
from tasks.grid.tiles import land_tiles
from tasks.plots.maps import change_map
from tasks.release.validation import blocks, chosen
from tasks.units import run_units

MOVED = 1e-4  # relative change from which a cell counts as moved: two exact computations may differ by less
CANARIES = "canaries"  # seed of the cells whose drift is measured; no version's name, so that they are the same in all
QUANTILES = (0.5, 0.9, 0.99, 1.0)
TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Difference:
    """The difference between two versions of a grid."""

    change: NDArray[np.float32]
    """(y, x) length of the difference, relative to the older vector's; NaN where one of them has no vector."""
    cosine: NDArray[np.float32]
    """(y, x) cosine of the two vectors."""
    appeared: int
    """Number of cells with a vector in the newer grid alone."""
    vanished: int
    """Number of cells with a vector in the older grid alone."""

    def numbers(self, moved: float = MOVED) -> dict[str, Any]:
        """Returns the difference in a few numbers: counts, and quantiles over the cells that both have."""
        known = np.isfinite(self.change)
        change, cosine = self.change[known].astype(np.float64), self.cosine[known].astype(np.float64)
        return {
            "cells": int(known.sum()),
            "moved": int((change > moved).sum()),
            "appeared": self.appeared,
            "vanished": self.vanished,
            "relative_change": dict(_quantiles(change)),
            "cosine": {f"{1 - float(q):g}": value for q, value in _quantiles(cosine, falling=True)},
        }


def _quantiles(values: NDArray[np.float64], falling: bool = False) -> Iterator[tuple[str, float]]:
    for q in QUANTILES if len(values) else ():
        yield f"{q:g}", float(np.quantile(values, 1 - q if falling else q))


def diff(client: Client, old: str, new: str) -> Difference:
    """Compares two versions of the same grid.

    Args:
        client: The Dask cluster.
        old: URL of the older Zarr.
        new: URL of the newer Zarr.

    Raises:
        UserError: Their cells or their dimensions are not the same.
    """
    spec = same_cells(old, new)
    tiles = land_tiles(spec)
    change, cosine = (np.full(spec.shape, np.nan, np.float32) for _ in range(2))
    appeared = vanished = 0
    parts = run_units(client, partial(compare_tile, old, new), tiles, label="diff")
    for tile, (moved, turned, came, went) in zip(tiles, parts, strict=True):
        change[tile.window], cosine[tile.window] = moved, turned
        appeared, vanished = appeared + came, vanished + went
    return Difference(change, cosine, appeared, vanished)


def same_cells(old: str, new: str) -> GridSpec:
    """Returns the grid that both are on.

    Raises:
        UserError: They are on different ones, or have vectors of different length.
    """
    specs = [store.open_spec(grid) for grid in (old, new)]
    before, after = (
        f"{store.open_vectors(grid).shape} over {spec.box} in {spec.crs}"
        for grid, spec in zip((old, new), specs, strict=True)
    )
    if before != after:
        raise UserError(f"{old} is {before} and {new} is {after}: only vectors of the same cells can be compared")
    return replace(max(specs, key=lambda spec: spec.tile), land="any")  # which has the land of either rule


def compare_tile(old: str, new: str, tile: Tile) -> tuple[NDArray[np.float32], NDArray[np.float32], int, int]:
    """Returns relative change and cosine of a tile's cells, and how many appeared and vanished."""
    before, after = store.read_tile(old, tile), store.read_tile(new, tile)
    there, now = np.isfinite(before).all(0), np.isfinite(after).all(0)
    change = np.linalg.norm(after - before, axis=0) / np.maximum(np.linalg.norm(before, axis=0), TINY)
    return change, cosine(before, after), int((now & ~there).sum()), int((there & ~now).sum())


def cosine(before: NDArray, after: NDArray) -> NDArray:
    """Returns the cosines of vectors along the first axis; 0 where a vector is zero."""
    lengths = np.linalg.norm(before, axis=0) * np.linalg.norm(after, axis=0)
    return (before * after).sum(0) / np.maximum(lengths, TINY)


def drift(old: str, new: str) -> dict[str, float]:
    """Returns the drift from one version of a grid to another: 1 - cosine of the canaries, for each part of a vector.

    Returns:
        `visual_mean`, `visual_max`, `location_mean` and `location_max`: 0 is the same direction, 1 a right angle. The
        two parts are told apart because the visual one is longer, and would hide that the location part turned.

    Raises:
        UserError: The two have other cells, other dimensions, or no canary in common.
    """
    rows, columns = chosen(same_cells(old, new), CANARIES)
    before, after = (store.open_vectors(grid).at(rows, columns) for grid in (old, new))
    both = np.isfinite(before + after).all(1)
    if not both.any():
        raise UserError(f"{old} and {new} have no vector in common at {len(rows)} places: compare with `grid diff`")
    found: dict[str, float] = {}
    for name, part in blocks(new).items():
        turned = 1 - cosine(before[both, slice(*part)].T, after[both, slice(*part)].T)
        found |= {f"{name}_mean": float(turned.mean()), f"{name}_max": float(turned.max())}
    return found


def keep(difference: Difference, old: str, new: str, output: str) -> str:
    """Writes the relative change as a map, PNG, to a path or URL, and returns its URL."""
    names = [name_of(grid) for grid in (old, new)]
    numbers, url = difference.numbers(), storage.as_url(output)
    title = f"Change from {names[0]} to {names[1]}"
    caption = f"{numbers['moved']:,} of {numbers['cells']:,} cells moved by more than {MOVED:g} of their length."
    picture = change_map(difference.change, store.open_spec(new), title, caption)
    storage.write(url, picture)
    return url
