"""A database over separately started workers, against the whole in one process."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client

from infra.errors import UserError
from infra.sandbox import servers
from tasks import shards
from tasks.checkpoint import save_checkpoint
from tasks.core.location import LocationEncoder
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.params import PublishParams
from tasks.publish import publish_grid
from tests.core.test_retrieval import close, database
from tests.tasks.test_publish import DIM, STEP, VALUES, embeddings, images, store

ROWS = 200


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
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


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The storage, with a checkpoint in it."""
    torch.manual_seed(0)
    save_checkpoint((tmp_path / "checkpoint").as_uri(), LocationEncoder(6, hidden=16, dim=DIM))
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    return tmp_path


@pytest.fixture
def small(cluster, monkeypatch):
    """Workers of so little memory that a database of some thousand bytes takes two of them at least."""
    workers = cluster[0].scheduler_info(n_workers=-1)["workers"].values()
    size = ROWS * (DIM + VALUES) * 4
    monkeypatch.setattr(shards, "MEMORY_SHARE", size / 2 / min(worker["memory_limit"] for worker in workers))


def publish(client, home, rows, **options):
    url = store(home, f"database{rows}", images(np.arange(rows)))
    return publish_grid(client, f"{home.as_uri()}/checkpoint", url, PublishParams(**STEP | options))


def expected(grid, beta=0.5):
    """Every land cell, in one process."""
    torch.manual_seed(0)
    encoder = LocationEncoder(6, hidden=16, dim=DIM).eval()
    land = np.isfinite(embeddings(grid)[0])
    row, column = np.nonzero(land)
    lonlat = np.column_stack([-175.0 + 10 * column, 85.0 - 10 * row])
    index = RetrievalIndex(*(a[:ROWS] for a in database(1000, DIM, VALUES)))
    return land, embed(encoder, index, lonlat, Method(beta=beta))


@pytest.mark.parametrize("options", [{}, {"beta": 0.2, "keep_sums": True}])
def test_the_parts_are_the_whole(cluster, home, small, options):
    client = cluster[0]
    client.run(shards.load_part.cache_clear)
    grid = publish(client, home, ROWS, **options)
    land, vectors = expected(grid, options.get("beta", 0.5))
    close(embeddings(grid)[:, land].T, vectors, 1e-5)
    assert [info.misses for info in client.run(shards.load_part.cache_info).values()] == [1, 1, 1]  # not once a tile


def test_a_dead_worker_costs_nothing_but_time(cluster, home, small):
    client, worker = cluster
    made = []
    thread = threading.Thread(target=lambda: made.append(publish(client, home, ROWS)))
    thread.start()
    while not list(Path(home).rglob("grid.zarr/embedding/c/*/*/*")):
        time.sleep(0.01)
    worker.kill()
    worker.wait()
    thread.join(300)
    land, vectors = expected(made[0])
    close(embeddings(made[0])[:, land].T, vectors, 1e-5)


def test_what_fits_no_worker_is_refused(cluster, home, monkeypatch):
    monkeypatch.setattr(shards, "MEMORY_SHARE", 1e-9)
    with pytest.raises(UserError, match=r"takes 1.92e-05 GB, and \d workers hold .* start \d+ workers"):
        publish(cluster[0], home, ROWS)
    with pytest.raises(UserError, match="no worker can hold, and interpolation and updates need it whole"):
        publish(cluster[0], home, ROWS + 1, tolerance=0.01)
    assert not list(home.rglob("grid.zarr"))
