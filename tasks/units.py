"""Runs units of work on Dask, and shows their progress in the terminal and in Prefect.

A unit's output is one whole object or one whole Zarr shard, and rewriting it gives the same bytes. So Dask may run a
unit twice when a worker dies, a rerun does only what is left, and two overlapping runs do no harm.
"""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from infra.errors import Unavailable, UserError, may_pass

if TYPE_CHECKING:  # Dask and Prefect are slow to import, and most commands need neither
    from distributed import Client, Future

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 2  # retries of a unit, after an error or the death of its worker
EVERY = 60.0  # seconds between lines of progress, where there is no terminal
ARTIFACT_STEPS = 50  # most updates of a progress artifact: each costs a request to the server


class Screen(Console):
    """The terminal or the log of a run: silent once nobody reads it any more, where rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@dataclass
class Work:
    """A part of a run's work, for the run's report: what was planned, and what was done."""

    name: str
    """Name of what is counted."""
    planned: int | None
    """Planned number, those of earlier runs included; None where nothing was planned."""
    there: int = 0
    """Number that earlier runs did."""
    done: int = 0
    """Number that this run did."""
    seconds: float = 0.0
    """Duration in seconds."""
    limit: int | None = None
    """Largest number allowed; None where there is no limit."""
    bytes: bool = False
    """Whether the numbers are bytes."""
    note: str = ""
    """Last note on the work, such as a loss."""


REPORTED: ContextVar[list[Work] | None] = ContextVar("reported", default=None)  # parts of the run being reported


@contextmanager
def counted(part: Work) -> Iterator[Work]:
    """Times a part of a run and adds it to the run's report, however it ends. The caller counts `done`."""
    began = time.perf_counter()
    try:
        yield part
    finally:
        part.seconds = time.perf_counter() - began
        note(part)


def note(part: Work) -> None:
    """Adds a part to the report of the current run, if the run is being reported."""
    if (parts := REPORTED.get()) is not None:
        parts.append(part)


class UnitsFailed(Unavailable):
    """Units failed. What succeeded is stored, and a rerun does only the rest."""


def run_units(
    client: "Client",
    function: Callable[[T], R],
    units: Sequence[T],
    *,
    label: str,
    there: int = 0,
    name: Callable[[T], str] = str,
    max_failed_fraction: float = 0.0,
) -> list[R]:
    """Runs `function` on every unit on Dask and returns their results, in order.

    A unit that fails does not stop the others, unless too many fail.

    Args:
        client: The Dask cluster that does the work.
        function: An idempotent module-level function (or a `functools.partial` of one).
        units: The units that are left to do.
        label: Name of the step in the progress bar, the artifact and the run's report.
        there: Number of units that earlier runs did.
        name: Returns the name of a unit for the log.
        max_failed_fraction: Share of the units that may fail before the others are cancelled.

    Raises:
        UnitsFailed: Units failed; the message has the first causes.
        UserError: Units failed, and only the user can mend every cause.
    """
    futures = client.map(function, units, pure=False, retries=RETRIES, batch_size=256)
    bound = max_failed_fraction
    return follow(client, futures, units, label=label, there=there, name=name, max_failed_fraction=bound)


def follow(
    client: "Client",
    futures: "list[Future]",
    units: Sequence[T],
    *,
    label: str,
    there: int = 0,
    name: Callable[[T], str] = str,
    max_failed_fraction: float = 0.0,
) -> list[Any]:
    """Waits for units that were submitted, one future each, and returns their results; see `run_units`."""
    from distributed import as_completed

    results: dict[int, Any] = {}
    failures: list[Failure] = []
    tell = log().debug if Console(stderr=True).is_terminal else log().info  # a terminal shows the bar
    with progress(label, there + len(units), there) as advance:
        position = {future.key: i for i, future in enumerate(futures)}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                i = position[future.key]
                try:
                    results[i] = future.result()  # waits again where a worker died with a finished result
                except Exception as error:  # the unit's own, whatever it is
                    failures.append(Failure(name(units[i]), error))
                    log().warning("%s: %s. A rerun does it again and keeps what succeeded", label, failures[-1])
                    if len(failures) > max_failed_fraction * len(units):
                        break
                else:
                    advance(1)
                    tell("%s: %s done, %d of %d", label, name(units[i]), done, len(units))
                future.release()
            if failures:
                raise _failed(label, failures, len(units))
        except BaseException:
            client.cancel(futures)
            raise
    return [results[i] for i in range(len(units))]


@dataclass(frozen=True)
class Failure:
    """A unit that failed."""

    unit: str
    """Name of the unit."""
    error: BaseException
    """The cause."""

    def __str__(self) -> str:
        """Returns the failure on one line: our own errors whole, of other errors the type and the first line."""
        text = str(self.error).strip()
        if not isinstance(self.error, UserError):
            text = f"{type(self.error).__name__}: {text}".splitlines()[0]
        return f"{self.unit}: {text}"

    @property
    def lasts(self) -> bool:
        """Tells whether the user must mend the cause."""
        return not may_pass(self.error)


