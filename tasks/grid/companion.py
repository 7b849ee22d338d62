"""Makes the compact product of a grid, `compact.zarr` beside it: the leading components of its vectors in int8.

It is what most readers download, and what the explorer's page reads; all of it is derived from the grid. A Zarr group
whose root is written last, with all metadata in it; those of the older format 2 lie beside them (`older_zarr`).

=============== ================== ======= ====================================================================
variable        dims               dtype   meaning
=============== ================== ======= ====================================================================
embedding       component, y, x    int8    384 components of all parts, or as many as there are; any prefix is good,
                                           64 for pictures and likeness, 128 for classes; -128: no data
scale           component          float32 value of a component = code * scale
kept            component          float32 share of the variance of land that the components up to this one keep
axes, mean      dim, component     float32 (vector of the grid - mean) @ axes are the components
evidence        layer, y, x        float32 of a grid with evidence: distance_km, effective_images; NaN: no data
beta             leading, y, x      int8    of a RANGE+ grid with kept sums: what each of the first 64 components gains
                                           where beta is larger by 1 (`tasks.grid.halves`); -128: no data
beta_scale       leading            float32 value of that = code * beta_scale
x2, x4, ...                                groups of an `embedding` (and a `beta`) of half the rows and columns each, of
                                           means
lonlat                                     of a projected grid: all of it again in degrees, for maps of the world;
                                           each cell has the nearest cell of the grid
=============== ================== ======= ====================================================================

The cells are the grid's. Chunks of 64 components of 120 x 120 cells are plain objects, so that the first components of
the world at half a degree are 18 requests and no server needs to know ranges. They are packed by gzip, which has a
CRC32, which browsers unpack by themselves and GDAL reads, and all are there, at sea too: no object that is asked
for is ever missing.
"""

import gzip
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.codecs import GzipCodec
from zarr.storage import MemoryStore

from infra import storage
from tasks import arrays
from tasks.cards import COMPACT, home_of
from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.quantize import NODATA_CODE
from tasks.grid import conventions, halves, levels, store
from tasks.grid.halves import Halves
from tasks.grid.leading import BLOCKS, CELLS, Leading, pooled
from tasks.grid.levels import Level, pyramids
from tasks.grid.older_zarr import older
from tasks.grid.previews import land_sample
from tasks.units import run_units

if TYPE_CHECKING:  # who reads companions needs no Dask
    from distributed import Client

COMPONENTS = 384  # at most: docs/grid.md tells what fewer cost
DEPTH = 64  # components of a chunk: the page's likeness takes the first, its classes two
LAYERS = ("distance_km", "effective_images")  # of evidence
EVIDENCE, BETA = "evidence", "beta"
DIMENSION = {store.VARIABLE: "component", BETA: "leading", EVIDENCE: "layer"}  # the first of each array of cells
FITTED = ("mean", "axes", "scale", "kept")
TOLD = ("attribution", "license", "rangegrid:fingerprint", "rangegrid:made_of", "rangegrid:field", "rangegrid:datetime")
OF_VECTORS = ("geoemb:blocks", "geoemb:dimensions_axis")  # of the grid, which do not hold for components
PREFIXES = (32, 64, 128, 256, 384)  # numbers of components of which the attributes tell the share of variance
LEVEL = 6  # of gzip
PLAIN: Any = {  # readable as format 2 too
    "compressors": (GzipCodec(level=LEVEL),),
    "chunk_key_encoding": {"name": "v2", "separator": "/"},
}
Small = tuple[tuple[str, ...], NDArray, dict[str, Any]]  # dimensions, values and attributes of an array of one chunk


def publish_companion(client: "Client", grid: str, url: str | None = None) -> str:
    """Makes the compact product of a complete grid, unless it is there, and resumes what an earlier run began.

    Args:
        client: The Dask cluster. A unit holds the vectors of one chunk, 120 x 120 cells.
        grid: URL of the grid's Zarr.
        url: Where the product goes; unset, beside the grid.

    Returns:
        The URL of the product.
    """
    url = url or companion_url(grid)
    if storage.exists(storage.join(url, store.ROOT)):
        return url
    spec, attrs = store.open_spec(grid), dict(store.attributes(grid))
    there, found = storage.names(grid), pyramids(spec)
    leading = _leading(grid, url, spec, attrs)
    mixed = Halves.of(grid, url, attrs, leading, DEPTH)
    source = Source(grid, url, leading, [name for name in LAYERS if name in there], mixed)
    files = template(source, spec, found, attrs)
    last = {name: files.pop(name) for name in sorted(files, key=lambda name: name == store.ROOT) if "/" not in name}
    for name in sorted(files):  # of the root's arrays `scale` comes last
        storage.write(storage.join(url, name), files[name])
    for finest, *coarser in found:
        _fill(client, source, finest, partial(project_chunk, source, finest))
        for before, level in pairwise([finest, *coarser]):
            _fill(client, source, level, partial(average_chunk, source, before, level))
    for name, data in last.items():
        storage.write(storage.join(url, name), data)
    return url


