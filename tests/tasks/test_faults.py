"""Publication under faults: the finished grid is byte for byte an undisturbed run's, and `latest` always opens.

A reader polls all the while. It counts when it is not served, and compares what it is served with the two grids that
there can be: the old one, and, once the pointer has moved, the new one.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import s3fs
import xarray as xr
from obstore.exceptions import BaseError

from infra import clusters, storage
from infra.errors import UserError
from infra.sandbox import servers
from tasks.cards import read_card
from tasks.database.store import create_database, finish_database, write_rows
from tasks.params import PublishParams
from tasks.products import CheckpointCard
from tasks.publish import publish_grid
from tasks.release import versions
from tests.proxy import Proxy, Reply, dropped, lost, named, status
from tests.tasks.test_publish import DIM, VALUES, images, store_checkpoint

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
BUCKET = "faults"
COMMON = f"s3://{BUCKET}/common"
OLD, NEW, THIRD = (PublishParams(step=10.0, tile_cells=5, method="range+", beta=beta) for beta in (0.5, 0.3, 0.7))
RUNS = 3  # at most: what stays broken after a rerun or two is a fault of ours
IMAGES = 300


class Server:
    """An S3 server that can be killed and started again."""

    def __init__(self, directory):
        self.directory, self.ports = directory, servers.free_ports(5)
        self.url = f"http://{servers.HOST}:{self.ports[0]}"
        (directory / "s3").mkdir()
        self.start(bound=True)

    def start(self, bound=False):
        """Starts it; bound to the life of this thread, or not."""
        log = self.directory / "logs/s3.log"
        keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        self.process = servers.start(servers.s3_command(self.directory / "s3", self.ports), log, keys, bound)
        servers.wait("s3", lambda: servers.s3_answers(self.ports), self.process, log)

    def kill(self):
        """kill -9."""
        found = servers.find(self.process)
        for process in [*found.children(recursive=True), found]:
            process.kill()
        psutil.wait_procs([found], timeout=10)

    def kill_for(self, seconds):
        """kill -9, and a start by someone else some time later."""
        self.kill()
        threading.Timer(seconds, self.start).start()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An S3 server of our own behind a proxy, with a checkpoint and a database in it."""
    with pytest.MonkeyPatch.context() as patch:
        keys = {"AWS_ACCESS_KEY_ID": "faultskey", "AWS_SECRET_ACCESS_KEY": "faultssecret" * 3}
        for name, value in keys.items():
            patch.setenv(name, value)
        found = Server(tmp_path_factory.mktemp("faults"))
        with Proxy(found.url) as proxy:
            patch.setenv("RANGEGRID_S3_ENDPOINT", proxy.url)
            patch.setenv("RANGEGRID_CLUSTER", "threads")
            s3fs.S3FileSystem(endpoint_url=found.url, skip_instance_cache=True).mkdir(BUCKET)
            found.proxy = proxy
            make_inputs(COMMON)
            yield found
        servers.stop(found.process)


def make_inputs(home):
    """A checkpoint and a database below a URL."""
    space = read_card(store_checkpoint(home), CheckpointCard).fingerprint
    url, arrays = f"{home}/database", images(np.arange(IMAGES))
    create_database(url, IMAGES, DIM, VALUES, IMAGES)
    write_rows(url, 0, arrays)
    finish_database(url, checkpoint=space, fingerprint="faults", attribution="nobody")


@pytest.fixture
def proxy(server):
    """The proxy before the server, without faults at the start and at the end."""
    server.proxy.heal()
    server.proxy.faults.clear()
    yield server.proxy
    server.proxy.heal()
    await_answer(server.url)


