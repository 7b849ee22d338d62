"""What packs a grid's chunks best: bytes a cell, and seconds to write and read a tile, by codec and dtype.

`python -m tests.benchmarks.packing GRID [--row 60 --column 480]` takes one tile of a float32 grid, for example of
`demo/grid.zarr`, and packs it in memory, in the chunks and shards of the product; the best of three tries counts.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import MemoryStore

from tasks.core.quantize import NODATA_CODE, Scale
from tasks.grid.store import CHUNK_CELLS, CHUNK_DIMS
from tests.benchmarks.retrieval import machine

TILE = 120
CODECS = {
    "none": None,
    "zstd 1": ZstdCodec(level=1),
    "lz4 1, shuffled": BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"),
    "zstd 1, shuffled": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
    "zstd 3, shuffled": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
}


def stored(values: NDArray[np.float32], blocks: list[int]) -> dict[str, tuple[NDArray, float]]:
    """The tile and its nodata by dtype, as the product stores them."""
    parts = np.split(values, blocks)
    codes = [Scale.fit(part[np.isfinite(part)]).encode(part) for part in parts]
    return {
        "float32": (values, np.nan),
        "float16": (values.astype(np.float16), np.nan),
        "int8": (np.concatenate(codes), NODATA_CODE),
    }


def quickest(work: Callable[[], object]) -> float:
    """Seconds of the best of three tries."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid")
    parser.add_argument("--row", type=int, default=60)
    parser.add_argument("--column", type=int, default=480)
    options = parser.parse_args()
    grid = xr.open_zarr(options.grid)
    window = {"lat": slice(options.row, options.row + TILE), "lon": slice(options.column, options.column + TILE)}
    values = grid.embedding.isel(window).values
    cells = int(np.isfinite(values[0]).sum())
    print(machine())
    print(f"{TILE} x {TILE} cells, {cells / TILE**2:.0%} land, {len(values)} dimensions")
    print(f"{'dtype':<9}{'codec':<18}{'bytes/cell':>11}{'write, s':>10}{'read, s':>9}")
    for dtype, (tile, nodata) in stored(values, [int((grid.block == "visual").sum())]).items():
        for name, codec in CODECS.items():
            files: dict = {}
            array = zarr.create_array(
                MemoryStore(files),
                shape=tile.shape,
                chunks=(CHUNK_DIMS, CHUNK_CELLS, CHUNK_CELLS),
                shards=tile.shape,
                dtype=tile.dtype,
                fill_value=nodata,
                compressors=codec,
            )
            write, read = quickest(lambda a=array, t=tile: a.__setitem__(..., t)), quickest(lambda a=array: a[...])
            size = sum(len(data) for data in files.values())
            print(f"{dtype:<9}{name:<18}{size / cells:>11.0f}{write:>10.2f}{read:>9.2f}")


if __name__ == "__main__":
    main()
