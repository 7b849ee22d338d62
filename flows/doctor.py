"""Checks what is installed, reachable and writable: here, and where the work pool runs a flow."""

import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from prefect import flow
from prefect.states import Completed, Failed

from flows.deployed import HOUR
from infra import clusters, storage
from infra.addresses import shown
from infra.errors import UserError
from infra.settings import origin, settings
from infra.stac.catalogs import catalogs, collection_title

PACKAGES = ("prefect", "dask", "xarray", "zarr", "rasterio", "torch", "pystac-client", "obstore", "s3fs")
SOUND = (3, 11, 12)  # before this version, gc and a thread that looks at frames can deadlock (cpython 106883)
PATIENCE = 180  # seconds that the pool has to take up a run, start Python and answer

Check = tuple[str, str, bool]  # name, what was found, whether it is good


def checks() -> Iterator[Check]:
    """Yields (name, what was found, whether it is good): here, and as a run in the pool sees it."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries would be told beside our result
    yield "packages", ", ".join(f"{name} {version(name)}" for name in PACKAGES), True
    yield from seen()
    yield "prefect", *_try(_prefect)
    yield from _run()


def seen() -> Iterator[Check]:
    """Yields what this process sees, a command or a run alike."""
    yield "python", *_python()
    yield "names", *_names()
    yield "settings", origin(), True
    yield "storage", *_try(_storage)
    yield "catalog", *_try(_catalog)
    yield "cluster", *_try(_cluster)


@flow(name="doctor", flow_run_name="doctor", timeout_seconds=HOUR)
def doctor() -> Any:
    """Checks what a run in this work pool reads, reaches and may write. It fails where one check fails.

    Returns:
        One line per check.
    """
    found = list(seen())
    text = "\n".join(line(*check) for check in found)
    good = all(fine for *_, fine in found)
    if good:
        return Completed(message=text, data=text)
    return Failed(message=text)


def line(name: str, found: str, good: bool) -> str:
    """Returns a check as it is printed."""
    return f"{'ok  ' if good else 'FAIL'}  {name:<18}{found}"


def _try(check: Callable[[], str]) -> tuple[str, bool]:
    try:
        return check(), True
    except (UserError, OSError, RuntimeError) as error:
        return str(error), False


def _python() -> tuple[str, bool]:
    told = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:3] >= SOUND:
        return told, True
    return f"{told}: before 3.11.12 a Dask worker whose profiler is on can deadlock (ours is off); update it", True


def _names() -> tuple[str, bool]:
    """Tells whether our import packages are ours, or another installed package has one of their names."""
    from rangegrid.names import OURS, strangers

    taken = [f"{name} is of {owner}" for name, owner in strangers().items()]
    return "; ".join(taken) or f"{', '.join(OURS)} are rangegrid's", not taken


def _storage() -> str:
    url = settings().storage_url
    if url.startswith("s3:") and os.environ.get("AWS_PROFILE") and settings().access_key is None:
        raise UserError(
            f"AWS_PROFILE is {os.environ['AWS_PROFILE']!r}, and profiles and SSO are not read: put the keys into the "
            "settings file, as `aws configure export-credentials --format env` tells them"
        )
    storage.check_writable(url)
    return f"{url} is writable"


def _catalog() -> str:
    for catalog in catalogs():
        collection_title(catalog)
    return " and ".join(f"{shown(catalog.url)} serves {catalog.collection}" for catalog in catalogs())


def _cluster() -> str:
    with clusters.connect() as client:
        workers = client.scheduler_info()["workers"].values()
        return f"{settings().cluster}: {len(workers)} workers, {sum(w['nthreads'] for w in workers)} threads"


def _prefect() -> str:
    from prefect.settings import PREFECT_API_URL

    from infra.deployments import api_url

    if PREFECT_API_URL.value() is None:
        return "no server set: commands run without one (set PREFECT_API_URL to use one)"
    return f"{api_url()} answers"


def _run() -> Iterator[Check]:
    """Yields what a run of the deployment `doctor` sees, where a server is set that answers."""
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is None or not _try(_prefect)[1]:
        return
    try:
        told = _told_by_a_run()
    except UserError as error:
        yield "a run", str(error), False
        return
    for text in told.splitlines():
        yield f"a run: {text[6:24].strip()}", text[24:], text.startswith("ok")


def _told_by_a_run() -> str:
    from prefect.client.orchestration import get_client
    from prefect.deployments import run_deployment

    from infra.deployments import POOL, on_server

    with get_client(sync_client=True) as client:
        if on_server(client, "doctor") is None:
            raise UserError("the deployments are not on the server: `rangegrid deploy` lays them there")
        if not any(worker.status == "ONLINE" for worker in client.read_workers_for_work_pool(POOL)):
            raise UserError(
                f"no worker of the pool {POOL} is on: `rangegrid serve`, or `prefect worker start -p {POOL}`"
            )
    run = run_deployment("doctor/doctor", timeout=PATIENCE, poll_interval=2)
    if run.state is None or not run.state.is_final():
        raise UserError(f"the run {run.name!r} has not ended after {PATIENCE} s: look at it in the UI")
    if not run.state.is_completed() and "storage" not in (run.state.message or ""):
        raise UserError(f"the run {run.name!r} ended as {run.state.name}: {run.state.message}")
    return run.state.message or ""
