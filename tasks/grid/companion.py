"""Makes the companion of a grid, `explorer.zarr` beside it: what the explorer's page reads, small and in int8.

A Zarr group, whose root is written last, with all metadata in it. Its data are derived from the grid: a reader of the
grid needs none of them, and where the companion is missing nothing but the explorer's page misses it.

============== ================== ======= ==================================================================
variable       dims               dtype   meaning
============== ================== ======= ==================================================================
scale          component          float32 value of a component = code * scale
axes, mean     dim, component     float32 (vector of the grid - mean) @ axes are the components
x1/leading     component, y, x    int8    the first 64 components of all parts, by falling variance; -128: no data
x1/further     component, y, x    int8    the next 64
x1/evidence    layer, y, x        float32 of a grid with evidence: distance_km, effective_images; NaN: no data
x2, x4, ...    as of x1           int8    levels of half the rows and columns each, of means; no evidence
============== ================== ======= ==================================================================

Places are degrees of longitude and latitude, north up, whatever the grid's CRS: of a projected grid each cell of the
companion has the nearest cell of the grid. Chunks of 120 x 120 cells with all components are plain objects, so that
the world at half a degree is 18 requests and no server needs to know ranges. They are packed by gzip, which browsers
unpack by themselves, and all are there, at sea too: no object that is asked for is ever missing.
"""

import gzip
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.codecs import Crc32cCodec, GzipCodec
from zarr.storage import MemoryStore

from infra import storage
from tasks import arrays
from tasks.cards import home_of
from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.earth.plane import METRES_PER_DEGREE, WGS84
from tasks.core.quantize import NODATA_CODE
from tasks.grid import conventions, store
from tasks.grid.leading import Leading, pooled
from tasks.grid.previews import land_sample
from tasks.units import run_units

if TYPE_CHECKING:  # who reads companions needs no Dask
    from distributed import Client

NAME = "explorer.zarr"
COMPONENTS = 64  # of each of the two arrays: likeness takes the first, classes both
ARRAYS = ("leading", "further")
LAYERS = ("distance_km", "effective_images")  # of evidence
EVIDENCE = "evidence"
FITTED = ("mean", "axes", "scale")
TOLD = ("attribution", "license", "rangegrid:fingerprint", "rangegrid:made_of", "rangegrid:field", "geoemb:dimensions")
LEVEL = 6  # of gzip
CHUNK = 120  # cells along a side of a chunk
COARSEST = 240  # columns; a level with as many or fewer is the last: the first picture
BLOCKS, CELLS = 256, 100  # blocks of land and cells of each by which the components are found


