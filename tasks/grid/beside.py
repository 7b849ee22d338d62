"""Embeds the cells of a grid by other projects' encoders, for blocks that it carries beside its own."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from infra.packages import data_file
from tasks.model.geoclip import DIM, WEIGHTS, embed_geoclip

ENCODERS: dict[str, tuple[int, Callable[[NDArray[np.float64]], NDArray[np.float32]]]] = {
    "geoclip": (DIM, embed_geoclip),
}  # dimensions and encoder of each block


def dims_beside(names: Sequence[str]) -> dict[str, int]:
    """Returns the dimensions of each block."""
    return {name: ENCODERS[name][0] for name in names}


def check_beside(names: Sequence[str]) -> None:
    """Refuses, before any work, a block whose weights are not installed."""
    if "geoclip" in names:
        data_file("geoclip", WEIGHTS)


def embed_beside(names: Sequence[str], lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
    """Returns the blocks side by side, (n, dims), for places in degrees, (n, 2)."""
    return np.concatenate([np.empty((len(lonlat), 0), np.float32), *(ENCODERS[name][1](lonlat) for name in names)], 1)
