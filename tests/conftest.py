"""Fixtures for all: the sandbox's real servers, the real data for checks, and a clean environment."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import prefect.main  # its import sets logging up: within a test, it would take the handler of caplog away
import pyarrow.parquet
import pytest
import stac_geoparquet.arrow
from hypothesis import settings

from infra import clusters
from infra import sandbox as sandbox_module
from infra.sandbox import servers
from infra.sandbox.planet import PlanetSpec
from tasks.core.sentinel2.items import NAMES
from tests import providers
from tests.waiting import until

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
    from prefect.testing.utilities import prefect_test_harness  # the server itself, which most tests need not import

    with prefect_test_harness(server_startup_timeout=240):
        yield


@pytest.fixture(scope="module")
def cluster(sandbox, tmp_path_factory):
    """Address of a scheduler with two workers, each a process of its own in a directory of its own."""
    every_key = {"DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "100000"}  # that there ever was
    with dask_processes(tmp_path_factory.mktemp("dask"), workers=2, **every_key) as (address, _):
        yield address


@contextmanager
def dask_processes(folder, workers, *flags, **variables):
    """The address of a scheduler, which takes a port by itself, and the processes of its workers."""
    told = folder / "scheduler.json"
    names = ["scheduler", *map(str, range(workers))]
    for name in names:
        (folder / name).mkdir()
    ours = ["--scheduler-file", told, "--no-dashboard"]
    commands = [["scheduler", "--host", servers.HOST, "--port", "0", *ours]]
    commands += [["worker", "--nthreads", "1", "--name", name, *ours, *flags] for name in names[1:]]
    env = os.environ | {"DASK_CONFIG": str(clusters.CONFIG)} | variables  # as every worker of ours
    options = {"env": env, "stderr": subprocess.DEVNULL}
    started = [
        subprocess.Popen([sys.executable, "-m", "dask", *map(str, command)], cwd=folder / name, **options)
        for name, command in zip(names, commands, strict=True)
    ]
    try:
        yield until(lambda: told.exists() and told.read_text() and json.loads(told.read_text())["address"]), started[1:]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def client():
    """A client of two threads of this process."""
    with clusters.connect("threads", 2) as client:
        yield client


@pytest.fixture(scope="session")
def nobody():
    """A host and port at which nothing listens, and nothing else can meanwhile."""
    with socket.socket() as held:
        held.bind((servers.HOST, 0))
        yield f"{servers.HOST}:{held.getsockname()[1]}"


@pytest.fixture(scope="session")
def fixtures_dir():
    """The folder of real Sentinel-2 pixels, items and labels."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    found = Path(os.environ.get("RANGEGRID_FIXTURES", beside))
    if not found.is_dir():
        pytest.skip(f"no real data at {found}: set RANGEGRID_FIXTURES")
    return found


@pytest.fixture(scope="session")
def mounting(tmp_path_factory):
    """The beginning of a command that may mount file systems, which no other process sees."""
    beginning = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "none", str(tmp_path_factory.mktemp("mount"))]
    tried = subprocess.run([*beginning, *mount], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no file system may be mounted here: {tried.stderr.strip()}")
    return beginning


PROVIDERS = {  # by a sign in the items' hrefs; the first that fits counts
    "s3://deafrica-": "Digital Earth Africa",  # its metadata are still Earth Search's
    "sentinel2l2a01.blob.core.windows.net": "Planetary Computer",
    "e84-earth-search-sentinel-data": "Earth Search, Collection 1",
    "sentinel-cogs": "Earth Search",
}


@pytest.fixture(scope="session")
def recorded_items(fixtures_dir):
    """Every real item of Sentinel-2 of the handled archives, by provider; one item can be in several files."""
    found = {name: [] for name in PROVIDERS.values()}
    for path in sorted(fixtures_dir.rglob("*.json")):
        content = json.loads(path.read_text())
        for item in content.get("features", [content]):
            if item["type"] == "Feature" and (provider := _provider(item)):
                found[provider].append(item)
    for path in sorted(fixtures_dir.rglob("*.parquet")):
        for item in stac_geoparquet.arrow.stac_table_to_items(pyarrow.parquet.read_table(path)):
            found[_provider(item)].append(item)
    return found


@pytest.fixture(scope="session", params=["made up", "recorded"])
def items(request):
    """Items by provider: those made up in each one's form always, and the recorded ones where they are there."""
    return request.getfixturevalue("recorded_items") if request.param == "recorded" else providers.made_up()


@pytest.fixture(scope="session", params=["made up", "recorded"])
def colorado(request):
    """Planetary Computer's items of 2024 around Colorado, each once: made up, and the recorded ones where they are."""
    if request.param == "made up":
        return providers.month()
    recorded = request.getfixturevalue("recorded_items")["Planetary Computer"]
    found = {item["id"]: item for item in recorded if item["properties"]["datetime"] > "2024"}
    assert len(found) == 1080
    return list(found.values())


@pytest.fixture(scope="session", params=["made up", "recorded"])
def whole_scene(request, tmp_path_factory):
    """One scene of thirteen files: made up, and the recorded one where it is there."""
    if request.param == "made up":
        return providers.made_scene(tmp_path_factory.mktemp("scene"))
    folder = request.getfixturevalue("fixtures_dir") / "s2_scene_29RKH"
    item = json.loads((folder / "S2A_29RKH_20200219_0_L2A.json").read_text())
    return providers.whole_scene(item, {band: str(folder / f"{band}.tif") for band in NAMES})


def _provider(item):
    """The archive that serves an item's assets; nothing for one that is not handled."""
    hrefs = " ".join(asset["href"] for asset in item["assets"].values())
    return next((name for sign, name in PROVIDERS.items() if sign in hrefs), None)
