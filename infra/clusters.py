"""Dask by name: one place that turns the name of a cluster into a client."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import dask
from distributed import Client, LocalCluster

from infra.errors import UserError
from infra.settings import settings

KNOWN = "threads, local, tcp://host:port"
QUIET: Any = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}  # units report their own errors

UNINTERRUPTED = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # Ctrl-C ends the flow, which ends them


@contextmanager
def connect(name: str | None = None, workers: int | None = None) -> Iterator[Client]:
    """A Dask client of the named cluster, closed at the end with whatever it started.

    Inside another `connect` the outer client is shared, whatever the name: a pipeline has one cluster.

    Args:
        name: `threads` (this process), `local` (one single-threaded process per worker) or the address of a
            scheduler; unset, the settings' cluster.
        workers: Threads or processes of the first two; unset, the settings' number.

    Raises:
        UserError: The name is unknown, or no scheduler answers at the address.
    """
    if outer := _current():
        yield outer
        return
    dask.config.set({"distributed.logging.distributed": "critical"})  # for the worker processes
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # Prefect's set-up shows what was silent
    name = name or settings().cluster
    workers = workers or settings().workers
    if name == "threads":
        yield from _own(LocalCluster(1, threads_per_worker=workers, processes=False, **QUIET))
    elif name == "local":
        yield from _own(LocalCluster(workers, threads_per_worker=1, preload=[UNINTERRUPTED], **QUIET))
    elif name.startswith(("tcp://", "tls://")):
        with _existing(name) as client:
            yield client
    else:
        raise UserError(f"the cluster {name!r} is unknown: set RANGEGRID_CLUSTER to one of {KNOWN}")


def _current() -> Client | None:
    with suppress(ValueError):
        return Client.current(allow_global=True)
    return None


def _own(cluster: LocalCluster) -> Iterator[Client]:
    with cluster, Client(cluster) as client:
        yield client


def _existing(address: str) -> Client:
    try:
        client = Client(address, timeout="10s")
        client.wait_for_workers(1, timeout=30)
    except OSError as error:
        raise UserError(
            f"no Dask scheduler with workers answers at {address}: start one with `dask scheduler` and "
            "`dask worker`, or set RANGEGRID_CLUSTER=local"
        ) from error
    return client