@dataclass(frozen=True)
class Source:
    """What every chunk of a product needs; small, so that it can travel to the workers with each unit."""

    grid: str
    """URL of the grid's Zarr."""
    url: str
    """URL of the product."""
    leading: Leading
    """The components."""
    evidence: list[str]
    """Layers of evidence that the grid has."""
    halves: Halves | None = None
    """The halves that beta mixes, where their sums were kept."""

    @property
    def coded(self) -> dict[str, Leading]:
        """Returns the arrays of codes of every level; that whose chunks are completion markers is the last."""
        slopes = {BETA: self.halves.slope} if self.halves else {}
        return slopes | {store.VARIABLE: self.leading}

    @property
    def blocks(self) -> int:
        """Returns the number of chunks that hold all components of some cells."""
        return -(-len(self.leading.scale) // DEPTH)


def _leading(grid: str, url: str, spec: GridSpec, attrs: dict[str, Any]) -> Leading:
    """Returns the components that an earlier run began with, an update's its parent's, or those of a sample."""
    if storage.exists(storage.join(url, "scale", store.ROOT)):
        return open_leading(url)
    if parent := attrs.get("rangegrid:made_of", {}).get("parent"):
        before = storage.join(home_of(grid).rpartition("/")[0], parent, COMPACT)
        if storage.exists(storage.join(before, store.ROOT)):
            return open_leading(before)  # so that a model of the parent's components is one of these
    return Leading.fit(land_sample(store.open_vectors(grid), spec, BLOCKS, CELLS), parts_of(attrs), COMPONENTS)


def open_leading(url: str) -> Leading:
    """Reads the components of a product."""
    arrays_of = {
        name: zarr.open_array(storage.zarr_store(storage.join(url, name)), mode="r", zarr_format=3) for name in FITTED
    }
    return Leading(**{name: arrays.read(array, ...) for name, array in arrays_of.items()})


def storing(url: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Returns a function from a grid's vectors, (n, dim), to what readers get of them from the Zarr at `url`: the grid
    or its compact product."""
    if store.scale_of(url) is None:
        return store.storing(url)
    leading = open_leading(url)
    return lambda vectors: leading.decode(leading.encode(vectors.T)).T


def companion_url(grid: str) -> str:
    """Returns the URL of the compact product beside a grid."""
    return storage.join(home_of(grid), COMPACT)


def parts_of(attrs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns begin and end of the parts of a grid's vectors that count alike, each dimension in one: heads together.

    With each head a part of its own, 256 components of the demo's product score .007 less over held-out blocks.
    """
    blocks = _blocks(attrs)
    _, end = blocks["visual"]
    return {name: edges for name, edges in blocks.items() if name == "visual" or edges[1] > end}


def told_apart(attrs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns begin and end of the parts of a grid's vectors, each dimension in one: heads in place of `visual`."""
    blocks = _blocks(attrs)
    heads = [name for name, (_, stop) in blocks.items() if name != "visual" and stop <= blocks["visual"][1]]
    return {name: edges for name, edges in blocks.items() if name != "visual" or not heads}


def _blocks(attrs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (int(start), int(stop)) for name, (start, stop) in attrs["geoemb:blocks"].items()}


def _fill(client: "Client", source: Source, level: Level, make: Any) -> None:
    """Makes the chunks of a level that are not there; the last components of a chunk are its completion marker."""
    marker = storage.join(source.url, level.within(store.VARIABLE, str(source.blocks - 1)))
    rows = {row: set(storage.names(storage.join(marker, str(row)))) for row in range(-(-level.rows // levels.CHUNK))}
    every = level.tiles()
    left = [tile for tile in every if str(tile.column // levels.CHUNK) not in rows[tile.row // levels.CHUNK]]
    run_units(client, make, left, label=f"compact {level.path or 'product'}", there=len(every) - len(left))


def project_chunk(source: Source, level: Level, tile: Tile) -> None:
    """Makes a chunk of the finest level from the grid's vectors."""
    look = _Window.of(store.open_spec(source.grid), level, tile)
    if source.evidence:
        layers = [look.read(store.open_vectors(source.grid, name)) for name in source.evidence]
        _write(storage.join(source.url, level.within(EVIDENCE, "0")), tile, np.stack(layers))
    if source.halves:
        slopes = source.halves.encode(look.read(store.open_vectors(source.halves.sums, store.SUMS)))
        _write_codes(source.url, level, tile, slopes, BETA)
    codes = source.leading.encode(look.read(store.open_vectors(source.grid)))
    _write_codes(source.url, level, tile, codes)


@dataclass(frozen=True)
class _Window:
    """The cells of a grid that a chunk of the product shows."""

    rows: slice
    """Rows to read."""
    columns: slice
    """Columns to read."""
    at: tuple[NDArray[np.intp], NDArray[np.intp]] | None = None
    """Row and column of each of the chunk's cells in what is read, negative where there is none; none: one to one."""

    @classmethod
    def of(cls, spec: GridSpec, level: Level, tile: Tile) -> "_Window":
        if not level.pyramid:
            return cls(*tile.window)
        (west, _, _, north), (rows, columns) = spec.box, spec.shape
        x, y = np.moveaxis(spec.plane.xy(level.centres(tile)), -1, 0)
        with np.errstate(invalid="ignore"):
            i, j = np.floor((north - y) / spec.sides[1] * rows), np.floor((x - west) / spec.sides[0] * columns)
            inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
        if not inside.any():
            return cls(slice(0, 0), slice(0, 0), (np.full(i.shape, -1), np.full(i.shape, -1)))
        first, last = (int(i[inside].min()), int(j[inside].min())), (int(i[inside].max()), int(j[inside].max()))
        at = [np.where(inside, n - start, -1).astype(int) for n, start in zip((i, j), first, strict=True)]
        return cls(slice(first[0], last[0] + 1), slice(first[1], last[1] + 1), (at[0], at[1]))

    def read(self, source: Any) -> NDArray[np.float32]:
        """Reads (..., rows, columns) of the chunk; NaN where the grid has no cell."""
        if self.at is None:
            return source[..., self.rows, self.columns]
        missing = self.at[0] < 0
        if missing.all():
            return np.full((*source.shape[:-2], *missing.shape), np.nan, np.float32)
        found = source[..., self.rows, self.columns][..., self.at[0], self.at[1]]
        return np.where(missing, np.float32(np.nan), found)


def average_chunk(source: Source, before: Level, level: Level, tile: Tile) -> None:
    """Makes a chunk of a level from the cells that it covers in the level before."""
    rows, columns = (slice(2 * part.start, 2 * part.stop) for part in tile.window)
    for name in source.coded:
        codes = arrays.read(open_codes(source.url, before, name), (slice(None), rows, columns))
        _write_codes(source.url, level, tile, pooled(codes), name)


def open_codes(url: str, level: Level, name: str = store.VARIABLE) -> zarr.Array:
    """Opens the codes of a level, (component, y, x) int8."""
    return zarr.open_array(storage.zarr_store(storage.join(url, level.within(name))), mode="r", zarr_format=3)


def _write_codes(url: str, level: Level, tile: Tile, codes: NDArray[np.int8], name: str = store.VARIABLE) -> None:
    for block, start in enumerate(range(0, len(codes), DEPTH)):
        whole = np.full((DEPTH, *codes.shape[1:]), NODATA_CODE, np.int8)
        part = codes[start : start + DEPTH]
        whole[: len(part)] = part
        _write(storage.join(url, level.within(name, str(block))), tile, whole)


def _write(place: str, tile: Tile, values: NDArray) -> None:
    """Writes a whole chunk."""
    side = levels.CHUNK
    missing = NODATA_CODE if values.dtype == np.int8 else np.nan
    whole = np.full((len(values), side, side), missing, values.dtype)
    whole[:, : tile.rows, : tile.columns] = values
    storage.write(storage.join(place, str(tile.row // side), str(tile.column // side)), _packed(whole))


def _packed(values: NDArray) -> bytes:
    """Packs a whole chunk; Zarr's own gzip would write the time into it, and a rerun must write the same bytes."""
    return gzip.compress(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes(), LEVEL, mtime=0)


def template(source: Source, spec: GridSpec, found: list[list[Level]], attrs: dict[str, Any]) -> dict[str, bytes]:
    """Returns the objects of a product but for its chunks, by name: metadata, places of the cells, components."""
    files: dict[str, Buffer] = {}
    root = zarr.open_group(MemoryStore(files), mode="w", attributes=_described(source, spec, attrs))
    small = _fitted(source)
    for pyramid in found:
        for level in pyramid:
            group = root.require_group(level.path) if level.path else root
            small |= _axes(level)
            for name, fitted in source.coded.items():
                _create(group, name, level, len(fitted.scale), _about(level, name))
            if level is pyramid[0]:
                group.attrs.update(_layout(pyramid))
            if level is pyramid[0] and source.evidence:
                _create(group, EVIDENCE, level, len(source.evidence), {"grid_mapping": conventions.GRID_MAPPING})
    for name, (dims, values, told) in small.items():
        about: Any = {"dimension_names": dims, "attributes": told, **PLAIN}
        root.create_array(name, shape=values.shape, chunks=values.shape, dtype=values.dtype, **about)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata")
        zarr.consolidate_metadata(MemoryStore(files))
    made = {name: data.to_bytes() for name, data in files.items()}
    chunks = {"/".join([name, *["0"] * (values.ndim or 1)]): _packed(values) for name, (_, values, _) in small.items()}
    return made | older(made) | chunks


def _described(source: Source, spec: GridSpec, attrs: dict[str, Any]) -> dict[str, Any]:
    """Returns the root's attributes: as a grid's, how to decode, and what the page tells."""
    told = {name: attrs[name] for name in TOLD if name in attrs}
    told |= {name: value for name, value in attrs.items() if name.startswith("geoemb:") and name not in OF_VECTORS}
    scale = {"type": "array", "array_name": "scale", "nodata": NODATA_CODE}
    about = {"method": "linear per component", "original_dtype": "float32", "quantized_dtype": "int8", "scale": scale}
    kept = source.leading.kept
    told |= {
        "coordinates": "axes mean",  # no variables: tools that clip or warp expect these to have cells
        "geoemb:dimensions": len(kept),
        "geoemb:data_type": "int8",
        "geoemb:dimensions_axis": "component",
        "geoemb:quantization": about,
        "rangegrid:evidence": source.evidence,
        "rangegrid:parts": told_apart(attrs),
        "rangegrid:kept": {str(n): round(float(kept[n - 1]), 4) for n in PREFIXES if n <= len(kept)},
    }
    if source.halves:
        told["rangegrid:beta"] = source.halves.beta
    if not spec.plane.has_lonlat:
        told["rangegrid:shown"] = levels.SHOWN  # the group of the levels in degrees
    return conventions.declared(conventions.placed(spec), conventions.GEOEMB, conventions.MULTISCALES) | told


def _layout(pyramid: list[Level]) -> dict[str, Any]:
    """Returns the levels as the convention of multiscales lists them."""
    layout = [
        {"asset": level.asset, "spatial:shape": [level.rows, level.columns], "spatial:transform": level.transform}
        for level in pyramid
    ]
    crs = {"proj:code" if pyramid[0].plane.code else "proj:wkt2": pyramid[0].plane.name}
    return crs | {"multiscales": {"layout": layout, "resampling_method": "average"}}


def _about(level: Level, name: str) -> dict[str, Any]:
    """Returns the attributes of the components of a level, or of their slopes."""
    known = {
        store.VARIABLE: ("scale kept ", "leading components of the embedding"),
        BETA: (f"{halves.SCALE} ", "what the leading components gain where beta is larger by 1"),
    }
    beside, meaning = known[name]
    return {
        "long_name": meaning,
        "units": "1",
        "grid_mapping": conventions.GRID_MAPPING,
        "coordinates": ("" if level.path else beside) + conventions.GRID_MAPPING,
        "_FillValue": NODATA_CODE,
    }


def _fitted(source: Source) -> dict[str, Small]:
    """Returns the components' own arrays, by name."""
    dims = {"scale": ("component",), "kept": ("component",), "axes": ("dim", "component"), "mean": ("dim",)}
    slopes: dict[str, Small] = {}
    if source.halves:
        slopes[halves.SCALE] = ((DIMENSION[BETA],), source.halves.slope.scale, {})
    return slopes | {name: (dims[name], getattr(source.leading, name), {}) for name in FITTED}


def _axes(level: Level) -> dict[str, Small]:
    """Returns the coordinates of a level's cells, by path."""
    found = conventions.referenced(level.plane, level.y, level.x, level.transform)
    return {
        level.within(name): (tuple(np.atleast_1d(dims)), np.asarray(values), told)
        for name, (dims, values, told) in found.items()
    }


def _create(group: zarr.Group, name: str, level: Level, depth: int, told: dict[str, Any]) -> None:
    """Writes the metadata of an array of cells: of codes, or of layers of evidence."""
    coded = name != EVIDENCE
    about: Any = {"dtype": np.int8, "fill_value": NODATA_CODE} if coded else {"dtype": np.float32, "fill_value": np.nan}
    group.create_array(
        name,
        shape=(depth, level.rows, level.columns),
        chunks=(DEPTH if coded else depth, levels.CHUNK, levels.CHUNK),
        attributes=told,
        dimension_names=(DIMENSION[name], *level.plane.dims),
        **about | PLAIN,
    )
