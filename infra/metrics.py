"""What the workers count for Prometheus: Dask serves it at `/metrics` of each worker's dashboard, beside its own.

Rates are Prometheus's own: `sum(rate(rangegrid_patches_total{verdict="good"}[5m]))` is patches per second.
"""

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import Counter

PLACES = Counter("rangegrid_places", "Places screened, by verdict: good, or why not", ["verdict"])
PATCHES = Counter("rangegrid_patches", "Patches read, by verdict: good, or why they are replaced", ["verdict"])
CELLS = Counter("rangegrid_cells", "Land cells of grids written")
BYTES = Counter("rangegrid_archive_bytes", "Bytes fetched from archives of imagery")
RETRIES = Counter("rangegrid_retries", "Requests to archives that were asked again, by what went wrong", ["cause"])


def count(counter: Counter, reasons: Iterable[str]) -> None:
    """Adds to a counter by verdict; an empty reason is a good one."""
    for reason, number in Tally(reasons).items():
        counter.labels(reason or "good").inc(number)


def count_retry(problem: str) -> None:
    """Adds a retry under its cause, which is one of few: texts that begin with a number have a number each."""
    RETRIES.labels("a short body" if problem[:1].isdigit() else problem).inc()