def _failed(label: str, failures: list[Failure], total: int) -> UserError:
    if all(failure.lasts for failure in failures):
        kind = UserError
    else:
        kind = UnitsFailed
    return kind(
        f"{label}: {len(failures)} of {total} units failed ({'; '.join(map(str, failures[:3]))}). What succeeded is "
        "kept: mend the cause and run again, and only the rest is done"
    )


@contextmanager
def progress(label: str, total: int, there: int = 0) -> Iterator[Callable[..., None]]:
    """Shows progress: a bar in the terminal, lines in a log, an artifact in a Prefect run, and a part of the report.

    Args:
        label: Name of the work.
        total: Number of units.
        there: Number of units that earlier runs did.

    Yields:
        A function to call with the number of units just done and, optionally, a short note.
    """
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    artifact, console = _Artifact(label, total, there), Screen(stderr=True)
    bars = _Noted(*columns, console=console, disable=not console.is_terminal)
    with bars, counted(Work(label, total, there)) as part, _lines(part, console):
        bar = bars.add_task(label, total=total, completed=there, note="")

        def advance(done: int, note: str = "") -> None:
            part.done += done
            part.note = note or part.note
            bars.update(bar, advance=done, note=note)
            artifact.advance(done, note)

        yield advance
        bars.update(bar, completed=total)  # also where the work ended early, as training may
    artifact.finish()


@contextmanager
def _lines(part: Work, console: Console) -> Iterator[None]:
    """Prints lines of progress where no terminal shows the bar: at the start, each minute, and at the end."""
    if console.is_terminal:
        yield
        return
    began, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        console.out(so_far(part, time.monotonic() - began), highlight=False)
        while not ended.wait(EVERY):
            console.out(so_far(part, time.monotonic() - began), highlight=False)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        console.out(so_far(part, time.monotonic() - began), highlight=False)


def so_far(part: Work, seconds: float) -> str:
    """Returns the progress of a part of a run: `train: 120 of 648, 0.52 a second, 0:16:55 left; loss 0.31`."""
    total = part.planned or 0
    told = f"{part.name}: {part.there + part.done:,} of {total:,}"
    if not part.done or not seconds:
        return told
    rate = part.done / seconds
    left = timedelta(seconds=round(max(0, total - part.there - part.done) / rate))
    return f"{told}, {rate:.3g} a second, {left} left" + (f"; {part.note}" if part.note else "")


class _Noted(Progress):
    """Progress bars, each with its note on the line below, since a narrow terminal has no room beside the bar."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(task.fields["note"]) for task in self.tasks if task.fields["note"])


class _Artifact:
    """A progress bar's artifact in Prefect; does nothing outside a run."""

    def __init__(self, label: str, total: int, there: int) -> None:
        self.label, self.note = label, ""
        self.done, self.total = there, max(total, 1)
        self.shown = 100.0 * there / self.total
        self.id = self._create() if in_run() else None

    def _create(self) -> Any:
        from prefect.artifacts import create_progress_artifact

        with shown():
            return create_progress_artifact(self.shown, description=self.label)
        return None

    def advance(self, done: int, note: str) -> None:
        self.done, self.note = self.done + done, note
        percent = 100.0 * self.done / self.total
        if percent - self.shown >= 100 / ARTIFACT_STEPS:
            self._show(percent)

    def finish(self) -> None:
        if self.shown < 100:
            self._show(100.0)

    def _show(self, percent: float) -> None:
        self.shown = percent
        if self.id is not None:
            from prefect.artifacts import update_progress_artifact

            counted = f"{self.label}, {self.done:,} of {self.total:,}"  # the UI's cards show this text alone
            described = f"{counted}: {self.note}" if self.note else counted
            with shown():
                update_progress_artifact(self.id, min(percent, 100.0), description=described)


@contextmanager
def shown() -> Iterator[None]:
    """Logs errors of the UI and goes on: a run does not depend on being shown."""
    try:
        yield
    except Exception as error:  # errors of the Prefect API, or of the way to it
        log().warning("the UI is not told of this run's work (%s): the work goes on", type(error).__name__)


def in_words(count: float) -> str:
    """Returns bytes in words, such as `1.50 GB`, in decimal units with two decimals."""
    power = min(4, int(math.log10(max(count, 1)) // 3))
    return f"{count / 1000**power:,.2f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def in_run() -> bool:
    """Tells whether this code runs inside a Prefect flow or task."""
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def log() -> logging.Logger | logging.LoggerAdapter:
    """Returns the run's logger inside a Prefect run, else the logger `rangegrid`."""
    if not in_run():
        return logging.getLogger("rangegrid")
    from prefect.logging import get_run_logger

    return get_run_logger()
