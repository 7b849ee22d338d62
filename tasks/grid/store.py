"""Stores the grid as a sharded Zarr v3 that plain xarray opens. The template below is the contract.

================ ===================== ======= ======================================================
variable         dims                  dtype   meaning
================ ===================== ======= ======================================================
embedding        embedding, lat, lon   float32 visual part (the retrieved values), then location part
                                       float16 (the unit location embedding), then those of other encoders, if
                                               any; NaN: no land, no data
block            embedding             string  `visual` or `location`, of each dimension; of heads side by side
                                               the head in place of `visual`; the name of another encoder
lat              lat                   float64 cell centres, degrees north, from north to south
lon              lon                   float64 cell centres, degrees east, from west to east
spatial_ref                            int64   no value; its attributes are the CRS
effective_images lat, lon              float32 with evidence: exp of the entropy of the weights
largest_weight   lat, lon              float32 with evidence: 1 where one image has all the weight
distance_km      lat, lon              float32 with evidence: to the nearest image of the database
components       value, compact        float32 of a compact grid: principal components, so that
                                               embedding[:compact] @ components.T + mean restores the values;
                                               these are coordinates, in grids of earlier versions variables
mean             value                 float32 of a compact grid: mean of the values
deviation        value                 float32 of heads side by side, whose components are rotated and of values
                                               divided by it: head @ components.T * deviation**2 + mean
location_components  query, location   float32 of a projected location part, with its mean `location_mean`
================ ===================== ======= ======================================================

A grid in a projected CRS has the dimensions and coordinates `y` and `x`, in metres, in place of `lat` and `lon`.

A grid of int8 has, in place of `embedding`, the two variables `visual` and `location`, each with its own
`scale_factor` and `add_offset`, and -128 for no data: xarray decodes them by itself.

Where sums are kept for updates, `sums.zarr` lies beside the grid. It has the same tiles and one variable `sums`,
(sum, y, x) float32: for each head of the retrieval numerators, denominator and shift (`tasks.core.sums`).

One shard holds all dimensions of one tile and is written with one PUT. The shard of a land tile is the completion
marker of the tile. Where a tile has shards in several variables, the one written last is the marker. Where there is no
land, an empty shard is written after all others (`tasks.grid.seas`); grids of earlier versions have no shard there.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from infra import storage
from infra.addresses import shown
from infra.errors import UserError
from tasks import arrays
from tasks.cards import GRID, home_of, whole_of
from tasks.core.compact import Compact, Projection
from tasks.core.earth.grid import CHUNK_CELLS, GridSpec, Tile, check_tile
from tasks.core.earth.region import Region
from tasks.core.quantize import NODATA_CODE, DType, Scale, half
from tasks.grid import conventions
from tasks.grid.leading import scaled

VARIABLE = "embedding"
BLOCKS = ("visual", "location")
SUMS = "sums"
PROJECTIONS = ("components", "mean", "deviation", "location_components", "location_mean")
EVIDENCE = {
    "effective_images": "effective number of images, exp of the entropy of their weights",
    "largest_weight": "largest weight of an image",
    "distance_km": "great-circle distance to the nearest image",
}
CHUNK_DIMS = 256  # dimensions of a chunk, 0.4 MB with its cells: measured quickest for the reads in docs/grid.md
SHARD_BYTES = 50e6  # least bytes of a shard before compression, by which a tile's size is chosen
TILE_CELLS, MOST_CELLS = 60, 480  # cells along a side: a chosen tile is a multiple of the first, at most the second
MOST_TILE = 1024  # most cells along one side of a tile in a grid that is read
ROOT = "zarr.json"  # object of a group's metadata, with that of all arrays


@dataclass(frozen=True)
class Content:
    """The variables of a grid."""

    visual: int
    """Dimensions of the retrieved part."""
    location: int
    """Dimensions of the location part."""
    dtype: DType = "float32"
    """How a number is stored."""
    scales: dict[str, Scale] = field(default_factory=dict)
    """Scale of each block, for int8."""
    evidence: bool = False
    """Whether the grid has the layers of evidence."""
    heads: tuple[str, ...] = ()
    """Names of the heads that the retrieved part is made of, side by side; none where they are mixed."""
    beside: dict[str, int] = field(default_factory=dict)
    """Dimensions of each part that is another encoder's."""

    @property
    def parts(self) -> dict[str, int]:
        """Returns the length of each part of a vector that a reader may want alone, in order."""
        visual = dict.fromkeys(self.heads, self.visual // len(self.heads)) if self.heads else {"visual": self.visual}
        return visual | {"location": self.location} | self.beside


def tile_cells(dims: int, dtype: DType) -> int:
    """Returns the side in cells of a tile whose shard has SHARD_BYTES or somewhat more before compression."""
    side = np.sqrt(SHARD_BYTES / (dims * np.dtype(dtype).itemsize))
    return int(min(np.ceil(side / TILE_CELLS) * TILE_CELLS, MOST_CELLS))


def template(spec: GridSpec, content: Content, attrs: dict[str, Any], compact: Compact = Compact()) -> xr.Dataset:
    """Returns the empty grid: coordinates, attributes and lazily empty variables.

    Args:
        spec: The grid.
        content: The variables.
        attrs: Attributes to add: provenance, attribution.
        compact: The projections of a compact grid.
    """
    dataset = xr.merge([_embedding(spec, content), *_evidence(spec, content)], compat="override")
    own = conventions.embedding(spec, content.parts, content.dtype)
    attrs = conventions.declared(conventions.placed(spec) | own, conventions.GEOEMB) | attrs
    if compact.values:
        attrs["rangegrid:explained_variance"] = round(compact.values.explained, 6)
    dataset = dataset.assign_coords(
        _projections(compact)
    )  # no variables: tools that clip or warp expect these to have cells
    return dataset.assign_attrs(attrs)


def _projections(compact: Compact) -> dict[str, Any]:
    """Returns the projections as coordinates."""
    found: dict[str, Any] = {}
    if compact.values:
        found["components"] = ("value_dim", "compact_dim"), compact.values.components
        found["mean"] = "value_dim", compact.values.mean
        if compact.values.deviation is not None:
            found["deviation"] = "value_dim", compact.values.deviation
    if compact.location:
        found["location_components"] = ("query_dim", "location_dim"), compact.location.components
        found["location_mean"] = "query_dim", compact.location.mean
    return found


def _embedding(spec: GridSpec, content: Content) -> xr.Dataset:
    sizes = dict(zip(BLOCKS, (content.visual, content.location), strict=True))
    about = {"units": "1"}
    if content.scales:
        parts = [
            _empty(spec, name, f"{name}_dim", size, {"long_name": f"{name} part of the RANGE embedding"} | about)
            for name, size in sizes.items()
        ]
        for name, part in zip(BLOCKS, parts, strict=True):
            scale = content.scales[name]
            part[name].encoding = {
                "dtype": "int8",
                "scale_factor": scale.factor,
                "add_offset": scale.offset,
                "_FillValue": np.int8(NODATA_CODE),
            }
        return xr.merge(parts, compat="override")
    dims = sum(content.parts.values())
    found = _empty(spec, VARIABLE, "embedding_dim", dims, {"long_name": "RANGE embedding"} | about)
    found[VARIABLE].encoding = {"dtype": content.dtype, "_FillValue": np.dtype(content.dtype).type(np.nan)}
    names = np.repeat(np.array(list(content.parts), dtype=object), list(content.parts.values()))
    return found.assign_coords(block=("embedding_dim", names, {"long_name": "part of the embedding"}))


def _evidence(spec: GridSpec, content: Content) -> Iterator[xr.Dataset]:
    for name, meaning in EVIDENCE.items() if content.evidence else ():
        units = "km" if name == "distance_km" else "1"
        yield _empty(spec, name, "", 0, {"long_name": meaning, "units": units})


def level_url(grid: str, level: int) -> str:
    """Returns the URL of a coarser level's Zarr: beside the grid's, or in grids of earlier versions within it."""
    within = storage.join(grid, f"x{2**level}")
    if storage.exists(storage.join(within, ROOT)):
        return within
    return storage.join(home_of(grid), f"x{2**level}.zarr")


def level_urls(grid: str) -> list[str]:
    """Returns the URLs of the coarser levels that lie beside a grid."""
    home = home_of(grid)
    return [storage.join(home, name) for name in storage.names(home) if re.fullmatch(r"x\d+\.zarr", name)]


def create_levels(grid: str, spec: GridSpec, content: Content, attrs: dict[str, Any], levels: int) -> None:
    """Writes the metadata of a grid's coarser levels, with its embedding alone and the same provenance."""
    for level in range(1, levels + 1):
        spec = spec.coarser
        create(level_url(grid, level), spec, template(spec, replace(content, evidence=False), attrs))


def create_tree(grid: str, levels: int) -> None:
    """Makes a grid and its coarser levels children of one Zarr group, the directory that they lie in.

    They lie side by side, since xarray requires a child to have the dimensions of its parent.
    """
    home, spec, names = home_of(grid), open_spec(grid), [GRID]
    names += [level_url(grid, level).rpartition("/")[2] for level in range(1, levels + 1)]
    metadata: dict[str, Any] = {}
    for name in names:
        node = storage.read_json(storage.join(home, name, ROOT))
        inner = node.pop("consolidated_metadata")["metadata"]
        metadata[name] = node
        metadata |= {f"{name}/{path}": array for path, array in inner.items()}
    listed = {"kind": "inline", "must_understand": False, "metadata": metadata}
    root = {"zarr_format": 3, "node_type": "group", "attributes": conventions.multiscale(spec, names)}
    storage.write_json(storage.join(home, ROOT), root | {"consolidated_metadata": listed})


def sums_template(spec: GridSpec, values: int, heads: int, attrs: dict[str, Any]) -> xr.Dataset:
    """Returns the empty sums of a grid: for each head the numerators, then denominator and shift."""
    return _empty(spec, SUMS, "sum", heads * (values + 2), {}).assign_attrs(attrs)


def _empty(spec: GridSpec, name: str, dim: str, size: int, attrs: dict[str, str]) -> xr.Dataset:
    """Returns an empty variable of (dim, y, x), or of (y, x) where `dim` has no name."""
    import dask.array  # here, since what reads grids needs no Dask

    leading = {dim: size} if dim else {}
    dims, shape = (*leading, *spec.plane.dims), tuple(leading.values())
    data = dask.array.full((*shape, *spec.shape), np.nan, dtype="float32", chunks=(*shape, spec.tile, spec.tile))
    coords = conventions.axes(spec)
    if dim:
        coords[dim] = (dim, np.arange(size, dtype=np.int32))
    return xr.Dataset({name: (dims, data, attrs | {"grid_mapping": conventions.GRID_MAPPING})}, coords=coords)


def create(url: str, spec: GridSpec, dataset: xr.Dataset) -> None:
    """Writes the metadata and the coordinates of a template, but no values of cells.

    Writes object by object, the root last. A run that overlaps writes the same bytes, and no shard is touched.

    Args:
        url: URL of the Zarr.
        spec: The grid.
        dataset: The template.
    """
    files: dict[str, Buffer] = {}
    store = MemoryStore(files)
    cells = {str(name): array for name, array in dataset.items() if spec.plane.dims[0] in array.dims}
    encoding: dict[str, Any] = {str(name): {"compressors": arrays.packed()} for name in dataset.variables}
    encoding |= {name: _stored(spec, array) for name, array in cells.items()}
    every = zarr.config.set({"array.write_empty_chunks": True})  # coordinates whole: a 403 is no fill value to readers
    with warnings.catch_warnings(), every:
        warnings.filterwarnings("ignore", "Consolidated metadata")
        dataset.to_zarr(store, mode="w", compute=False, zarr_format=3, consolidated=False, encoding=encoding)
        zarr.consolidate_metadata(store)
    for name in sorted(files, key=lambda name: (name == ROOT, name)):
        storage.write(storage.join(url, name), files[name].to_bytes())


def _stored(spec: GridSpec, array: xr.DataArray) -> dict[str, Any]:
    """Returns how a variable is stored: chunks, shards, compression, and the fill value of missing shards."""
    chunk = min(CHUNK_CELLS, spec.tile)
    try:
        check_tile(spec.tile)
    except ValueError as error:
        raise UserError(str(error)) from None
    missing = array.encoding.get("_FillValue", np.float32(np.nan))
    packed = arrays.packed(BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"))  # docs/grid.md compares others
    stored = {"compressors": packed, "_FillValue": missing, "fill_value": missing}
    if array.ndim == 2:
        return stored | {"chunks": (spec.tile, spec.tile), "shards": (spec.tile, spec.tile)}
    dims = array.shape[0]
    depth = min(CHUNK_DIMS, dims)
    shard = (-(-dims // depth) * depth, spec.tile, spec.tile)
    return array.encoding | stored | {"chunks": (depth, chunk, chunk), "shards": shard}


def write_tile(url: str, tile: Tile, values: NDArray[np.float32], variable: str = VARIABLE) -> None:
    """Writes one tile, (dim, rows, columns) or (rows, columns), as one whole shard of each variable that holds it.

    Raises:
        UserError: The tile is not one whole shard of the stored grid, or a value is too large for the grid's dtype.
    """
    start = 0
    for array in _arrays(url, variable, "r+"):
        _check_whole(array, tile)
        if array.ndim == 3:
            part = values[start : start + array.shape[0]]
        else:
            part = values
        start += len(part)
        array[(..., *tile.window)] = _encoded(array, part, tile)


def _check_whole(array: zarr.Array, tile: Tile) -> None:
    side = array.shards[-1]
    expected = tuple(min(side, n - start) for n, start in zip(array.shape[-2:], (tile.row, tile.column), strict=True))
    if (tile.row % side, tile.column % side) != (0, 0) or (tile.rows, tile.columns) != expected:
        raise UserError(
            f"tile {tile} of {tile.rows} x {tile.columns} cells is not one whole shard of {side} x {side}: "
            "two workers could write the same shard. Use the grid's own tiles"
        )


def _encoded(array: zarr.Array, values: NDArray[np.float32], tile: Tile) -> NDArray:
    """Returns the values in the array's dtype."""
    if array.dtype == np.int8:
        return _scale(array).encode(values)
    try:
        if array.dtype == np.float16:
            return half(values)
        return values
    except OverflowError as error:
        raise UserError(f"tile {tile}: {error}. Publish with --dtype float32 or int8") from None


def _scale(array: zarr.Array) -> Scale:
    return Scale(array.attrs["scale_factor"], array.attrs["add_offset"])


def _arrays(url: str, variable: str, mode: Any) -> list[zarr.Array]:
    """Opens the arrays that hold a variable: its own, or the two blocks of an embedding in int8."""
    group = zarr.open_group(storage.zarr_store(url), mode=mode, zarr_format=3)
    return [group[name] for name in ((variable,) if variable in group else BLOCKS)]


def written(url: str, spec: GridSpec, tiles: list[Tile]) -> set[Tile]:
    """Returns the tiles that were written, by their completion markers."""
    marker = _arrays(url, VARIABLE, "r")[-1].basename
    rows: dict[int, set[str]] = {}
    for i in {tile.row // spec.tile for tile in tiles}:
        rows[i] = set(storage.names(storage.join(url, marker, "c", "0", str(i))))
    return {tile for tile in tiles if str(tile.column // spec.tile) in rows[tile.row // spec.tile]}


@dataclass(frozen=True)
class Vectors:
    """The embeddings of a stored grid as one array, (dim, y, x) float32, whatever their dtype; read on access."""

    arrays: tuple[zarr.Array, ...]
    """One array, or one per block."""
    scale: NDArray[np.float32] | None = None
    """Of a compact product (`tasks.grid.companion`), the scale of each dimension, (dim,)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns (dim, y, x)."""
        return sum(array.shape[0] for array in self.arrays), *self.arrays[0].shape[1:]

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        """Reads one dimension, `vectors[0]`, or all dimensions of a window, `vectors[:, rows, columns]`."""
        if self.scale is not None:
            which = index[0] if isinstance(index, tuple) else index
            return scaled(arrays.read(self.arrays[0], index), self.scale if which is ... else self.scale[which])
        if isinstance(index, int | np.integer):
            for array in self.arrays[:-1]:
                if index < array.shape[0]:
                    return _decoded(array, int(index))
                index -= array.shape[0]
            return _decoded(self.arrays[-1], int(index))
        return np.concatenate([_decoded(array, index) for array in self.arrays])

    def at(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float64]:
        """Reads the vectors of some cells, (n, dim)."""
        return np.stack([self[:, i, j] for i, j in zip(rows, columns, strict=True)]).astype(np.float64)


def open_vectors(url: str, variable: str = VARIABLE) -> Vectors:
    """Opens the embeddings of the grid at `url`, or a layer of its evidence."""
    found = tuple(_arrays(url, variable, "r"))
    return Vectors(found, scale_of(url) if variable == VARIABLE and found[0].dtype == np.int8 else None)


def scale_of(url: str) -> NDArray[np.float32] | None:
    """Returns the scale of each dimension of a compact product, None for a grid of another kind."""
    group = zarr.open_group(storage.zarr_store(url), mode="r", zarr_format=3)
    return arrays.read(group["scale"], ...) if "scale" in group else None


def open_spec(url: str) -> GridSpec:
    """Returns the cells of the grid at `url`, from its metadata."""
    (array, *_), attrs = _arrays(url, VARIABLE, "r"), attributes(url)
    sides = array.shards or array.chunks  # of a compact product, chunks
    if max(sides[1:]) > MOST_TILE:
        raise UserError(f"{shown(url)} says that its tiles have {sides[-1]:,} cells a side: none of ours has so many")
    spec = conventions.spec_of(attrs, array.shape[-1], sides[-1])
    return spec_at(home_of(whole_of(url)), spec, is_cut="region" in attrs.get("rangegrid:made_of", {}))


def attributes(url: str) -> Mapping[str, Any]:
    """Returns the attributes of the grid at `url`."""
    return zarr.open_group(storage.zarr_store(url), mode="r", zarr_format=3).attrs


def spec_at(home: str, spec: GridSpec, *, is_cut: bool) -> GridSpec:
    """Returns the cells of a grid, cut to the region that is kept beside it if it is cut."""
    if is_cut:
        return replace(spec, region=region_beside(home))
    return spec


@lru_cache(maxsize=4)
def region_beside(home: str) -> Region:
    """Reads the region beside a grid, once per process."""
    from tasks.tables.regions import kept_region  # here, since grids without a region need no tables

    return kept_region(home)


def _decoded(array: zarr.Array, index: Any) -> NDArray[np.float32]:
    values = arrays.read(array, index)
    if array.dtype == np.int8:
        return _scale(array).decode(values)
    return values.astype(np.float32, copy=False)


def storing(url: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Returns a function from vectors, (n, dim), to what readers would get of them from the grid at `url`."""
    stored = _arrays(url, VARIABLE, "r")
    edges = np.cumsum([array.shape[0] for array in stored])[:-1]

    def kept(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = zip(stored, np.split(vectors, edges, axis=1), strict=True)
        return np.concatenate([_kept(array, part) for array, part in parts], axis=1)

    return kept


def _kept(array: zarr.Array, part: NDArray[np.float32]) -> NDArray[np.float32]:
    if array.dtype == np.int8:
        return _scale(array).decode(_scale(array).encode(part))
    return part.astype(array.dtype).astype("f4")


def read_tile(url: str, tile: Tile, variable: str = VARIABLE) -> NDArray[np.float32]:
    """Reads one tile, (dim, rows, columns), or (rows, columns) of a layer of evidence."""
    return Vectors(tuple(_arrays(url, variable, "r")))[(..., *tile.window)]


def read_compact(url: str) -> Compact:
    """Reads the projections of a grid, as far as it has them."""
    group = zarr.open_group(storage.zarr_store(url), mode="r")
    found = {name: arrays.read(group[name], ...) for name in PROJECTIONS if name in group}
    values, location = None, None
    if "components" in found:
        explained = group.attrs["rangegrid:explained_variance"]
        values = Projection(found["mean"], found["components"], explained, found.get("deviation"))
    if "location_components" in found:
        location = Projection(found["location_mean"], found["location_components"], 1.0)
    return Compact(values, location)
