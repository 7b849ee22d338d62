"""Runs the sandbox: real STAC, S3 and Prefect servers on loopback, with the demo planet behind them."""

import json
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import s3fs
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from infra.errors import UserError
from infra.explorer.bundle import rules
from infra.sandbox import servers
from infra.sandbox.planet import BUCKET, Bucket, PlanetSpec, build, collection, items
from infra.sandbox.scenes import COLLECTION

PRODUCTS = "rangegrid"
S3_PORTS = 5


@dataclass(frozen=True)
class Sandbox:
    """A running sandbox."""

    directory: Path
    """Where it keeps its data and its state."""
    ports: dict[str, list[int]]
    """Ports by server; the first is the one to talk to."""
    keys: tuple[str, str] = field(repr=False)
    """S3 access key and secret."""

    @property
    def endpoint(self) -> str:
        """Returns the URL of the S3 server."""
        return f"http://{servers.HOST}:{self.ports['s3'][0]}"

    def environment(self) -> dict[str, str]:
        """Returns the variables that point rangegrid, and any S3 client, at this sandbox."""
        found = {
            "RANGEGRID_STAC_URL": f"http://{servers.HOST}:{self.ports['stac'][0]}",
            "RANGEGRID_COLLECTION": COLLECTION,
            "RANGEGRID_STORAGE_URL": f"s3://{PRODUCTS}",
            "RANGEGRID_S3_ENDPOINT": self.endpoint,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.keys[0],
            "AWS_SECRET_ACCESS_KEY": self.keys[1],
            "AWS_REGION": "us-east-1",
        }
        if "prefect" in self.ports:
            found["PREFECT_API_URL"] = f"http://{servers.HOST}:{self.ports['prefect'][0]}/api"
        return found

    def answers(self, name: str) -> bool:
        """Tells whether a server (s3, stac, prefect) is ready to serve."""
        if name == "s3":
            return servers.s3_answers(self.ports[name])
        path = "/api/health" if name == "prefect" else "/"
        return servers.answers(f"http://{servers.HOST}:{self.ports[name][0]}{path}")


def up(directory: Path, planet: PlanetSpec | None = None, prefect: bool = True) -> Sandbox:
    """Starts what does not run yet; the servers stay until `down`.

    Args:
        directory: Where the sandbox keeps its data and its state.
        planet: The demo planet to build at the first time; by default the whole one.
        prefect: Whether a Prefect server belongs to it.
    """
    return _up(directory, planet or PlanetSpec(), prefect, bound=False)


@contextmanager
def running(directory: Path, planet: PlanetSpec | None = None, prefect: bool = True) -> Iterator[Sandbox]:
    """Yields a sandbox, and stops at the end of the block what it started, also on Ctrl-C and SIGTERM.

    Call it from the main thread: only there does Python take signals.
    """
    before = {name for name, state in status(directory).items() if state == "running"}
    handlers = signal.signal(signal.SIGTERM, _interrupt), signal.getsignal(signal.SIGINT)
    try:
        yield _up(directory, planet or PlanetSpec(), prefect, bound=True)
    finally:
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, signal.SIG_IGN)  # a second Ctrl-C must not leave servers behind
        _stop(directory, keep=before)
        for sign, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(sign, handler)


def down(directory: Path) -> None:
    """Stops the servers; their data stay.

    Raises:
        UserError: There is no sandbox in the directory.
    """
    require(directory)
    _stop(directory, keep=set())


def status(directory: Path) -> dict[str, str]:
    """Returns `running` or `stopped`, by server."""
    processes = _read(directory).get("processes", {})
    return {name: "running" if servers.is_alive(servers.Process(*p)) else "stopped" for name, p in processes.items()}


def require(directory: Path) -> None:
    """Refuses a directory without a sandbox, rather than to tell nothing of it.

    Raises:
        UserError: There is none.
    """
    if not _read(directory):
        raise UserError(
            f"there is no sandbox in {directory.absolute()}: give its --directory, or `rangegrid sandbox up`"
        )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _up(directory: Path, planet: PlanetSpec, prefect: bool, bound: bool) -> Sandbox:
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        state = _read(directory)
        state.setdefault("keys", [secrets.token_hex(10), secrets.token_hex(20)])
        box = Sandbox(directory, state.setdefault("ports", {}), tuple(state["keys"]))
        _ensure(box, state, "s3", S3_PORTS, bound)
        if prefect:
            _ensure(box, state, "prefect", 1, bound, waits=False)
        _make_buckets(box)
        if _build_planet(box, planet):
            _end(state, "stac")  # it reads its files once, at its start
        _ensure(box, state, "stac", 1, bound)
        if prefect:
            _await(box, state, "prefect")
    return box


