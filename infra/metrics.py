"""Counts the workers' work for Prometheus: Dask serves the counts at `/metrics` of each worker's dashboard.

Rates are Prometheus's own: `sum(rate(rangegrid_patches_total{verdict="good"}[5m]))` is patches per second.
"""

from collections import Counter as Tally
from collections.abc import Iterable
from enum import StrEnum

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


class Cause(StrEnum):
    """Cause of a retry of a request to an archive; a label in Prometheus, and so one of few."""

    REFUSED = "access is refused"
    SHORT = "a short body"
    LOST = "a lost connection"
    REGION = "another region"
    HTTP_408 = "HTTP 408"
    HTTP_425 = "HTTP 425"
    HTTP_429 = "HTTP 429"
    HTTP_500 = "HTTP 500"
    HTTP_502 = "HTTP 502"
    HTTP_503 = "HTTP 503"
    HTTP_504 = "HTTP 504"
    HTTP_5XX = "HTTP 5xx"

    @classmethod
    def of_status(cls, status: int) -> "Cause | None":
        """Returns the cause of an HTTP status that may pass; none of one that stays."""
        text = f"HTTP {status}"
        if text in list(cls):
            return cls(text)
        return cls.HTTP_5XX if status >= 500 else None


def count_retry(cause: Cause) -> None:
    """Adds a retry under its cause."""
    RETRIES.labels(cause.value).inc()