@dataclass(frozen=True)
class Level:
    """The cells of one level, in degrees."""

    rows: int
    """Number of rows."""
    columns: int
    """Number of columns."""
    west: float
    """Western edge."""
    north: float
    """Northern edge."""
    wide: float
    """Width of a cell."""
    high: float
    """Height of a cell."""
    times: int = 1
    """Cells of the finest level along a side of one of its cells."""

    @classmethod
    def finest(cls, spec: GridSpec) -> "Level":
        """Returns the finest level of a grid: its own cells, or of a projected grid such of about their size."""
        if spec.plane.has_lonlat:
            (rows, columns), (wide, high), (west, _, _, north) = spec.shape, spec.sides, spec.box
            return cls(rows, columns, west, north, wide / columns, high / rows)
        west, south, east, north = spec.plane.bounds(spec.box)
        wide, high, side = (east - west) % 360 or 360.0, north - south, spec.step * spec.plane.metres
        rows, columns = (max(1, round(length * METRES_PER_DEGREE / side)) for length in (high, wide))
        return cls(rows, columns, west, north, wide / columns, high / rows)

    @property
    def name(self) -> str:
        """Returns the name of its group."""
        return f"x{self.times}"

    @property
    def coarser(self) -> "Level":
        """Returns the level with half the rows and columns, the odd ones beyond the edge."""
        shape = (-(-self.rows // 2), -(-self.columns // 2))
        return Level(*shape, self.west, self.north, 2 * self.wide, 2 * self.high, 2 * self.times)

    @property
    def transform(self) -> list[float]:
        """Returns the affine transform, as the convention `spatial:` has it."""
        return [self.wide, 0.0, self.west, 0.0, -self.high, self.north]

    def tiles(self) -> list[Tile]:
        """Returns its chunks."""
        return [
            Tile(row, column, min(CHUNK, self.rows - row), min(CHUNK, self.columns - column))
            for row in range(0, self.rows, CHUNK)
            for column in range(0, self.columns, CHUNK)
        ]

    def lonlat(self, tile: Tile) -> NDArray[np.float64]:
        """Returns the centres of a chunk's cells, (rows, columns, 2) in degrees (lon, lat)."""
        lon = self.west + (np.arange(tile.column, tile.column + tile.columns) + 0.5) * self.wide
        lat = self.north - (np.arange(tile.row, tile.row + tile.rows) + 0.5) * self.high
        return np.stack(np.meshgrid(lon, lat), axis=-1)


def levels(spec: GridSpec) -> Iterator[Level]:
    """Yields the levels of a grid's companion, the finest first."""
    level = Level.finest(spec)
    yield level
    while max(level.rows, level.columns) > COARSEST:
        level = level.coarser
        yield level


def publish_companion(client: "Client", grid: str, url: str | None = None) -> str:
    """Makes the companion of a complete grid, unless it is there, and resumes what an earlier run began.

    Args:
        client: The Dask cluster. A unit holds the vectors of one chunk, 120 x 120 cells.
        grid: URL of the grid's Zarr.
        url: Where the companion goes; unset, beside the grid.

    Returns:
        The URL of the companion.
    """
    url = url or companion_url(grid)
    if storage.exists(storage.join(url, store.ROOT)):
        return url
    spec, attrs = store.open_spec(grid), zarr.open_group(storage.zarr_store(grid), mode="r").attrs.asdict()
    there, found = storage.names(grid), list(levels(spec))
    source = Source(grid, url, _leading(grid, url, spec, attrs), [name for name in LAYERS if name in there])
    files = template(source, found, attrs)
    root = files.pop(store.ROOT)
    for name in sorted(files):  # of the root's arrays `scale` comes last
        storage.write(storage.join(url, name), files[name])
    _fill(client, url, found[0], partial(project_chunk, source, found[0]))
    for before, level in pairwise(found):
        _fill(client, url, level, partial(average_chunk, url, before, level))
    storage.write(storage.join(url, store.ROOT), root)
    return url


@dataclass(frozen=True)
class Source:
    """What every chunk of a companion needs; small, so that it can travel to the workers with each unit."""

    grid: str
    """URL of the grid's Zarr."""
    url: str
    """URL of the companion."""
    leading: Leading
    """The components."""
    evidence: list[str]
    """Layers of evidence that the grid has."""


def _leading(grid: str, url: str, spec: GridSpec, attrs: dict[str, Any]) -> Leading:
    """Returns the components that an earlier run began with, or those of a sample of the grid."""
    if storage.exists(storage.join(url, "scale", store.ROOT)):
        group = {name: zarr.open_array(storage.zarr_store(storage.join(url, name)), mode="r") for name in FITTED}
        return Leading(**{name: arrays.read(array, ...) for name, array in group.items()})
    sample = land_sample(store.open_vectors(grid), spec, BLOCKS, CELLS)
    return Leading.fit(sample, parts_of(attrs), len(ARRAYS) * COMPONENTS)


def companion_url(grid: str) -> str:
    """Returns the URL of the companion beside a grid."""
    return storage.join(home_of(grid), NAME)


def parts_of(attrs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns begin and end of the parts of a grid's vectors, each dimension in one: heads in place of `visual`."""
    blocks = {name: (int(start), int(stop)) for name, (start, stop) in attrs["geoemb:blocks"].items()}
    heads = [name for name, (_, stop) in blocks.items() if name != "visual" and stop <= blocks["visual"][1]]
    return {name: edges for name, edges in blocks.items() if name != "visual" or not heads}


def _fill(client: "Client", url: str, level: Level, make: Any) -> None:
    """Makes the chunks of a level that are not there."""
    rows: dict[int, set[str]] = {}
    for row in range(-(-level.rows // CHUNK)):
        rows[row] = set(storage.names(storage.join(url, level.name, ARRAYS[-1], "c", "0", str(row))))
    left = [tile for tile in level.tiles() if str(tile.column // CHUNK) not in rows[tile.row // CHUNK]]
    run_units(client, make, left, label=f"explorer {level.name}", there=len(level.tiles()) - len(left))


def project_chunk(source: Source, level: Level, tile: Tile) -> None:
    """Makes a chunk of the finest level from the grid's vectors."""
    look = _Window.of(store.open_spec(source.grid), level, tile)
    if source.evidence:
        layers = [look.read(store.open_vectors(source.grid, name)) for name in source.evidence]
        _write(source.url, level, EVIDENCE, tile, np.stack(layers))
    _write_codes(source.url, level, tile, source.leading.encode(look.read(store.open_vectors(source.grid))))


@dataclass(frozen=True)
class _Window:
    """The cells of a grid that a chunk of the companion shows."""

    rows: slice
    """Rows to read."""
    columns: slice
    """Columns to read."""
    at: tuple[NDArray[np.intp], NDArray[np.intp]] | None = None
    """Row and column of each of the chunk's cells in what is read, negative where there is none; none: one to one."""

    @classmethod
    def of(cls, spec: GridSpec, level: Level, tile: Tile) -> "_Window":
        if spec.plane.has_lonlat:
            return cls(*tile.window)
        (west, _, _, north), (rows, columns) = spec.box, spec.shape
        x, y = np.moveaxis(spec.plane.xy(level.lonlat(tile)), -1, 0)
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


def average_chunk(url: str, source: Level, level: Level, tile: Tile) -> None:
    """Makes a chunk of a level from the cells that it covers in the level before."""
    rows, columns = (slice(2 * part.start, 2 * part.stop) for part in tile.window)
    codes = [arrays.read(_open(url, source, name), (slice(None), rows, columns)) for name in ARRAYS]
    _write_codes(url, level, tile, pooled(np.concatenate(codes)))


def _write_codes(url: str, level: Level, tile: Tile, codes: NDArray[np.int8]) -> None:
    """Writes a chunk of both arrays; the second is the completion marker."""
    for name, part in zip(ARRAYS, np.split(codes, len(ARRAYS)), strict=True):
        _write(url, level, name, tile, part)


def _write(url: str, level: Level, name: str, tile: Tile, values: NDArray) -> None:
    """Writes a whole chunk; Zarr's own gzip would write the time into it, and a rerun must write the same bytes."""
    missing = NODATA_CODE if values.dtype == np.int8 else np.nan
    whole = np.full((len(values), CHUNK, CHUNK), missing, values.dtype.newbyteorder("<"))
    whole[:, : tile.rows, : tile.columns] = values
    packed = gzip.compress(whole.tobytes(), LEVEL, mtime=0)
    place = storage.join(url, level.name, name, "c", "0", str(tile.row // CHUNK), str(tile.column // CHUNK))
    storage.write(place, packed + google_crc32c.value(packed).to_bytes(4, "little"))


def _open(url: str, level: Level, name: str) -> zarr.Array:
    return zarr.open_array(storage.zarr_store(storage.join(url, level.name, name)), mode="r")


def template(source: Source, found: list[Level], attrs: dict[str, Any]) -> dict[str, bytes]:
    """Returns the objects of a companion but for its chunks, by name: metadata, places of the cells, components."""
    files: dict[str, Buffer] = {}
    root = zarr.open_group(MemoryStore(files), mode="w", attributes=_described(source, found, attrs))
    _put(root, "scale", source.leading.scale, "component")
    _put(root, "axes", source.leading.axes, "dim", "component")
    _put(root, "mean", source.leading.mean, "dim")
    for level in found:
        group = root.create_group(level.name)
        for name in ARRAYS:
            _empty(group, name, level, COMPONENTS, np.int8(NODATA_CODE), "component")
        if source.evidence and level is found[0]:
            _empty(group, EVIDENCE, level, len(source.evidence), np.float32(np.nan), "layer")
        _put(group, "lat", level.lonlat(Tile(0, 0, level.rows, 1))[:, 0, 1], "lat")
        _put(group, "lon", level.lonlat(Tile(0, 0, 1, level.columns))[0, :, 0], "lon")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata")
        zarr.consolidate_metadata(MemoryStore(files))
    return {name: data.to_bytes() for name, data in files.items()}


def _described(source: Source, found: list[Level], attrs: dict[str, Any]) -> dict[str, Any]:
    """Returns the attributes: what the page tells, and the levels as the convention of multiscales lists them."""
    layout = [
        {"asset": level.name, "spatial:shape": [level.rows, level.columns], "spatial:transform": level.transform}
        for level in found
    ]
    told = {name: attrs[name] for name in TOLD if name in attrs}
    told |= {"proj:code": WGS84, "rangegrid:evidence": source.evidence, "rangegrid:parts": parts_of(attrs)}
    scales = {"layout": layout, "resampling_method": "average"}
    return conventions.declared({}, conventions.PROJ, conventions.MULTISCALES) | told | {"multiscales": scales}


def _empty(group: zarr.Group, name: str, level: Level, depth: int, missing: Any, dim: str) -> None:
    group.create_array(
        name,
        shape=(depth, level.rows, level.columns),
        chunks=(depth, CHUNK, CHUNK),
        dtype=missing.dtype,
        fill_value=missing,
        attributes={"_FillValue": missing.item()} if missing.dtype == np.int8 else {},
        compressors=arrays.packed(GzipCodec(level=LEVEL)),
        dimension_names=(dim, "lat", "lon"),
    )


def _put(group: zarr.Group, name: str, values: NDArray, *dims: str) -> None:
    about: Any = {"compressors": (Crc32cCodec(),), "dimension_names": dims}
    group.create_array(name, data=np.ascontiguousarray(values), chunks=values.shape, **about)
