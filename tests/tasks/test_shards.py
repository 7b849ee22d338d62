"""A database over separately started workers, against the whole in one process."""

import subprocess
import sys

import numpy as np
import pytest
from distributed import Client

from infra.sandbox import servers
from tasks.core.retrieval import Method, RetrievalIndex
from tasks.database import create_database, finish_database, write_rows
from tasks.shards import halves_on_workers
from tests.core.test_retrieval import RNG, close, database, places, unit


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A scheduler and three workers, each a process of its own."""
    (port,) = servers.free_ports(1)
    address = f"tcp://{servers.HOST}:{port}"
    commands = [["scheduler", "--host", servers.HOST, "--port", str(port), "--no-dashboard"]]
    commands += [["worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]] * 3
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *command], cwd=tmp_path_factory.mktemp("w"), stderr=subprocess.DEVNULL
        )
        for command in commands
    ]
    with Client(address, timeout="60s") as client:
        client.wait_for_workers(3, timeout=120)
        yield client, started[1]
    for process in reversed(started):
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("method", [Method(), Method("range"), Method(temperature=300)])
def test_the_parts_are_the_whole(client, tmp_path, rows, method):
    url = make(tmp_path.as_uri(), rows)
    queries, lonlat = unit(RNG.normal(size=(50, 16))), places(50)
    found = halves_on_workers(client[0], url, queries, lonlat, method).mix(0.5)
    close(found, RetrievalIndex(*database(rows)).retrieve(queries, lonlat, method), 1e-5)


def make(home, rows):
    url = f"{home}/database"
    keys, values, where = database(rows)
    create_database(url, rows, 16, 8, rows)
    write_rows(url, 0, {"keys": keys, "values": values, "locations": where, "row_ids": np.arange(rows)})
    finish_database(url, checkpoint="abc", fingerprint="def")
    return url


def test_a_dead_worker_costs_nothing_but_time(client, tmp_path):
    url, (dask, worker) = make(tmp_path.as_uri(), 90), client
    queries, lonlat = unit(RNG.normal(size=(5, 16))), places(5)
    before = halves_on_workers(dask, url, queries, lonlat, Method()).mix(0.5)
    worker.kill()
    worker.wait()
    close(halves_on_workers(dask, url, queries, lonlat, Method()).mix(0.5), before, 1e-5)
