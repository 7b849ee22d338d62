"""What must hold when a soak is over, and what became of the runs that its faults struck."""

import json
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import psutil
import xarray as xr
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from infra import storage
from tasks.params import PipelineParams
from tasks.release import versions
from tests.chaos import KINDS, Fault
from tests.station import Station

SUFFERING = timedelta(seconds=60)  # after a fault: a run that begins so soon may meet what is not up again
DEADLY = ("Prefect worker and its runs", "process of a run")  # what makes a run fall silent
COLUMNS = ("injected", "nothing ran", "by itself", "run again", "reconciled, run again")
Injected = list[tuple[datetime, Fault]]
Grids = dict[str, tuple[int, float]]  # how many values a grid has, and their sum, by its URL


def every_run() -> list[FlowRun]:
    """All flow runs."""
    found: list[FlowRun] = []
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(offset=len(found), limit=200):
            found += page
    return found


def is_whole(run: FlowRun) -> bool:
    """Whether it is a pipeline of the deployment, and not one of its steps or of a command line."""
    return run.deployment_id is not None and run.parent_task_run_id is None


def scheduled(runs: list[FlowRun]) -> list[FlowRun]:
    """The runs that schedules made."""
    return [run for run in runs if run.auto_scheduled and is_whole(run)]


def is_final(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final()


def ended_badly(run: FlowRun) -> bool:
    return is_final(run) and not run.state.is_completed()


def lived(run: FlowRun) -> tuple[datetime, datetime]:
    """From when to when a run that has ended was under way; one that never began is said to start at its end."""
    return run.start_time if run.run_count else run.expected_start_time, run.state.timestamp


def fates(
    injected: Injected, runs: list[FlowRun], reconciled: set[str], silent: timedelta
) -> tuple[pd.DataFrame, list[str]]:
    """What became of the runs that each kind of fault struck, and the runs that ended badly without any.

    A run that ended badly is put down to the last fault before its end. One that ended by its silence is put down to
    the last one before that which kills a run's process, if there was any.
    """
    table = pd.DataFrame(0, index=list(KINDS), columns=list(COLUMNS))
    whole = [run for run in runs if is_whole(run) and is_final(run)]

    def blame(run: FlowRun) -> datetime | None:
        return blamed(injected, run, silent if str(run.id) in reconciled else timedelta())

    victims = {blame(run): run for run in filter(ended_badly, whole)}
    for when, fault in injected:
        table.loc[fault.kind, ["injected", fate(when, victims.get(when), whole, reconciled)]] += 1
    bad = [run for run in filter(ended_badly, whole) if blame(run) is None]
    return table, [f"{run.name} ended {run.state.name} without a fault: {run.state.message}" for run in bad]


def blamed(injected: Injected, run: FlowRun, silent: timedelta) -> datetime | None:
    """When the fault came that a run's bad end is put down to."""
    begin, end = lived(run)
    struck = [(when, fault) for when, fault in injected if begin - SUFFERING < when < end - silent]
    deadly = [when for when, fault in struck if fault.kind in DEADLY] if silent else []
    return max(deadly or [when for when, _ in struck], default=None)


def fate(when: datetime, victim: FlowRun | None, whole: list[FlowRun], reconciled: set[str]) -> str:
    """The column of the table that a fault belongs in."""
    if victim is not None:
        return "reconciled, run again" if str(victim.id) in reconciled else "run again"
    return "by itself" if any(begin < when < end for begin, end in map(lived, whole)) else "nothing ran"


def as_markdown(table: pd.DataFrame) -> str:
    """The table as a document has it, without its zeros."""
    rows = [["fault", *table.columns], ["---"] * (1 + len(table.columns))]
    rows += [
        [str(kind), *(str(n) if n else "" for n in row)] for kind, row in zip(table.index, table.values, strict=True)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def unfinished(runs: list[FlowRun], due: int, params: list[PipelineParams]) -> list[str]:
    """Runs that did not come or did not end, and parameters that never came through."""
    came = len(scheduled(runs))
    missing = [] if came == due else [f"{came} of {due} scheduled runs came"]
    stuck = [f"stuck: {run.name}, {run.state}" for run in runs if not is_final(run)]
    done = [run.parameters["params"] for run in runs if is_whole(run) and is_final(run) and not ended_badly(run)]
    never = [f"seed {p.sample.seed} never completed" for p in params if json.loads(p.model_dump_json()) not in done]
    return [*missing, *stuck, *never]


def held_slots() -> list[str]:
    """Places under the deployments' limits that are taken, though nothing runs."""
    with get_client(sync_client=True) as client:
        limits = client.read_global_concurrency_limits(limit=200)
    return [f"slot held: {limit.name}, {limit.active_slots}" for limit in limits if limit.active_slots]


def orphans(station: Station) -> list[str]:
    """Processes that runs left behind; those that are ending have a minute to."""
    psutil.wait_procs(station.others(), timeout=60)
    return [f"orphan: {process.pid} {' '.join(process.cmdline())[:150]}" for process in station.others()]


def half_published() -> list[str]:
    """Versions that are not finished, and a pointer that names none that is."""
    found = {version.grid: version.state for version in versions.versions()}
    half = [f"{state}: {grid}" for grid, state in found.items() if state in ("unfinished", "condemned")]
    latest = versions.read_pointer()[0].grid
    return half if found.get(latest) == "latest" else [*half, f"latest is {latest}, {found.get(latest)}"]


def unlike(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Objects, by path and digest, that an undisturbed run does not make so."""
    return [
        *(f"missing: {path}" for path in sorted(expected.keys() - found.keys())),
        *(f"left over: {path}" for path in sorted(found.keys() - expected.keys())),
        *(f"differs: {path}" for path in sorted(found.keys() & expected.keys()) if found[path] != expected[path]),
    ]


def grids() -> Grids:
    """What a reader must find in each version."""
    found = {}
    for version in versions.versions():
        values = xr.open_zarr(storage.zarr_store(version.grid, read_only=True), chunks=None).embedding.values
        found[version.grid] = int(np.isfinite(values).sum()), float(np.nansum(values, dtype="f8"))
    return found


def misread(told: list[dict[str, Any]], whole: Grids, outages: list[tuple[float, float]]) -> list[str]:
    """What a reader met that is neither a whole grid nor an S3 server that was away."""
    found = [] if any("grid" in line for line in told) else ["latest was never read"]
    for line in told:
        excused = any(line["began"] < end + 1 and line["ended"] > begin for begin, end in outages)
        if "error" in line and not excused:
            found.append(f"latest was not readable: {line['error']}")
        elif "grid" in line and (line["cells"], line["sum"]) != whole.get(line["grid"]):
            found.append(f"latest was read as {line}, which is not {whole.get(line['grid'])}")
    return found
