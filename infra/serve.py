"""Serves on one machine: a Prefect server, its deployments, and a worker, in a terminal or permanently by systemd."""

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from infra import deployments
from infra.deployments import POOL, Take
from infra.errors import UserError
from infra.reconcile import begun
from infra.sandbox import servers
from infra.settings import FILE, Settings, file, settings

PORT = 4200  # Prefect's default port
PATIENCE = 300.0  # seconds for a server to start: the first start makes the database, perhaps on a busy machine
FAREWELL = 30.0  # seconds for a run to tell the server that it was ended
STOPPED = "stopped with `rangegrid serve`: run it again, and it goes on from what is stored"
UNITS = ("rangegrid-server", "rangegrid-worker")


def serve(port: int, schedules: Path | None, take: Take | None, say: Callable[[str], None]) -> None:
    """Serves until Ctrl-C: starts or joins a server, makes what runs on it, and runs a worker.

    Args:
        port: Of a server that is started; one that answers there already is joined.
        schedules: The operator's file; by default `schedules.yaml` beside the settings file.
        take: What becomes of what was set in the UI (`infra.deployments.deploy`).
        say: Takes each line to print.

    Raises:
        UserError: The settings would lose products, the port is another's, or a part ended by itself.
    """
    check(settings())
    with _interruptible(), _server(port, say) as url, temporary_settings({PREFECT_API_URL: url}):
        for told in deployments.deploy(schedules, take):
            say(f"{told.name}: {told.what}")
        log = home() / "logs" / "worker.log"
        worker = servers.start(worker_command(), log, environment(url), bound=True)
        try:
            tell(url, log, say)
            _watch(worker, url, log)
        finally:
            say("stopping: runs under way end, and go on when they are run again")
            _stop(worker)


def check(found: Settings) -> None:
    """Refuses settings under which runs would lose what they make.

    Raises:
        UserError: No storage is set.
    """
    if "storage_url" not in found.model_fields_set:
        raise UserError(
            f"RANGEGRID_STORAGE_URL is not set, and a run works in a directory of its own: put it into {file()}, for "
            "example RANGEGRID_STORAGE_URL=products, a directory beside that file"
        )


def home() -> Path:
    """Returns the directory of a server of ours: its database unless that is PostgreSQL, its leases and its logs."""
    return file().parent / "prefect"


def environment(url: str) -> dict[str, str]:
    """Returns the variables of a worker, and of the runs that it starts: those of this process, and these.

    Args:
        url: The API that it works for.
    """
    found = {"PREFECT_API_URL": url, "PYTHONUNBUFFERED": "1", "PREFECT_LOGGING_LEVEL": logging_level()}
    return found | ({FILE: str(file())} if file().is_file() else {})


def logging_level() -> str:
    """Returns the logging level of a worker and its runs; a command has silenced its own alone."""
    level = os.environ.get("PREFECT_LOGGING_LEVEL", "")
    if level not in ("", "CRITICAL"):
        return level
    return "INFO"


def server_environment(found: Settings, port: int) -> dict[str, str]:
    """Returns the variables of the Prefect server: where its data are, and that leases outlive it."""
    variables = {
        "PREFECT_HOME": str(home()),
        "PREFECT_API_URL": f"http://{servers.HOST}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": servers.LEASES,
    }
    if found.prefect_database:
        url = re.sub(r"^postgres(ql)?(\+asyncpg)?:", "postgresql+asyncpg:", found.prefect_database.get_secret_value())
        variables["PREFECT_API_DATABASE_CONNECTION_URL"] = url
    return variables


def worker_command() -> list[str]:
    """Returns the command of a worker of the pool, whatever the pool's type."""
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL]


@contextmanager
def _server(port: int, say: Callable[[str], None]) -> Iterator[str]:
    """Yields the URL of the server that is set, of one that answers at the port, or of a new one for the block."""
    if PREFECT_API_URL.value():
        yield deployments.api_url()
        return
    url = f"http://{servers.HOST}:{port}/api"
    if servers.answers(f"{url}/health"):
        say(f"a Prefect server answers at {url} already, and is joined")
        yield url
        return
    if not servers.is_free(port):
        raise UserError(f"port {port} is taken by something that is no Prefect server: give another --port")
    log = home() / "logs" / "server.log"
    say(f"starting a Prefect server; it writes to {log}")
    process = servers.start(servers.prefect_command(port), log, server_environment(settings(), port), bound=True)
    try:
        servers.wait("Prefect", lambda: servers.answers(f"{url}/health"), process, log, PATIENCE)
        yield url
    finally:
        servers.stop(process)


