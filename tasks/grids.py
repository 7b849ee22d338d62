"""The stored grid: a sharded Zarr v3 that plain xarray opens. The template below is the contract.

========== ===================== ======= ======================================================
variable   dims                  dtype   meaning
========== ===================== ======= ======================================================
embedding  embedding, lat, lon   float32 visual part (the retrieved values), then location part
                                         (the unit location embedding); NaN: no land, no data
lat        lat                   float64 cell centres, degrees north, from north to south
lon        lon                   float64 cell centres, degrees east, from west to east
components value, compact        float32 of a compact grid: orthonormal principal components, so that
                                         embedding[:compact] @ components.T + mean restores the values
mean       value                 float32 of a compact grid: what was subtracted from the values
========== ===================== ======= ======================================================

Beside it, where they are kept for updates, `sums.zarr`: the same tiles of one variable `sums`, (sum, lat, lon) float32,
of which each half of the retrieval has numerators, denominator and shift (`tasks.core.sums`).

One shard holds all dimensions of one tile and is written with one PUT; a tile without land has no shard. So
the presence of a shard is the record of its work.
"""

import warnings
from typing import Any

import dask.array
import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from infra import storage
from infra.errors import UserError
from tasks.core.compact import Projection
from tasks.core.grid import GridSpec, Tile

VARIABLE = "embedding"
SUMS = "sums"
CHUNK_CELLS = 20  # cells along one side of a chunk: one point reads all its dimensions from 1.6 MB
CHUNK_DIMS = 64
ROOT = "zarr.json"  # of the group, with the metadata of all arrays


def template(
    spec: GridSpec, visual: int, location: int, attrs: dict[str, Any], projection: Projection | None = None
) -> xr.Dataset:
    """The empty grid: coordinates, attributes and a lazily empty variable.

    Args:
        spec: The grid.
        visual: Dimensions of the retrieved part.
        location: Dimensions of the location part.
        attrs: Attributes to add: provenance, attribution.
        projection: What made the retrieved part compact.
    """
    dims = visual + location
    dataset = _empty(spec, VARIABLE, "embedding_dim", dims, {"long_name": "RANGE embedding", "units": "1"})
    blocks = {"visual": [0, visual], "location": [visual, dims]}
    attrs = _conventions(spec) | {"geoemb:blocks": blocks} | attrs
    if projection is not None:
        dataset["components"] = ("value_dim", "compact_dim"), projection.components
        dataset["mean"] = "value_dim", projection.mean
        attrs["rangegrid:explained_variance"] = round(projection.explained, 6)
    return dataset.assign_attrs(attrs)


def sums_template(spec: GridSpec, visual: int, halves: int, attrs: dict[str, Any]) -> xr.Dataset:
    """The empty sums of a grid: for each half the numerators, then denominator and shift."""
    return _empty(spec, SUMS, "sum", halves * (visual + 2), {}).assign_attrs(attrs)


def _empty(spec: GridSpec, name: str, dim: str, size: int, attrs: dict[str, str]) -> xr.Dataset:
    data = dask.array.full((size, *spec.shape), np.nan, dtype="float32", chunks=(size, spec.tile, spec.tile))
    return xr.Dataset(
        {name: ((dim, "lat", "lon"), data, attrs)},
        coords={
            "lat": ("lat", spec.lat, {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"}),
            "lon": ("lon", spec.lon, {"standard_name": "longitude", "units": "degrees_east", "axis": "X"}),
        },
    )


def _conventions(spec: GridSpec) -> dict[str, Any]:
    rows, columns = spec.shape
    height, width = 180 / rows, 360 / columns
    return {
        "Conventions": "CF-1.11",
        "geoemb:dimensions_axis": "embedding_dim",
        "proj:code": "EPSG:4326",
        "spatial:dimensions": ["lat", "lon"],
        "spatial:bbox": [-180.0, -90.0, 180.0, 90.0],
        "spatial:shape": [rows, columns],
        "spatial:transform": [width, 0.0, -180.0, 0.0, -height, 90.0],
        "spatial:registration": "pixel",
    }


def create(url: str, spec: GridSpec, dataset: xr.Dataset) -> None:
    """Writes the metadata and the coordinates of a template; no values of its cells.

    Object by object, the root last: a run that overlaps writes the same bytes, and no shard is touched that it made.
    """
    variable = VARIABLE if VARIABLE in dataset else SUMS
    dims = dataset[variable].shape[0]
    chunk = min(CHUNK_CELLS, spec.tile)
    if spec.tile % chunk:
        raise UserError(
            f"tile size {spec.tile} is not a multiple of the chunk of {chunk} cells: two chunks would share "
            f"a shard's edge. Use {chunk * max(1, spec.tile // chunk)} or {chunk * (spec.tile // chunk + 1)}"
        )
    depth = min(CHUNK_DIMS, dims)
    encoding = {
        "chunks": (depth, chunk, chunk),
        "shards": (-(-dims // depth) * depth, spec.tile, spec.tile),
        "compressors": ZstdCodec(level=1),
        "_FillValue": np.float32(np.nan),
    }
    files: dict[str, Buffer] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata")
        dataset.to_zarr(
            MemoryStore(files),
            mode="w",
            compute=False,
            zarr_format=3,
            consolidated=True,
            encoding={variable: encoding},
        )
    for name in sorted(files, key=lambda name: (name == ROOT, name)):
        storage.write(storage.join(url, name), files[name].to_bytes())


def write_tile(url: str, tile: Tile, values: NDArray[np.float32], variable: str = VARIABLE) -> None:
    """Writes one tile, (dim, rows, columns), as one whole shard.

    Raises:
        UserError: The tile is not one whole shard of the stored grid.
    """
    array = zarr.open_array(storage.zarr_store(storage.join(url, variable)), mode="r+", zarr_format=3)
    side = array.shards[1]
    expected = tuple(min(side, n - start) for n, start in zip(array.shape[1:], (tile.row, tile.column), strict=True))
    if (tile.row % side, tile.column % side) != (0, 0) or (tile.rows, tile.columns) != expected:
        raise UserError(
            f"tile {tile} of {tile.rows} x {tile.columns} cells is not one whole shard of {side} x {side}: "
            "two workers could write the same shard. Use the grid's own tiles"
        )
    array[(slice(None), *tile.window)] = values


def written(url: str, spec: GridSpec, tiles: list[Tile]) -> set[Tile]:
    """The tiles whose shards are there."""
    rows: dict[int, set[str]] = {}
    for i in {tile.row // spec.tile for tile in tiles}:
        rows[i] = set(storage.names(storage.join(url, VARIABLE, "c", "0", str(i))))
    return {tile for tile in tiles if str(tile.column // spec.tile) in rows[tile.row // spec.tile]}


def read_tile(url: str, tile: Tile, variable: str = VARIABLE) -> NDArray[np.float32]:
    """One tile, (dim, rows, columns)."""
    array = zarr.open_array(storage.zarr_store(storage.join(url, variable)), mode="r", zarr_format=3)
    return np.asarray(array[(slice(None), *tile.window)])


def read_projection(url: str) -> Projection:
    """What made the grid compact."""
    group = zarr.open_group(storage.zarr_store(url), mode="r")
    mean, components = (np.asarray(group[name]) for name in ("mean", "components"))
    return Projection(mean, components, group.attrs["rangegrid:explained_variance"])
