"""Everything that rangegrid runs on, each part a process that can be killed and comes back at the same address."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from distributed import Client
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment

from infra import clusters, sandbox
from infra.sandbox import servers
from infra.sandbox.planet import PlanetSpec
from tasks.params import Params
from tests.conftest import CELLS
from tests.proxy import Proxy

ROOT = Path(__file__).parents[1]
DASK_WORKERS = ("dask-1", "dask-2")
PARTS = ("s3", "stac", "prefect", "scheduler", *DASK_WORKERS, "worker")
PATIENCE = 400.0  # seconds until a part must answer, on a machine that has other work
MARK = "RANGEGRID_STATION"  # a variable that every process of a station has, and all that it starts


class Station:
    """S3, STAC and Prefect servers, a Dask scheduler with two workers, and a Prefect worker with our deployments.

    Attributes:
        environment: The variables that point rangegrid, Prefect and S3 clients at it, in every part of it.
        proxy: Before the S3 server; rangegrid knows no other endpoint.
        running: The process of each part that was started.
        due: When a part that was killed is started again, in seconds since the epoch.
    """

    def __init__(self, home: Path, **variables: str) -> None:
        with sandbox.running(home / "sandbox", PlanetSpec(cells=CELLS), prefect=False) as box:
            pass  # it builds the planet and stops its servers, which are ours from here on
        self.home, self.box, self.mark = home, box, secrets.token_hex(8)
        box.ports["prefect"], box.ports["scheduler"] = servers.free_ports(1), servers.free_ports(1)
        self.scheduler = f"tcp://{servers.HOST}:{box.ports['scheduler'][0]}"
        self.proxy = Proxy(box.endpoint)
        self.proxy.start()
        self.environment = {
            **box.environment(),
            MARK: self.mark,
            "RANGEGRID_S3_ENDPOINT": self.proxy.url,
            "RANGEGRID_CLUSTER": self.scheduler,
            "DASK_CONFIG": str(clusters.CONFIG),  # as every worker of ours
            "PREFECT_HOME": str(home / "prefect-home"),
            "PYTHONDONTWRITEBYTECODE": "",  # a pipeline starts six processes: let none compile what it imports anew
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": servers.LEASES,
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            **variables,
        }
        self.commands = self._commands()
        self.running: dict[str, servers.Process] = {}
        self.due: dict[str, float] = {}

    def _commands(self) -> dict[str, list[str]]:
        ports, data = self.box.ports, self.box.directory
        dask, prefect = [sys.executable, "-m", "dask"], [sys.executable, "-m", "prefect"]
        place = ["--host", servers.HOST, "--port", str(ports["scheduler"][0]), "--no-dashboard"]
        alone = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--name"]
        return {
            "s3": servers.s3_command(data / "s3", ports["s3"]),
            "stac": servers.stac_command(
                ports["stac"][0], [data / f"planet/{x}.json" for x in ("collection", "items")]
            ),
            "prefect": servers.prefect_command(ports["prefect"][0]),
            "scheduler": [*dask, "scheduler", *place],
            **{name: [*dask, "worker", self.scheduler, *alone, name] for name in DASK_WORKERS},
            "worker": [*prefect, "worker", "start", "--pool", "rangegrid", "--type", "process"],
        }

    def open(self) -> None:
        """Starts every part, and deploys."""
        for name in PARTS[:-1]:
            self.start(name)
        for name in ("s3", "stac", "prefect"):
            servers.wait(name, lambda name=name: self.answers(name), self.running[name], self.log(name), PATIENCE)
        with Client(self.scheduler, timeout=PATIENCE) as client:
            client.wait_for_workers(len(DASK_WORKERS), timeout=PATIENCE)
        self.prefect("work-pool", "create", "rangegrid", "--type", "process")
        self.prefect("--no-prompt", "deploy", "--all")
        self.start("worker")

    def log(self, name: str) -> Path:
        """The file of a part's output; it works in a folder of its own."""
        return self.home / name / "logs" / "output.log"

    def start(self, name: str, **variables: str) -> None:
        """Starts a part, at the same address as before; it dies with this process."""
        environment = self.environment | variables
        self.running[name] = servers.start(self.commands[name], self.log(name), environment, bound=True)

    def answers(self, name: str) -> bool:
        """Whether a server (s3, stac, prefect) answers."""
        return self.box.answers(name)

    def kill(self, name: str, family: bool = True, seconds: float = 0.0) -> None:
        """kill -9 of a part, with what it started or alone; `supervise` starts it again after some seconds."""
        self.due[name] = time.time() + seconds
        found = servers.find(self.running[name])
        kill(*(found.children(recursive=True) if found and family else []), *([found] if found else []))

    def supervise(self) -> None:
        """Starts again what died, as systemd or a container engine does."""
        for name, process in list(self.running.items()):
            if not servers.is_alive(process) and self.due.get(name, 0.0) < time.time():
                self.start(name)

    def prefect(self, *command: str) -> None:
        """Prefect's command line, where `prefect.yaml` is."""
        environment = os.environ | self.environment
        subprocess.run([sys.executable, "-m", "prefect", *command], cwd=ROOT, env=environment, check=True, timeout=300)

    def others(self) -> list[psutil.Process]:
        """The processes that parts started, now or before they died: engines, and whatever engines start."""
        parts = {process.pid for process in self.running.values()}
        server = servers.find(self.running["prefect"])
        parts |= {child.pid for child in server.children(recursive=True)} if server else set()
        return [process for process in self._marked() if process.pid not in parts]

    def engines(self) -> list[psutil.Process]:
        """The processes that run flows, the first started first."""
        found = [process for process in self.others() if "prefect.engine" in " ".join(command(process))]
        return sorted(found, key=psutil.Process.create_time)

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                gone = process.status() == psutil.STATUS_ZOMBIE
                if not gone and process.pid != os.getpid() and process.environ().get(MARK) == self.mark:
                    yield process

    def close(self) -> None:
        """Stops every part, kills what is left, and tells it from what ended well."""
        for name in reversed(PARTS):
            if name in self.running:
                servers.stop(self.running[name])
        kill(*self._marked())
        self.proxy.stop()


def command(process: psutil.Process) -> list[str]:
    """A process's command line; empty, if it is gone."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def kill(*processes: psutil.Process) -> None:
    """kill -9."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)


def start(name: str, params: Params, **arguments: str) -> FlowRun:
    """Starts a run of a deployment of that name, and does not wait for it."""
    parameters = {**arguments, "params": json.loads(params.model_dump_json())}
    return run_deployment(f"{name}/{name}", parameters=parameters, timeout=0, as_subflow=False)


def state(run: FlowRun) -> State:
    """The state of a run as the server has it."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(run.id).state
    assert found is not None
    return found
