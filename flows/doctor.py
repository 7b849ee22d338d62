"""What is installed, reachable and writable."""

from collections.abc import Callable, Iterator
from importlib.metadata import version

from infra import clusters, storage
from infra.catalogs import catalogs, collection_title, unsigned
from infra.errors import UserError
from infra.settings import settings

PACKAGES = ("prefect", "dask", "xarray", "zarr", "rasterio", "torch", "pystac-client", "obstore", "s3fs")


def checks() -> Iterator[tuple[str, str, bool]]:
    """Yields (name, what was found, whether it is good)."""
    yield "packages", ", ".join(f"{name} {version(name)}" for name in PACKAGES), True
    yield "storage", *_try(_storage)
    yield "catalog", *_try(_catalog)
    yield "cluster", *_try(_cluster)
    yield "prefect", *_try(_prefect)


def _try(check: Callable[[], str]) -> tuple[str, bool]:
    try:
        return check(), True
    except (UserError, OSError, RuntimeError) as error:
        return str(error), False


def _storage() -> str:
    url = settings().storage_url
    storage.check_writable(url)
    return f"{url} is writable"


def _catalog() -> str:
    for catalog in catalogs():
        collection_title(catalog)
    return " and ".join(f"{unsigned(catalog.url)} serves {catalog.collection}" for catalog in catalogs())


def _cluster() -> str:
    with clusters.connect() as client:
        workers = client.scheduler_info()["workers"].values()
        return f"{settings().cluster}: {len(workers)} workers, {sum(w['nthreads'] for w in workers)} threads"


def _prefect() -> str:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if url is None:
        return "no server set: each command starts its own (set PREFECT_API_URL to share one)"
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error:
        raise UserError(f"{url} does not answer ({error}): start it with `prefect server start`")
    return f"{url} answers"
