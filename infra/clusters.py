"""Connects to Dask by the name of a cluster."""

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import dask
import yaml
from distributed import Client, LocalCluster
from distributed.security import Security

from infra.errors import Unavailable, UserError
from infra.settings import Settings, settings
from infra.workers import check

CONFIG = Path(__file__).with_name("dask.yaml")  # Dask configuration of every worker; elsewhere set it as DASK_CONFIG
TEMPLATE = Path(__file__).with_name("kubernetes") / "daskcluster.yaml"
QUIET: Any = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}  # units report their own errors
UNINTERRUPTED = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # Ctrl-C ends the flow, which ends them
ANSWER, FIRST_WORKER, FIRST_POD = 10, 30, 600  # seconds for a scheduler's answer, a first worker, one on a new node

Engine = Callable[[Settings], AbstractContextManager[Client]]


@contextmanager
def connect(name: str | None = None, workers: int | None = None) -> Iterator[Client]:
    """Yields a Dask client of the named cluster, and closes it at the end with everything it started.

    Inside another `connect` the outer client is shared, whatever the name: a pipeline has one cluster.

    Args:
        name: `threads` (this process), `local` (one single-threaded process per worker), the address of a
            scheduler, `kubernetes` or `gateway`; unset, the settings' cluster.
        workers: Threads, processes or pods where the cluster is made here; unset, the settings' number.

    Raises:
        UserError: The name is unknown, nothing answers there, or its workers are not fit (`infra.workers`).
    """
    if outer := _outer():
        yield outer
        return
    dask.config.set({"distributed.logging.distributed": "critical"})  # for the worker processes
    dask.config.update_defaults(yaml.safe_load(CONFIG.read_text()))  # what the user has set stays
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # Prefect's set-up shows what was silent
    given = {"cluster": name, "workers": workers}
    where = settings().model_copy(update={key: value for key, value in given.items() if value})
    with _engine(where.cluster)(where) as client:
        yield client


def _outer() -> Client | None:
    """Returns the client of an enclosing `connect`, unless it has lost its scheduler."""
    try:
        client = Client.current(allow_global=True)
    except ValueError:
        return None
    if client.status == "running":
        return client
    return None


def _engine(name: str) -> Engine:
    if name.startswith(("tcp://", "tls://")):
        return _existing
    if name not in ENGINES:
        known = ", ".join([*ENGINES, "tcp://host:port", "tls://host:port"])
        raise UserError(f"the cluster {name!r} is unknown: set RANGEGRID_CLUSTER to one of {known}")
    return ENGINES[name]


@contextmanager
def _threads(where: Settings) -> Iterator[Client]:
    room = {"threads_per_worker": where.workers, "memory_limit": where.worker_memory}
    with LocalCluster(1, processes=False, **room, **QUIET) as cluster, Client(cluster) as client:
        yield client


@contextmanager
def _local(where: Settings) -> Iterator[Client]:
    room = {"threads_per_worker": 1, "memory_limit": where.worker_memory}
    with LocalCluster(where.workers, preload=[UNINTERRUPTED], **room, **QUIET) as cluster, Client(cluster) as client:
        yield client


@contextmanager
def _existing(where: Settings) -> Iterator[Client]:
    security = tls(where) if where.cluster.startswith("tls://") else None
    try:
        client = Client(where.cluster, timeout=ANSWER, security=security)
    except OSError as error:
        raise _silent(where.cluster) from error
    with client:
        _await_workers(client, 1, FIRST_WORKER, where.cluster)
        check(client, where.storage_url)
        yield client


def tls(where: Settings) -> Security:
    """Returns the TLS credentials of this process and the authority of the scheduler.

    Raises:
        UserError: A file is not set, or not there.
    """
    files = {"tls_ca": where.tls_ca, "tls_cert": where.tls_cert, "tls_key": where.tls_key}
    for name, path in files.items():
        if path is None or not path.is_file():
            raise UserError(
                f"RANGEGRID_{name.upper()} is {path or 'not set'}: {where.cluster} needs the PEM files of its "
                "authority, and of a certificate and a key for this process"
            )
    ca, cert, key = map(str, files.values())
    return Security(require_encryption=True, tls_ca_file=ca, tls_client_cert=cert, tls_client_key=key)


def _silent(address: str) -> Unavailable:
    return Unavailable(
        f"no Dask scheduler with workers answers at {address}: start one with `dask scheduler` and `dask worker` (for "
        "tls:// with --tls-ca-file, --tls-cert, --tls-key), or set RANGEGRID_CLUSTER=local"
    )


def _await_workers(client: Client, count: int, seconds: float, place: str) -> None:
    try:
        client.wait_for_workers(count, timeout=seconds)
    except OSError as error:
        raise _silent(place) from error


@contextmanager
def _kubernetes(where: Settings) -> Iterator[Client]:
    """Yields a new cluster by the Dask operator, and deletes it at the end."""
    operator = _extra("dask_kubernetes.operator", "kubernetes")
    with operator.KubeCluster(custom_cluster_spec=dask_cluster(where)) as cluster, Client(cluster) as client:
        _await_workers(client, where.workers, FIRST_POD, "the DaskCluster")
        check(client, where.storage_url)
        yield client


def dask_cluster(where: Settings) -> dict[str, Any]:
    """Returns the DaskCluster object: the settings' template with a new name, their image and their number of workers.

    Raises:
        UserError: There is no such template.
    """
    template = where.kubernetes_template or TEMPLATE
    try:
        cluster = yaml.safe_load(template.read_text())
    except OSError as error:
        raise UserError(f"RANGEGRID_KUBERNETES_TEMPLATE {template} cannot be read ({error.strerror})") from error
    name = f"{cluster['metadata']['name']}-{secrets.token_hex(3)}"
    cluster["metadata"]["name"] = name
    cluster["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] = name
    cluster["spec"]["worker"]["replicas"] = where.workers
    for part in ("worker", "scheduler"):
        for container in cluster["spec"][part]["spec"]["containers"]:
            container.setdefault("image", where.image)
    return cluster


@contextmanager
def _gateway(where: Settings) -> Iterator[Client]:
    """Yields a new cluster by Dask Gateway, whose address, authentication and options are Dask's own settings."""
    gateway = _extra("dask_gateway", "gateway")
    with gateway.Gateway() as server, server.new_cluster(shutdown_on_close=True) as cluster:
        cluster.scale(where.workers)
        with closing(cluster.get_client()) as client:
            _await_workers(client, where.workers, FIRST_POD, "the gateway")
            check(client, where.storage_url)
            yield client


def _extra(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"the cluster {extra!r} needs {error.name}, which is not installed: `uv pip install -e '.[{extra}]'`"
        ) from error


ENGINES: dict[str, Engine] = {"threads": _threads, "local": _local, "kubernetes": _kubernetes, "gateway": _gateway}
