"""Write throughput of tiles against raw PUTs of the same bytes, and s3fs against obstore, for tiles and tables.

`python -m tests.benchmarks.storage` starts an S3 server of its own. Every way writes the same tiles of land, smooth
with some noise: as raw PUTs of their bytes as they are; as raw PUTs of their shards; by `grids.write_tile` on obstore,
as the publication does; and by zarr on s3fs. The rounds alternate, and the median of each way counts. The target is
70 % of raw PUTs. Tables are read as the job reads them, from a copy of the object, and in place through s3fs.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import s3fs
import zarr
from zarr.storage import FsspecStore

from infra import storage
from infra.sandbox import servers
from tasks.core.earth.grid import GridSpec, Tile
from tasks.grid import store as grids
from tests.benchmarks.layout import fields
from tests.benchmarks.retrieval import machine

SPEC, DIMS = GridSpec(1.0, 120), 1280  # a shard of 120 x 120 cells: 74 MB
TILES, ROUNDS = 3, 5
LAND = Tile(0, 200, SPEC.tile, SPEC.tile)  # northern Asia and the sea around it
BUCKET = "bench"
ROWS, COLUMNS = 500_000, 44  # of the tables; two columns are read of those in Parquet


def serve(directory: Path) -> servers.Process:
    """An S3 server, in the environment from now on."""
    ports, log = servers.free_ports(5), directory / "logs/s3.log"
    (directory / "s3").mkdir()
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "benchmark" * 4}
    url = f"http://{servers.HOST}:{ports[0]}"
    process = servers.start(servers.s3_command(directory / "s3", ports), log, keys, bound=True)
    servers.wait("s3", lambda: servers.s3_answers(ports), process, log)
    os.environ |= keys | {"RANGEGRID_S3_ENDPOINT": url}
    s3fs.S3FileSystem(endpoint_url=url).mkdir(BUCKET)
    return process


def create(name: str) -> str:
    """An empty grid; its URL."""
    url = f"s3://{BUCKET}/{name}"
    grids.create(url, SPEC, grids.template(SPEC, grids.Content(DIMS - 256, 256), {}))
    return url


def by_s3fs(url: str) -> zarr.Array:
    """The grid's array through s3fs."""
    options = {"endpoint_url": os.environ["RANGEGRID_S3_ENDPOINT"], "asynchronous": True}
    files = s3fs.S3FileSystem(**options)
    store = FsspecStore(files, path=storage.join(url.removeprefix("s3://"), grids.VARIABLE))
    return zarr.open_array(store, mode="r+", zarr_format=3)


def ways(tiles: list[Tile], values: np.ndarray) -> dict[str, Callable[[], object]]:
    """The ways to write, by name; each writes all tiles once."""
    url, other = create("obstore"), by_s3fs(create("s3fs"))
    grids.write_tile(url, tiles[0], values)
    (shard,) = [meta["path"] for meta in storage._list(storage.join(url, grids.VARIABLE, "c"))]
    data = storage.read(f"s3://{BUCKET}/{shard}")
    print(f"{TILES} shards of {len(data) / 1e6:.1f} MB, {values.nbytes / 1e6:.1f} MB of values each")

    def raw(body: bytes) -> None:
        for tile in tiles:
            storage.write(f"s3://{BUCKET}/raw/{tile}", body)

    def obstore() -> None:
        for tile in tiles:
            grids.write_tile(url, tile, values)

    def fsspec() -> None:
        for tile in tiles:
            other[(slice(None), *tile.window)] = values

    puts = {"raw PUT": partial(raw, values.tobytes()), "raw PUT of shards": partial(raw, data)}
    return puts | {"zarr on obstore": obstore, "zarr on s3fs": fsspec}


def tables() -> dict[str, Callable[[], object]]:
    """The ways to read tables, by name."""
    rng = np.random.default_rng(0)
    table = pa.table({f"c{i}": rng.random(ROWS) for i in range(COLUMNS)})
    kinds = {"wide.parquet": table, "narrow.parquet": table.select(range(4)), "part.parquet": table.slice(0, 2000)}
    for name, content in kinds.items():
        pq.write_table(content, sink := io.BytesIO())
        storage.write(f"s3://{BUCKET}/{name}", sink.getvalue())
    pc.write_csv(table.select(range(4)), sink := io.BytesIO())
    storage.write(f"s3://{BUCKET}/narrow.csv", sink.getvalue())

    def read(file: object, name: str) -> None:
        _ = pc.read_csv(file) if name.endswith("csv") else pq.read_table(file, columns=["c0", "c1"])

    def copied(name: str) -> None:
        with storage.as_file(f"s3://{BUCKET}/{name}") as path:
            read(path, name)

    def in_place(name: str) -> None:
        with s3fs.S3FileSystem(endpoint_url=os.environ["RANGEGRID_S3_ENDPOINT"]).open(f"{BUCKET}/{name}") as file:
            read(file, name)

    ways = {"obstore": copied, "s3fs": in_place}
    return {f"{name} by {way}": partial(ways[way], name) for name in (*kinds, "narrow.csv") for way in ways}


def timed(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    """Prints MB/s of values by way, and milliseconds by table."""
    print(machine())
    tiles = list(SPEC.tiles())[:TILES]
    values = fields(SPEC, DIMS, LAND)
    with tempfile.TemporaryDirectory() as directory:
        process = serve(Path(directory))
        writes = timed(ways(tiles, values))
        reads = timed(tables())
        servers.stop(process)
    raw = writes["raw PUT"]
    for name, seconds in writes.items():
        print(f"{name:<20}{TILES * values.nbytes / 1e6 / seconds:>8.0f} MB/s {raw / seconds:>6.0%} of raw PUT")
    for name, seconds in reads.items():
        print(f"{name:<28}{1000 * seconds:>8.0f} ms")


if __name__ == "__main__":
    main()
