"""Which chunks and which order of dimensions serve the three reads that people do, on a real S3 server.

    eval "$(rangegrid sandbox up)"
    python -m tests.benchmarks.layout [--rows 360] [--tile 120] [--dims 1280] [--repeat 5]

Writes one synthetic grid per layout (smooth fields and noise where there is land) to the storage of the settings and
times what a reader waits for who opens the grid for it: one point with all dimensions, 40 x 40 cells with all
dimensions, the world with 3 dimensions. `chunks` is what a far store multiplies its latency by, some at a time.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from infra import storage
from infra.settings import settings
from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.earth.land import is_land

REGION = 40  # cells along one side


@dataclass(frozen=True)
class Layout:
    """An order of dimensions, chunks and shards."""

    first: bool
    """Whether the embedding comes first: (embedding, lat, lon); else (lat, lon, embedding)."""
    depth: int
    """Dimensions of a chunk."""
    cells: int
    """Cells along one side of a chunk."""

    def arranged(self, dims: int, rows: int, columns: int) -> tuple[int, ...]:
        """A shape in this order."""
        return (dims, rows, columns) if self.first else (rows, columns, dims)

    def index(self, dims: slice, rows: slice | int, columns: slice | int) -> tuple[slice | int, ...]:
        """An index in this order."""
        return (dims, rows, columns) if self.first else (rows, columns, dims)

    def __str__(self) -> str:
        return f"{'e,y,x' if self.first else 'y,x,e'} {self.depth:>4} x {self.cells:>2} x {self.cells:>2}"


CHUNKS = [(1280, 4), (256, 10), (64, 20), (128, 20), (256, 20), (32, 30), (64, 30), (16, 60)]
LAYOUTS = [Layout(first, depth, cells) for first in (True, False) for depth, cells in CHUNKS]


def fields(spec: GridSpec, dims: int, tile: Tile) -> NDArray[np.float32]:
    """Smooth in space, different in every dimension, NaN at sea; (dims, rows, columns)."""
    rows, columns = tile.window
    lat, lon = np.radians(spec.y[rows]), np.radians(spec.x[columns])
    rng = np.random.default_rng(0)
    a, b, phase = rng.integers(1, 12, dims), rng.integers(1, 12, dims), rng.uniform(0, 6, dims)
    waves = np.cos(a[:, None, None] * lat[None, :, None] + b[:, None, None] * lon[None, None] + phase[:, None, None])
    waves = waves.astype(np.float32) * np.float32(0.3) + np.float32(1)
    waves += rng.standard_normal(waves.shape, np.float32) * np.float32(1e-2)
    return np.where(is_land(spec.lonlat(tile)), waves, np.float32(np.nan))


def write(url: str, spec: GridSpec, layout: Layout, dims: int) -> float:
    """Writes the grid; returns MB/s of its float32 size."""
    array = zarr.create_array(
        storage.zarr_store(url),
        shape=layout.arranged(dims, *spec.shape),
        chunks=layout.arranged(min(layout.depth, dims), layout.cells, layout.cells),
        shards=layout.arranged(dims, spec.tile, spec.tile),
        dtype="f4",
        fill_value=np.nan,
        compressors=BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
    )
    spent = written = 0.0
    for tile in spec.tiles():
        values = fields(spec, dims, tile)
        if not np.isnan(values[0]).all():
            start = time.perf_counter()
            array[layout.index(slice(None), *tile.window)] = values if layout.first else np.moveaxis(values, 0, -1)
            spent, written = spent + time.perf_counter() - start, written + values.nbytes / 1e6
    return written / spent


def reads(spec: GridSpec, layout: Layout, dims: int) -> Iterator[tuple[tuple[slice | int, ...], int]]:
    """The three reads: index, and chunks that it touches on land and sea."""
    rows, columns = spec.shape
    top, left = round(40 / spec.step), round(185 / spec.step)  # north-east of 50 N, 5 E
    deep, across = -(-dims // layout.depth), REGION // layout.cells + 1
    yield layout.index(slice(None), top, left), deep
    yield layout.index(slice(None), slice(top, top + REGION), slice(left, left + REGION)), deep * across**2
    yield layout.index(slice(0, 3), slice(None), slice(None)), rows * columns // layout.cells**2


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=360)
    parser.add_argument("--tile", type=int, default=120)
    parser.add_argument("--dims", type=int, default=1280)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    spec, root = GridSpec(180 / options.rows, options.tile), storage.join(settings().storage_url, "layouts")
    print(f"{spec.shape} cells x {options.dims}, shards of {options.dims * options.tile**2 * 4 / 1e6:.0f} MB")
    names = "".join(f"{name:>10} ms  chunks" for name in ("point", "region", "world"))
    print(f"{'order and chunk':<22}{'MB':>7}{'write MB/s':>12}{names}")
    for i, layout in enumerate(LAYOUTS):
        url = storage.join(root, str(i))
        speed = write(url, spec, layout, options.dims)
        cells = [
            f"{1000 * timed(url, index, options.repeat):>13.0f}{n:>8}" for index, n in reads(spec, layout, options.dims)
        ]
        print(f"{layout!s:<22}{storage.size(url) / 1e6:>7.0f}{speed:>12.0f}{''.join(cells)}", flush=True)
        storage.delete(url)


def timed(url: str, index: tuple[slice | int, ...], repeat: int) -> float:
    """Median seconds of a read by a store that was opened for it, as a first read is."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        zarr.open_array(storage.zarr_store(url), mode="r")[index]
        seconds.append(time.perf_counter() - start)
    return median(seconds)


if __name__ == "__main__":
    main()