def tell(url: str, log: Path, say: Callable[[str], None]) -> None:
    """Tells where everything is, and what is scheduled."""
    say(f"UI         {url.removesuffix('/api')}")
    say(f"commands   export PREFECT_API_URL={url}")
    say(f"products   {settings().storage_url}")
    say(f"worker     writes to {log}; runs log to the UI")
    with get_client(sync_client=True) as client:
        for name, when in deployments.upcoming(client):
            say(f"scheduled  {name}: {when}")
    say("serving; Ctrl-C stops it")


def _watch(worker: servers.Process, url: str, log: Path) -> None:
    """Waits until Ctrl-C.

    Raises:
        UserError: A part ended by itself.
    """
    while servers.is_alive(worker):
        if not servers.answers(f"{url}/health") and not servers.answers(f"{url}/health"):
            raise UserError(f"the Prefect server at {url} does not answer any more: see {home() / 'logs'}")
        time.sleep(2)
    raise UserError(f"the worker ended by itself: see {log}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Makes SIGTERM end the block quietly, as Ctrl-C does; a second one does not cut the farewell short."""
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(*_: int | FrameType | None) -> None:
        for sign in before:
            signal.signal(sign, signal.SIG_IGN)
        raise KeyboardInterrupt

    for sign in before:
        signal.signal(sign, interrupt)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _stop(worker: servers.Process) -> None:
    """Ends the worker and its runs, and tells the server of each that it ended."""
    found = servers.find(worker)
    if found is None:
        return
    runs = found.children(recursive=True)
    for process in [found, *runs]:  # the worker first: it takes up no other
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    psutil.wait_procs([*runs, found], timeout=FAREWELL)
    servers.stop(worker)
    own = {str(process.pid) for process in runs}
    with get_client(sync_client=True) as client:
        for run in begun().ours:
            if run.infrastructure_pid in own:
                client.set_flow_run_state(run.id, Crashed(message=STOPPED), force=True)


def become(part: str, port: int, schedules: Path | None) -> None:
    """Turns this process into one part, as a unit of systemd runs it: `server`, or `worker` with what it deploys.

    Raises:
        UserError: The settings would lose products, or no server answers.
    """
    check(settings())
    if part == "server":
        command, variables = servers.prefect_command(port), server_environment(settings(), port)
    else:
        url = _await_server()
        for told in deployments.deploy(schedules):
            print(f"{told.name}: {told.what}", flush=True)
        command, variables = worker_command(), environment(url)
    os.execve(command[0], command, os.environ | variables)


def _await_server() -> str:
    """Returns the URL of the server, once it answers: systemd may have started it just now."""
    until = time.monotonic() + PATIENCE
    url = PREFECT_API_URL.value()
    while url and not servers.answers(f"{url}/health") and time.monotonic() < until:
        time.sleep(1)
    return deployments.api_url()


UNIT = """[Unit]
Description={description}
{after}
[Service]
WorkingDirectory={folder}
{environment}
ExecStart={command}
Restart=always
RestartSec=10
{kill}
[Install]
WantedBy=default.target
"""


def write_units(port: int) -> list[Path]:
    """Writes the units of this user's systemd: a server, unless one is set, and a worker, which its runs outlive.

    Args:
        port: Of the server.

    Returns:
        The files.
    """
    check(settings())
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
    folder.mkdir(parents=True, exist_ok=True)
    joined = PREFECT_API_URL.value()
    url = joined or f"http://{servers.HOST}:{port}/api"
    units = {UNITS[1]: _unit("worker", port, "" if joined else f"After={UNITS[0]}.service\n", environment(url))}
    if not joined:
        units = {UNITS[0]: _unit("server", port, "After=network.target\n", environment(url))} | units
    for name, text in units.items():
        (folder / f"{name}.service").write_text(text)
    return [folder / f"{name}.service" for name in units]


def _unit(part: str, port: int, after: str, variables: Mapping[str, str]) -> str:
    program = Path(sys.executable).with_name("rangegrid")
    given: dict[str, Any] = {
        "description": f"rangegrid: the Prefect {part}",
        "after": after,
        "folder": file().parent,
        "environment": "\n".join(f'Environment="{name}={value}"' for name, value in variables.items()),
        "command": shlex.join([str(program), "serve", "--part", part, "--port", str(port)]),
        "kill": "KillMode=process\n" if part == "worker" else "",  # a run outlives its worker's restart
    }
    return UNIT.format_map(given)
