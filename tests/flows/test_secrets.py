"""Credentials are nowhere but in the environment: not in what a run logs, shows, returns, stores or sends away."""

from pathlib import Path

import pytest
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol import pickle
from prefect.logging.handlers import APILogHandler
from prefect.settings import get_current_settings

from flows.publish import publish
from infra import clusters, storage
from infra.errors import UserError
from tasks.grid.tiles import land_tiles
from tasks.params import PublishParams
from tests.proxy import Proxy, status
from tests.tasks.test_faults import make_inputs

PARAMS = PublishParams(step=15.0, tile_cells=4)


class Graph(SchedulerPlugin):
    """Keeps the key and the pickled call of every task that a scheduler sees."""

    def __init__(self, scheduler):
        self.scheduler, self.seen = scheduler, []

    def transition(self, key, start, finish, *args, **kwargs):
        task = self.scheduler.tasks.get(key)
        self.seen.append(str(key).encode())
        if task is not None and task.run_spec is not None:
            self.seen.append(pickle.dumps(task.run_spec))


@pytest.fixture
def home(sandbox, prefect, tmp_path, monkeypatch):
    """Storage with what a grid is made of."""
    url = f"s3://rangegrid/{tmp_path.name}"
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", url)
    make_inputs(url)
    return url


def recorded():
    """All bytes that Prefect keeps: its database with logs, artifacts and states, and results."""
    APILogHandler().flush()
    database = get_current_settings().server.database.connection_url.get_secret_value()
    folder = Path(database.partition("///")[2]).parent
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def stored(home):
    """All bytes of all objects."""
    bucket = home.rpartition("/")[0]
    return b"".join(storage.read(storage.join(bucket, meta["path"])) for meta in storage._list(home))


def test_credentials_are_nowhere(sandbox, home, monkeypatch, capfd):
    inputs = f"{home}/checkpoint", f"{home}/database"
    with clusters.connect("threads", 2) as client:
        scheduler = client.cluster.scheduler
        graph = Graph(scheduler)
        scheduler.add_plugin(graph)
        grid = publish(*inputs, PARAMS)
        with Proxy(sandbox.endpoint) as proxy, monkeypatch.context() as patch:
            patch.setenv("RANGEGRID_S3_ENDPOINT", proxy.url)
            proxy.inject(status(403))
            with pytest.raises(UserError, match="is forbidden") as refusal:
                publish(*inputs, PARAMS)
    printed = "".join(capfd.readouterr())
    places = {
        "Prefect": (recorded(), f"{grid}: {len(land_tiles(PARAMS.spec))} tiles of land"),
        "graph": (b"".join(graph.seen), home),
        "storage": (stored(home), home),
        "terminal": (printed.encode(), "publish"),
        "error": (str(refusal.getrepr(style="long")).encode(), home),
    }
    for place, (found, marker) in places.items():
        assert marker.encode() in found, f"{place} is not what was meant to be searched"
        for secret in sandbox.keys:
            assert secret.encode() not in found, f"a credential is in {place}"
