"""Fixtures for all: the sandbox's real servers, the real data for checks, and a clean environment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings
from prefect.testing.utilities import prefect_test_harness

from infra import sandbox as sandbox_module
from infra.sandbox import servers
from infra.sandbox.planet import PlanetSpec

settings.register_profile("rangegrid", deadline=None, derandomize=True)
settings.load_profile("rangegrid")

CELLS = ("01K", "30T", "31T", "31U", "32T", "32U", "60K")  # western Europe, and Fiji on both sides of 180 degrees


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Programs that tests start must take SIGINT, also where a shell ran the tests in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory):
    """A sandbox with a small planet; its variables are in the environment while the tests run."""
    with sandbox_module.running(tmp_path_factory.mktemp("sandbox"), PlanetSpec(cells=CELLS), prefect=False) as box:
        before = dict(os.environ)
        os.environ.update(box.environment())
        yield box
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def prefect():
    """Prefect's test server: flows run against it."""
    with prefect_test_harness(server_startup_timeout=240):
        yield


@pytest.fixture(scope="module")
def cluster(sandbox, tmp_path_factory):
    """Address of a scheduler with two workers, each a process of its own in a directory of its own."""
    (port,) = servers.free_ports(1)
    address = f"tcp://{servers.HOST}:{port}"
    commands = [["scheduler", "--host", servers.HOST, "--port", str(port), "--no-dashboard"]]
    commands += [["worker", address, "--nthreads", "1", "--no-dashboard", "--name", str(i)] for i in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *command],
            cwd=tmp_path_factory.mktemp("worker"),
            stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]
    until = time.monotonic() + servers.PATIENCE
    while servers.is_free(port) and time.monotonic() < until:
        time.sleep(0.1)
    yield address
    for process in reversed(started):
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def fixtures_dir():
    """The folder of real Sentinel-2 pixels, items and labels."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    found = Path(os.environ.get("RANGEGRID_FIXTURES", beside))
    if not found.is_dir():
        pytest.skip(f"no real data at {found}: set RANGEGRID_FIXTURES")
    return found
