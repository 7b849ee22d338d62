"""A database over separately started workers, against the whole in one process."""

import threading

import numpy as np
import pytest
import torch
from distributed import Client

from infra.errors import UserError
from tasks.core.encoders.location import LocationEncoder
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.grid import parts
from tasks.params import PublishParams
from tasks.publish import publish_grid
from tests.conftest import dask_processes
from tests.core.test_retrieval import close, database
from tests.tasks.test_publish import DIM, SIDE_BY_SIDE, STEP, VALUES, embeddings, images, same, store, store_checkpoint
from tests.waiting import until

ROWS = 200
FEW = images(np.arange(ROWS))
WEIGHED = FEW | {"weights": np.geomspace(0.01, 10, ROWS)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler and three workers, each a process of its own; none takes over a busy one's work, and so its part."""
    no_stealing = {"DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING": "False"}
    started = dask_processes(tmp_path_factory.mktemp("dask"), 3, "--no-nanny", **no_stealing)
    with started as (address, workers), Client(address, timeout="60s") as client:
        client.wait_for_workers(3, timeout=120)
        yield client, workers[0]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The storage, with a checkpoint in it."""
    store_checkpoint(tmp_path.as_uri())
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    return tmp_path


@pytest.fixture
def small(cluster, monkeypatch):
    """Gives workers so little memory that a database of so many rows takes two of them at least."""
    least = min(worker["memory_limit"] for worker in cluster[0].scheduler_info(n_workers=-1)["workers"].values())
    return lambda rows: monkeypatch.setattr(parts, "MEMORY_SHARE", rows * (DIM + VALUES) * 4 / 2 / least)


def publish(client, home, arrays, **options):
    url = store(home, f"database{len(arrays['keys'])}", arrays)
    return publish_grid(client, f"{home.as_uri()}/checkpoint", url, PublishParams(**STEP | options))


def expected(grid, arrays, beta=0.5):
    """Every land cell, in one process."""
    torch.manual_seed(0)
    encoder = LocationEncoder(6, hidden=16, dim=DIM).eval()
    land = np.isfinite(embeddings(grid)[0])
    row, column = np.nonzero(land)
    lonlat = np.column_stack([-175.0 + 10 * column, 85.0 - 10 * row])
    index = RetrievalIndex(arrays["keys"], arrays["values"], arrays["locations"], weights=arrays.get("weights"))
    return land, embed(encoder, index, lonlat, Method(beta=beta))


@pytest.mark.parametrize(
    ("options", "arrays"),
    [
        ({}, WEIGHED),
        pytest.param({"beta": 0.2, "keep_sums": True}, FEW, marks=pytest.mark.further),
        (SIDE_BY_SIDE, FEW),
    ],
)
def test_the_parts_are_the_whole(cluster, home, small, options, arrays):
    client = cluster[0]
    small(ROWS)
    client.run(parts.load_part.cache_clear)
    grid = publish(client, home, arrays, **options)
    if "heads" in options:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "MEMORY_SHARE", 0.5)  # the whole in one worker, of another version
            same(grid, publish(client, home, arrays, **options, evidence=True))
    else:
        land, vectors = expected(grid, arrays, options.get("beta", 0.5))
        close(embeddings(grid)[:, land].T, vectors, 1e-5)
    assert [info.misses for info in client.run(parts.load_part.cache_info).values()] == [1, 1, 1]  # not once a tile


def test_one_spectrum_serves_all_parts_and_far_cells_are_summed_directly(cluster, home, small):
    small(6000)
    keys, values, where = database(6000, DIM, VALUES)
    where[:, 1] = np.abs(where[:, 1])  # none south of the equator
    arrays = {"keys": keys, "values": values, "locations": where, "row_ids": np.arange(6000)}
    arrays["weights"] = np.where(where[:, 0] < 0, 0.05, 1.0)
    far = RetrievalIndex(keys, values, where).spectrum(40.0).sums(np.array([[0.0, -80.0], [0.0, 50.0]]))[1]
    np.testing.assert_array_equal(far, [True, False])
    grid = publish(cluster[0], home, arrays)
    land, vectors = expected(grid, arrays)
    close(embeddings(grid)[:, land].T, vectors, 1e-5)


def test_a_dead_worker_costs_nothing_but_time(cluster, home, small):
    client, worker = cluster
    small(ROWS)
    made = []
    thread = threading.Thread(target=lambda: made.append(publish(client, home, FEW)))
    thread.start()
    until(lambda: list(home.rglob("grid.zarr/embedding/c/*/*/*")), every=0.01)
    worker.kill()
    worker.wait()
    thread.join(300)
    land, vectors = expected(made[0], FEW)
    close(embeddings(made[0])[:, land].T, vectors, 1e-5)


def test_what_fits_no_worker_is_refused(cluster, home, monkeypatch):
    monkeypatch.setattr(parts, "MEMORY_SHARE", 1e-9)
    with pytest.raises(UserError, match=r"takes 1.92e-05 GB, and \d workers hold .* start \d+ workers"):
        publish(cluster[0], home, FEW)
    with pytest.raises(UserError, match="no worker can hold, and interpolation and updates need it whole"):
        publish(cluster[0], home, images(np.arange(ROWS + 1)), tolerance=0.01)
    assert not list(home.rglob("grid.zarr"))