@pytest.fixture(scope="module")
def client(server):
    """Two workers in processes of their own."""
    with clusters.connect("local", 2) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(server, client):
    """The objects, and the values, of the grids that undisturbed runs make, by parameters."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", f"s3://{BUCKET}/undisturbed")
        for params in (OLD, NEW, THIRD):
            grid = publish(client, params)
            found[params] = versions.name_of(grid), objects(grid), values(grid)
    return found


@pytest.fixture
def home(undisturbed, proxy, tmp_path, monkeypatch):
    """Storage of its own for each test, in which the old version is the latest."""
    url = f"s3://{BUCKET}/{tmp_path.name}"
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", url)
    name, old, _ = undisturbed[OLD]
    for path, data in old.items():
        storage.write(storage.join(url, "grids", name, path), data)
    versions.promote(versions.find(name))
    return url


def publish(client, params):
    return publish_grid(client, f"{COMMON}/checkpoint", f"{COMMON}/database", params)


def publish_in_spite(client, params):
    """Runs again where a run gave up."""
    for _ in range(RUNS):
        try:
            return publish(client, params)
        except UserError as error:
            last = error
            await_answer(os.environ["RANGEGRID_S3_ENDPOINT"])
    raise last


def await_answer(url):
    """Waits until a server answers with anything but that it cannot."""
    until = time.monotonic() + servers.PATIENCE
    while time.monotonic() < until:
        with suppress(httpx.HTTPError):
            if httpx.get(url).status_code < 500:
                return
        time.sleep(0.1)


def objects(grid):
    """Every object of a version, by its path in it."""
    home = grid.removesuffix("/grid.zarr")
    prefix = storage._locate(home)[1] + "/"
    bucket = home.removesuffix(prefix.rstrip("/"))
    return {meta["path"].removeprefix(prefix): storage.read(bucket + meta["path"]) for meta in storage._list(home)}


def values(grid):
    return xr.open_zarr(storage.zarr_store(grid, read_only=True), chunks=None).embedding.values


@contextmanager
def reader(undisturbed):
    """Polls `latest` while the block runs; at its end every grid that was served must have been whole."""
    expected = {name: vectors for name, _, vectors in undisturbed.values()}
    seen, wrong, stop = [], [], threading.Event()

    def poll():
        while not stop.is_set():
            with suppress(BaseError, OSError, UserError):  # not served: that is not a wrong grid
                grid = storage.read_json(versions.pointer_url())["grid"]
                found = values(grid)
                same = np.array_equal(found, expected[versions.name_of(grid)], equal_nan=True)
                seen.append(versions.name_of(grid))
                if not same:
                    wrong.append((grid, np.isnan(found).sum() - np.isnan(expected[versions.name_of(grid)]).sum()))
            stop.wait(0.02)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert seen


TELL_WHEN = {"item.json", "model.json", "source.json"}  # in which times of writing stand, where no sample tells them


def assert_whole(grid, expected):
    """The version's objects are those that an undisturbed run makes."""
    found = objects(grid)
    assert found.keys() == expected.keys()
    assert {path for path in found if found[path] != expected[path]} <= TELL_WHEN


def assert_published(grid, undisturbed, params):
    """The version is what an undisturbed run makes, and is the latest, after the old one."""
    name, expected, _ = undisturbed[params]
    assert versions.name_of(grid) == name
    assert_whole(grid, expected)
    pointer, _ = versions.read_pointer()
    assert (pointer.grid, pointer.previous) == (grid, versions.find(undisturbed[OLD][0]))


def shard(request):
    """A shard is written."""
    return request.method == "PUT" and "/embedding/c/" in request.path


def pointer(request):
    """The pointer is written."""
    return request.method == "PUT" and request.path.endswith("latest.json")


def first(action):
    """Before the request is passed on, something happens."""
    return named("first", lambda request, ask: (action(), ask())[1])


def instead(action):
    """Something happens, and the request is never passed on."""
    return named("instead", lambda request, ask: (action(), None)[1])


def then(action):
    """After the request is done, and before it is answered, something happens."""
    return named("then", lambda request, ask: (ask(), action())[0])


