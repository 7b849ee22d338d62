"""Tiles per second of one and of two separately started workers of one thread.

`python -m tests.benchmarks.distributed` publishes the same grid with one `dask worker` and with two, first with the
whole database in each, then with a database in as many parts as there are workers. Loading is not counted: each
worker has loaded what it needs, and built the spectrum, by a coarser grid before. Beside the wall clock, which other
work on the machine distorts, stand the cells per second of the workers' own CPU time, which it does so less: their
ratio is what dividing the work costs.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from distributed import Client

from infra.sandbox import servers
from tasks.cards import read_card
from tasks.core.encoders.location import LocationEncoder
from tasks.database.store import create_database, finish_database, write_rows
from tasks.grid.parts import Part
from tasks.grid.tiles import Job, land_tiles
from tasks.model.checkpoint import save_checkpoint
from tasks.params import PublishParams
from tasks.products import DatabaseCard
from tasks.publish import prepare, publish_tiles
from tests.benchmarks.retrieval import KEY, VALUE, machine, places

IMAGES, SHARD = 82_000, 1000  # the published database
STEP, TILE = 1.0, 20
COARSE = 10.0
ROUNDS = 2


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    """A scheduler and workers of one thread, each a process of its own."""
    (port,) = servers.free_ports(1)
    address = f"tcp://{servers.HOST}:{port}"
    commands = [["scheduler", "--host", servers.HOST, "--port", str(port), "--no-dashboard"]]
    commands += [["worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]] * workers
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-m", "dask", *command], env=environment, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        with Client(address, timeout="60s") as client:
            client.wait_for_workers(workers, timeout=120)
            yield client
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)


def make(home: str) -> Job:
    """A random encoder and database, stored, and the grid to publish."""
    space = save_checkpoint(f"{home}/checkpoint", LocationEncoder(20)).fingerprint
    rng, url = np.random.default_rng(0), f"{home}/database"
    create_database(url, IMAGES, KEY, VALUE, SHARD)
    for start in range(0, IMAGES, SHARD):
        keys = rng.normal(size=(SHARD, KEY)).astype(np.float32)
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        values, ids = rng.normal(size=(SHARD, VALUE)).astype(np.float32), np.arange(start, start + SHARD)
        write_rows(url, start, {"keys": keys, "values": values, "locations": places(SHARD, rng), "row_ids": ids})
    finish_database(url, checkpoint=space, fingerprint="")
    return Job("", f"{home}/checkpoint", url, PublishParams(step=STEP, tile_cells=TILE))


def rate(client: Client, job: Job, home: str, parts: dict[str, Part]) -> tuple[float, float]:
    """Cells per second, by the clock and by the workers' CPU time, the best of some runs each."""
    best = 0.0, 0.0
    for number, step in enumerate([COARSE] + [STEP] * ROUNDS):
        run = replace(job, home=f"{home}/{len(parts)}-{number}", params=PublishParams(step=step, tile_cells=TILE))
        prepare(client, run, read_card(job.database, DatabaseCard), {}, whole=False)
        start, used = time.perf_counter(), sum(client.run(time.process_time).values())
        cells = sum(report.cells for report in publish_tiles(client, run, parts, land_tiles(run.spec), set()))
        taken, used = time.perf_counter() - start, sum(client.run(time.process_time).values()) - used
        if number:
            best = max(best[0], cells / taken), max(best[1], cells / used)
    return best


def main() -> None:
    """Prints the table."""
    print(machine())
    print(f"{IMAGES} x ({KEY} keys, {VALUE} values), {STEP:g} degree, cells/s, best of {ROUNDS}")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).as_uri()
        job, found = make(home), {}
        for workers in (1, 2):
            with cluster(workers) as client:
                names = sorted(client.scheduler_info(n_workers=-1)["workers"])
                edges = np.linspace(0, IMAGES, workers + 1).astype(int).tolist()
                parts = {name: (edges[i], edges[i + 1]) for i, name in enumerate(names)}
                found[workers] = [rate(client, job, f"{home}/{workers}", p) for p in ({}, parts)]
    print(f"{'':<32}{'1 worker':>10}{'2 workers':>11}{'ratio':>7}")
    for name, one, two in zip(("whole in each", "in parts"), found[1], found[2], strict=True):
        print(f"{name + ', per second':<32}{one[0]:>10.0f}{two[0]:>11.0f}{two[0] / one[0]:>7.2f}")
        print(f"{name + ', per CPU second':<32}{one[1]:>10.0f}{two[1]:>11.0f}{two[1] / one[1]:>7.2f}")


if __name__ == "__main__":
    main()
