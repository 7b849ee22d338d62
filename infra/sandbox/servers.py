"""Runs the sandbox's servers as child processes on loopback: S3 (SeaweedFS), STAC (rustac), Prefect."""

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from infra.errors import UserError
from infra.sandbox.tether import die_with_parent

PATIENCE = 90.0  # seconds until a server must answer; Prefect's takes about 20
HOST = "127.0.0.1"
LEASES = "prefect.server.concurrency.lease_storage.filesystem"  # in memory, a restart takes their places from runs
GRPC = 10_000  # SeaweedFS adds this to a port to find its gRPC side


def free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now, each with a free one 10,000 above for SeaweedFS's gRPC."""
    ports = (port for port in random.sample(range(20_000, 30_000), 5_000))
    return list(itertools.islice((p for p in ports if is_free(p) and is_free(p + GRPC)), count))


def is_free(port: int) -> bool:
    """Tells whether nothing listens at a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0


class Process(NamedTuple):
    """A server's process: the id alone may by now be another's."""

    pid: int
    """Process id."""
    started: float
    """When it started, in seconds since the epoch."""


def find(process: Process) -> psutil.Process | None:
    """Returns the process if it is still running; a zombie is not."""
    try:
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.started) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return found if same else None


def is_alive(process: Process) -> bool:
    """Tells whether a process is running."""
    return find(process) is not None


def start(command: list[str], log: Path, environment: dict[str, str], bound: bool) -> Process:
    """Starts a server in a session of its own.

    Args:
        command: Program and arguments.
        log: File that takes its output; the server works in the folder above the log's.
        environment: Variables to add to ours.
        bound: Whether the server dies with this process, even by kill -9.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            cwd=log.parent.parent,
            start_new_session=True,
            preexec_fn=die_with_parent if bound else None,
        )
    return Process(process.pid, psutil.Process(process.pid).create_time())


def stop(process: Process) -> None:
    """Ends a server and its children: asked first, then made to."""
    found = find(process)
    if found is None:
        return
    family = [found, *found.children(recursive=True)]
    for member in family:
        _signal(member, signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=10)
    for member in left:
        _signal(member, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)


def _signal(process: psutil.Process, sign: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(sign)


def wait(name: str, answers: Callable[[], bool], process: Process, log: Path, patience: float = PATIENCE) -> None:
    """Waits until a server answers, at most `patience` seconds.

    Raises:
        UserError: It ended, or does not answer in time.
    """
    until = time.monotonic() + patience
    while not answers():
        if not is_alive(process):
            raise UserError(f"the sandbox's {name} server ended at its start: see {log}")
        if time.monotonic() > until:
            raise UserError(f"the sandbox's {name} server did not answer in {patience:.0f} s: see {log}")
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Tells whether an HTTP server answers at `url`, with any status."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def s3_answers(ports: list[int]) -> bool:
    """Tells whether the S3 server answers and knows its data, which after a restart can take seconds more.

    Args:
        ports: Those of `s3_command`.
    """
    try:
        with urllib.request.urlopen(f"http://{HOST}:{ports[1]}/dir/status", timeout=5) as answer:
            volumes = json.load(answer)["Topology"].get("DataCenters")
    except OSError:
        return False
    return bool(volumes) and answers(f"http://{HOST}:{ports[0]}/")


def s3_command(directory: Path, ports: list[int]) -> list[str]:
    """Returns the command of the S3 server, which needs five ports; the first is S3's."""
    services = ("s3", "master", "filer", "volume", "admin")
    flags = [
        flag
        for name, port in zip(services, ports, strict=True)
        for flag in (f"-{name}.port={port}", f"-{name}.port.grpc={port + GRPC}")
    ]
    return [
        program("weed"),
        "-logtostderr=true",  # to where its output goes, rather than into the machine's directory of temporary files
        "mini",
        f"-dir={directory}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *flags,
        "-s3.autoCreateBucket=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-volume.max=0",
        "-filer.localSocket=filer.sock",  # in the server's folder: a path from the root can be too long for a socket
        "-s3.localFilerSocket=filer.sock",
        "-s3.localSocket=s3.sock",
    ]


def stac_command(port: int, files: list[Path]) -> list[str]:
    """Returns the command of the STAC API server over a collection and an item collection."""
    return [program("rustac"), "serve", "--addr", f"{HOST}:{port}", *map(str, files)]


def prefect_command(port: int) -> list[str]:
    """Returns the command of the Prefect server."""
    return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]


def program(name: str) -> str:
    """Returns the path of an installed program.

    Raises:
        UserError: It is not installed.
    """
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise UserError(f"the program {name!r} is not installed: `make demo` installs it with the sandbox group")
    return found
