"""A real Prefect server, worker and deployments; what runs a flow is killed, and one rerun completes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra import storage
from infra.reconcile import reconcile
from infra.sandbox import servers
from tasks.params import EncoderParams, EvaluateParams, PipelineParams, PublishParams, TrainParams
from tasks.patches import open_patches
from tests.flows.test_pipeline import SAMPLE
from tests.infra.test_clusters import Fleet

ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds: a worker, a flow and a cluster each start a Python of their own
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


class Station:
    """A Prefect server with our deployments, and workers that come and go."""

    def __init__(self, home, environment):
        (port,) = servers.free_ports(1)
        self.url = f"http://{servers.HOST}:{port}/api"
        own = {"PREFECT_API_URL": self.url, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        self.home, self.environment = home, environment | own | {"RANGEGRID_CLUSTER": "local"}
        self.port = port
        self.open()
        self.prefect("work-pool", "create", "rangegrid", "--type", "process")
        self.prefect("--no-prompt", "deploy", "--all")

    def open(self):
        """Starts the server, at the same address as before."""
        log = self.home / "logs/server.log"
        self.server = servers.start(servers.prefect_command(self.port), log, self.environment, bound=True)
        servers.wait("prefect", lambda: servers.answers(f"{self.url}/health"), self.server, log)

    def prefect(self, *command):
        environment = os.environ | self.environment
        subprocess.run([sys.executable, "-m", "prefect", *command], cwd=ROOT, env=environment, check=True, timeout=300)

    @contextmanager
    def worker(self, **variables):
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "rangegrid", "--type", "process"]
        process = servers.start(command, self.home / "logs/worker.log", self.environment | variables, bound=True)
        try:
            yield process
        finally:
            kill(process)


def kill(process):
    """kill -9, with all that it started."""
    found = servers.find(process)
    for member in [*found.children(recursive=True), found] if found else []:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)


def until(answers):
    end = time.monotonic() + PATIENCE
    while not (found := answers()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def station(sandbox, tmp_path_factory):
    made = Station(tmp_path_factory.mktemp("prefect"), sandbox.environment())
    with temporary_settings({PREFECT_API_URL: made.url}):
        yield made
    servers.stop(made.server)


def start(name, params):
    parameters = {"params": json.loads(params.model_dump_json())}
    return run_deployment(f"{name}/{name}", parameters=parameters, timeout=0, as_subflow=False)


def state(run):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run.id).state


def begun():
    """The samples whose places are being screened, or were."""
    root = "s3://rangegrid/patches"
    return {name for name in storage.names(root) if storage.names(storage.join(root, name, "screen"))}


def test_a_run_killed_with_its_worker_is_ended_and_one_rerun_completes(station):
    params, before = SAMPLE.model_copy(update={"seed": 77}), begun()
    with station.worker() as worker:
        killed = start("sample", params)
        until(lambda: state(killed).is_running() and begun() - before)
        kill(worker)
    assert state(killed).is_running()  # and it would stay so for ever
    assert reconcile(silent_minutes=15) == []  # it was heard of just now
    assert [run.id for run in reconcile(silent_minutes=0)] == [killed.id]
    assert state(killed).is_crashed()
    assert "Run it again" in state(killed).message
    with station.worker():
        again = start("sample", params)  # the deployment takes one at a time: the dead run holds its place no more
        until(lambda: state(again).is_final())
    assert state(again).is_completed(), state(again).message
    assert len(open_patches(state(again).message).manifest) == params.patches
    assert reconcile(silent_minutes=0) == []


def test_a_step_outlives_its_dask_scheduler(station, tmp_path):
    """Nobody reruns it: the step is tried again by itself, on a new connection."""
    fleet, before = Fleet(tmp_path / "fleet"), begun()
    fleet.join("one", **station.environment)
    try:
        with station.worker(RANGEGRID_CLUSTER=fleet.address):
            run = start("sample", SAMPLE.model_copy(update={"seed": 78}))
            until(lambda: begun() - before)
            fleet.leave("scheduler")
            fleet.open()
            fleet.join("two", **station.environment)
            until(lambda: state(run).is_final())
    finally:
        fleet.close()
    assert state(run).is_completed(), state(run).message


def test_one_rerun_completes_after_the_server_was_killed(station):
    params, before = SAMPLE.model_copy(update={"seed": 79}), begun()
    with station.worker():
        first = start("sample", params)
        until(lambda: begun() - before)
        kill(station.server)
        station.open()
    reconcile(silent_minutes=0)
    assert state(first).is_final()
    with station.worker():
        again = start("sample", params)
        until(lambda: state(again).is_final())
    assert state(again).is_completed(), state(again).message
    assert len(open_patches(state(again).message).manifest) == params.patches


def test_the_pipeline_runs_each_step_as_its_own_deployment(station):
    params = PipelineParams(
        sample=SAMPLE,
        train=TrainParams(encoder=EncoderParams(dim=64), steps=20, batch=32, degree=8, hidden=32, dim=16),
        publish=PublishParams(step=3.0, tile_cells=60),
        evaluate=EvaluateParams(points=200),
    )
    with station.worker():
        whole = start("pipeline", params)
        until(lambda: state(whole).is_final())
    with get_client(sync_client=True) as client:
        steps = [run for run in client.read_flow_runs() if run.parent_task_run_id]
        names = {client.read_flow(run.flow_id).name: run.state for run in steps}
    assert state(whole).is_completed(), state(whole).message
    assert set(names) == {"sample", "train", "encode", "publish", "evaluate"}
    assert all(ended.is_completed() for ended in names.values())
    assert storage.exists(storage.join(names["publish"].message, "zarr.json"))
