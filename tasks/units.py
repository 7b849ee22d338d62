"""One unit of work everywhere: a deterministic list, run on Dask, seen in the terminal and in Prefect.

A unit's output is one whole object or one whole Zarr shard, and rewriting it gives the same bytes. So Dask
may run a unit twice when a worker dies, a rerun does only what is left, and two overlapping runs do no harm.
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

RETRIES = 2  # of one unit, after an error or the death of its worker
EVERY = 60.0  # seconds between the lines that tell where no terminal shows progress
ARTIFACT_STEPS = 50  # updates of a progress artifact in one run: each costs a request to the server


class Screen(Console):
    """The terminal or the log of a run: silent once nobody reads it any more, where rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@dataclass
class Work:
    """A part of a run's work, for the run's report: what was planned, and what was done."""

    name: str
    """What is counted."""
    planned: int | None
    """How many; none, where nobody planned it."""
    there: int = 0
    """Of these, what earlier runs did."""
    done: int = 0
    """What this run did."""
    seconds: float = 0.0
    """Time that it took."""
    limit: int | None = None
    """What there may be at most."""
    bytes: bool = False
    """Whether bytes are counted."""
    note: str = ""
    """What was last told of it, as a loss."""


REPORTED: ContextVar[list[Work] | None] = ContextVar("reported", default=None)  # parts of the run that is reported


@contextmanager
def counted(part: Work) -> Iterator[Work]:
    """Times a part of a run and adds it to the run's report, however it ends; who does the work counts `done`."""
    began = time.perf_counter()
    try:
        yield part
    finally:
        part.seconds = time.perf_counter() - began
        note(part)


def note(part: Work) -> None:
    """Adds a part to the report of the run that this code belongs to, if it is reported."""
    if (parts := REPORTED.get()) is not None:
        parts.append(part)


class UnitsFailed(Unavailable):
    """Units failed; what succeeded is stored and a rerun does only the rest."""


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

    A unit that fails does not stop the others, until there are too many such.

    Args:
        client: The Dask cluster that does the work.
        function: An idempotent module-level function (or a `functools.partial` of one).
        units: What is left to do.
        label: Names the step in the progress bar, the artifact and the run's report.
        there: Further units, which earlier runs did.
        name: Names a unit in the log.
        max_failed_fraction: Share of the units that may fail before the others are given up.

    Raises:
        UnitsFailed: A unit failed; the message gives the first causes.
        UserError: The same, where only the user can mend them all.
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
    """The results of units that were submitted, one future each: as `run_units`, which does both."""
    from distributed import as_completed

    results: dict[int, Any] = {}
    failures: list[Failure] = []
    tell = log().debug if Console(stderr=True).is_terminal else log().info  # a terminal has the bar
    with progress(label, there + len(units), there) as advance:
        position = {future.key: i for i, future in enumerate(futures)}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                i = position[future.key]
                try:
                    results[i] = future.result()  # waits again where a worker died with what it had finished
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
    """Its name."""
    error: BaseException
    """Why."""

    def __str__(self) -> str:
        """On one line: what we raise says what to do, and of another error the first line tells most."""
        text = str(self.error).strip()
        if not isinstance(self.error, UserError):
            text = f"{type(self.error).__name__}: {text}".splitlines()[0]
        return f"{self.unit}: {text}"

    @property
    def lasts(self) -> bool:
        """Whether a user must mend it."""
        return not may_pass(self.error)


def _failed(label: str, failures: list[Failure], total: int) -> UserError:
    kind = UserError if all(failure.lasts for failure in failures) else UnitsFailed
    return kind(
        f"{label}: {len(failures)} of {total} units failed ({'; '.join(map(str, failures[:3]))}). What succeeded is "
        "kept: mend the cause and run again, and only the rest is done"
    )


@contextmanager
def progress(label: str, total: int, there: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar in the terminal, lines in a log; in a Prefect run an artifact, and a part of the run's report.

    Args:
        label: What is done.
        total: How many units of it there are.
        there: Of these, what earlier runs did.

    Yields:
        A function to call with the number of units just done and, where there is more to tell, a short note.
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
        bars.update(bar, completed=total)  # what ends early, as training may, has ended all the same
    artifact.finish()


@contextmanager
def _lines(part: Work, console: Console) -> Iterator[None]:
    """Where no terminal shows the bar, tells in lines how far a part of a run is: now, each minute, and at its end."""
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
    """How far a part of a run is after some seconds: `train: 120 of 648, 0.52 a second, 0:16:55 left; loss 0.31`."""
    total = part.planned or 0
    told = f"{part.name}: {part.there + part.done:,} of {total:,}"
    if not part.done or not seconds:
        return told
    rate = part.done / seconds
    left = timedelta(seconds=round(max(0, total - part.there - part.done) / rate))
    return f"{told}, {rate:.3g} a second, {left} left" + (f"; {part.note}" if part.note else "")


class _Noted(Progress):
    """Progress bars, each with its note on the line below: beside the bar a narrow terminal has no room for it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(task.fields["note"]) for task in self.tasks if task.fields["note"])


class _Artifact:
    """The Prefect side of a progress bar; does nothing outside a run."""

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

            counted = f"{self.label}, {self.done:,} of {self.total:,}"  # the UI's cards show no more than this text
            described = f"{counted}: {self.note}" if self.note else counted
            with shown():
                update_progress_artifact(self.id, min(percent, 100.0), description=described)


@contextmanager
def shown() -> Iterator[None]:
    """Logs what goes wrong within: the UI shows the work, and the work goes on where the UI does not answer."""
    try:
        yield
    except Exception as error:  # of the Prefect API or of the way to it
        log().warning("the UI is not told of this run's work (%s): the work goes on", type(error).__name__)


def in_words(count: float) -> str:
    """Bytes as `1.50 GB`: decimal, with three digits or more."""
    power = min(4, int(math.log10(max(count, 1)) // 3))
    return f"{count / 1000**power:,.2f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def in_run() -> bool:
    """Whether this code runs inside a Prefect flow or task."""
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def log() -> logging.Logger | logging.LoggerAdapter:
    """The run's logger inside a Prefect run, else the module's."""
    if not in_run():
        return logging.getLogger("rangegrid")
    from prefect.logging import get_run_logger

    return get_run_logger()