def half_sent(server, action=lambda: None):
    """The server gets half of the body, then something happens to it, then the connection ends."""

    def fault(request, ask):
        with socket.create_connection((servers.HOST, server.ports[0])) as line:
            head = [f"{request.method} {request.path} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items())]
            line.sendall("\r\n".join([*head, "", ""]).encode() + request.body[: len(request.body) // 2])
            time.sleep(0.05)
            action()

    return named("half sent", fault)


def slow_down():
    """503 SlowDown, as S3 answers those who ask too much."""
    body = (
        b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    )
    headers = {"Content-Type": "application/xml"}
    return named("slow down", lambda request, ask: Reply(503, headers, body))


def test_a_slow_store_and_truncated_uploads(server, proxy, home, client, undisturbed):
    proxy.inject(slow_down(), share=0.1, seed=1)
    proxy.inject(half_sent(server), shard, times=5, skip=2)
    with reader(undisturbed) as seen:
        grid = publish_in_spite(client, NEW)
    assert proxy.faults["slow down"] > 5
    assert proxy.faults["half sent"] == 5
    assert seen[0] == undisturbed[OLD][0]
    assert_published(grid, undisturbed, NEW)


@pytest.mark.parametrize("fault", [dropped(), lost(), status(500)], ids=["dropped", "lost", "error"])
def test_answers_that_fail(proxy, home, client, undisturbed, fault):
    proxy.inject(fault, lambda request: request.method == "PUT", share=0.3, seed=2)
    with reader(undisturbed):
        grid = publish_in_spite(client, NEW)
    assert proxy.faults.total() > 5
    assert_published(grid, undisturbed, NEW)


def test_a_killed_worker(proxy, home, client, undisturbed):
    """kill -9 when its first shard arrives, while both are at work."""
    killed, _ = client.run(os.getpid).values()
    proxy.inject(first(lambda: os.kill(killed, signal.SIGKILL)), shard, times=1)
    with reader(undisturbed):
        grid = publish(client, NEW)
    assert proxy.faults["first"] == 1
    assert killed not in client.run(os.getpid).values()
    assert_published(grid, undisturbed, NEW)


@pytest.mark.parametrize("times", [1, 3])
def test_a_killed_server(server, proxy, home, client, undisturbed, times):
    """kill -9 of the S3 server when it has half of a shard; it comes back after a while."""
    proxy.inject(half_sent(server, lambda: server.kill_for(1.5)), shard, times=1, skip=4)
    if times > 1:
        proxy.inject(half_sent(server, lambda: server.kill_for(1.5)), shard, times=1, skip=12)
        proxy.inject(half_sent(server, lambda: server.kill_for(1.5)), pointer, times=1)
    with reader(undisturbed):
        grid = publish_in_spite(client, NEW)
    assert proxy.faults["half sent"] == times
    assert_published(grid, undisturbed, NEW)


PUBLISH = """
import sys
from infra import clusters
from infra.errors import UserError
from tasks.params import PublishParams
from tasks.publish import publish_grid
try:
    with clusters.connect() as client:
        params = PublishParams(step=10.0, tile_cells=5, method="range+", beta=float(sys.argv[2]))
        print(publish_grid(client, sys.argv[1] + "/checkpoint", sys.argv[1] + "/database", params))
except UserError as error:
    print(error)
    sys.exit(2)
"""


def flow(params):
    """A run in a process of its own."""
    command = [sys.executable, "-c", PUBLISH, COMMON, str(params.beta)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize(
    ("fault", "when", "skip", "moved"),
    [(instead, shard, 5, False), (instead, pointer, 0, False), (then, pointer, 0, True)],
    ids=["shard", "before the pointer", "after the pointer"],
)
def test_a_killed_flow(proxy, home, client, undisturbed, fault, when, skip, moved):
    """kill -9 at a shard, before the pointer's write, and after it; the run after it goes on."""
    run = flow(NEW)
    proxy.inject(fault(lambda: (run.kill(), run.wait())), when, times=1, skip=skip)
    with reader(undisturbed) as seen:
        assert run.wait(400) == -signal.SIGKILL
        time.sleep(0.5)
        latest, _ = versions.read_pointer()
        assert latest.fingerprint == undisturbed[NEW if moved else OLD][0]
        proxy.heal()
        proxy.requests.clear()
        grid = publish(client, NEW)
        again = sum(count for (method, path), count in proxy.requests.items() if method == "PUT" and "/c/0/" in path)
    assert seen[0] == undisturbed[OLD][0]
    tiles = sum("/embedding/c/" in path for path in undisturbed[NEW][1])
    assert again == 0 if when is pointer else 0 < again < tiles
    assert_published(grid, undisturbed, NEW)


def test_two_runs_of_the_same_parameters(home, undisturbed):
    runs = [flow(NEW), flow(NEW)]
    with reader(undisturbed):
        printed = [run.communicate(timeout=400)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert printed[0] == printed[1]
    assert_published(printed[0], undisturbed, NEW)


def test_of_two_runs_one_wins(proxy, home, client, undisturbed):
    """Both hold the pointer that they found, and write it at the same moment; the loser's grid waits, whole."""
    together = threading.Barrier(2)
    proxy.inject(first(lambda: together.wait(400)), pointer, times=2)
    runs = {params: flow(params) for params in (NEW, THIRD)}
    with reader(undisturbed):
        printed = {params: run.communicate(timeout=400)[0].strip() for params, run in runs.items()}
    assert sorted(run.returncode for run in runs.values()) == [0, 2]
    (winner,) = [params for params, run in runs.items() if run.returncode == 0]
    (loser,) = set(runs) - {winner}
    assert "was moved from" in printed[loser]
    assert_published(printed[winner], undisturbed, winner)
    name, expected, _ = undisturbed[loser]
    waiting = versions.find(name)
    assert_whole(waiting, expected)
    assert publish(client, loser) == waiting == versions.read_pointer()[0].grid


FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
from shutil import disk_usage
from tests.tasks.test_faults import NEW, OLD, assert_whole, make_inputs, objects, publish_here, values
from infra.errors import UserError
from tasks.release import versions

room, home = Path(sys.argv[1]) / "room", Path(sys.argv[1]) / "home"
home.mkdir(), room.mkdir()
make_inputs(home.as_uri())
os.environ["RANGEGRID_STORAGE_URL"] = room.as_uri()
expected = objects(publish_here(home.as_uri(), NEW))
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(room)], check=True)
old = publish_here(home.as_uri(), OLD)
before = values(old)
(room / "filler").write_bytes(bytes(disk_usage(room).free - 120_000))
try:
    publish_here(home.as_uri(), NEW)
    print("published on a full disk")
except UserError as error:
    print(error)
assert versions.read_pointer()[0].grid == old
assert (values(old) == before)[~(before != before)].all()
(room / "filler").unlink()
grid = publish_here(home.as_uri(), NEW)
assert_whole(grid, expected)
assert versions.read_pointer()[0].grid == grid
print("whole")
"""


def publish_here(inputs, params):
    """A run on threads of this process."""
    with clusters.connect("threads", 2) as client:
        return publish_grid(client, f"{inputs}/checkpoint", f"{inputs}/database", params)


def test_a_full_disk(tmp_path, mounting):
    """A file system of 4 MB that others have filled but for 120 kB; then they make room."""
    command = [*mounting, sys.executable, "-c", FULL_DISK, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.strip().splitlines()
    assert "no space is left at" in said[0]
    assert said[-1] == "whole"