def _ensure(box: Sandbox, state: dict[str, Any], name: str, ports: int, bound: bool, waits: bool = True) -> None:
    processes = state.setdefault("processes", {})
    if name not in processes or not servers.is_alive(servers.Process(*processes[name])):
        known = box.ports.get(name, [])
        if not known or not all(map(servers.is_free, known)):
            box.ports[name] = servers.free_ports(ports)
        processes[name] = _launch(box, name, bound)
        _write(box.directory, state)
    if waits:
        _await(box, state, name)


def _launch(box: Sandbox, name: str, bound: bool) -> servers.Process:
    ports, home = box.ports[name], box.directory
    if name == "s3":
        (home / "s3").mkdir(exist_ok=True)
        command = servers.s3_command(home / "s3", ports)
    elif name == "stac":
        command = servers.stac_command(ports[0], [home / "planet/collection.json", home / "planet/items.json"])
    else:
        command = servers.prefect_command(ports[0])
    environment = {
        "AWS_ACCESS_KEY_ID": box.keys[0],
        "AWS_SECRET_ACCESS_KEY": box.keys[1],
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": servers.LEASES,
        "PREFECT_API_URL": f"http://{servers.HOST}:{ports[0]}/api",
    }
    return servers.start(command, home / "logs" / f"{name}.log", environment, bound)


def _await(box: Sandbox, state: dict[str, Any], name: str) -> None:
    log = box.directory / "logs" / f"{name}.log"
    servers.wait(name, partial(box.answers, name), servers.Process(*state["processes"][name]), log)


def _make_buckets(box: Sandbox) -> None:
    client = s3fs.S3FileSystem(key=box.keys[0], secret=box.keys[1], endpoint_url=box.endpoint, skip_instance_cache=True)
    for bucket in (PRODUCTS, BUCKET):
        if not client.exists(bucket):
            client.mkdir(bucket)
    cors, public = rules(PRODUCTS)
    client.call_s3("put_bucket_cors", Bucket=PRODUCTS, CORSConfiguration=cors)
    client.call_s3("put_bucket_policy", Bucket=PRODUCTS, Policy=public)


def _build_planet(box: Sandbox, planet: PlanetSpec) -> bool:
    """Builds what is missing of the planet, hands its catalog to the STAC server as files, tells if they changed."""
    bucket = Bucket(box.endpoint, *box.keys)
    home = box.directory / "planet"
    home.mkdir(exist_ok=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task("build the demo planet", total=None)
        build(planet, bucket, lambda done, total: bars.update(bar, completed=done, total=total))
    files = {home / "collection.json": collection(planet), home / "items.json": items(planet, bucket)}
    texts = {path: json.dumps(content) for path, content in files.items()}
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        path.write_text(texts[path])
    return bool(changed)


def _stop(directory: Path, keep: set[str]) -> None:
    directory = directory.absolute()
    state = _read(directory)
    for name in ("stac", "prefect", "s3"):
        if name not in keep:
            _end(state, name)
    if state:
        _write(directory, state)


def _end(state: dict[str, Any], name: str) -> None:
    process = state.get("processes", {}).pop(name, None)
    if process:
        servers.stop(servers.Process(*process))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the sandbox's lock; the system releases it when the process ends, however."""
    try:
        with FileLock(directory / "lock", blocking=False, fallback_to_soft=False):
            yield
    except Timeout:
        raise UserError(
            f"another process is starting the sandbox in {directory}: wait, or use another --directory"
        ) from None


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "state.json"
    if path.exists():
        return json.loads(path.read_text())
    return {}


def _write(directory: Path, state: dict[str, Any]) -> None:
    path = directory / "state.json.new"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(state, file, indent=2)
    path.replace(directory / "state.json")
