"""The demo pipeline under repeated schedules for minutes on end, while a seeded plan kills what it runs on.

    python -m tests.soak --minutes 20 --seed 0

A supervisor starts again what died, as systemd or a container engine would; an operator on duty ends the runs that
nobody runs any more (`rangegrid reconcile`), and runs again what did not end well. At the end no run may be left, every
product must be byte for byte an undisturbed run's, and whoever read `latest` must have been served all the while.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import RRuleSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings
from s3fs import S3FileSystem

from flows.pipeline import pipeline
from infra import storage
from infra.reconcile import reconcile
from infra.sandbox import PRODUCTS
from infra.sandbox.tether import die_with_parent
from tasks.params import EncodeParams, EncoderParams, EvaluateParams, PipelineParams, PublishParams, TrainParams
from tests import invariants
from tests.chaos import Fault, plan
from tests.flows.test_pipeline import SAMPLE
from tests.station import DASK_WORKERS, ROOT, Station, kill, start
from tests.tasks.test_faults import slow_down

EVERY = 120  # seconds between scheduled runs
SOON = 10  # seconds to the first
VARIANTS = 3  # sets of parameters, whose schedules take turns: the first round makes products, the others find them
HEARTBEAT, SILENT = "30", 3.0  # seconds, minutes: a run that lives is heard of six times before it is taken for dead
ROUND = 3.0  # seconds between the rounds of supervisor and operator
DRAIN = 1800.0  # seconds that what is under way, or waits, may take when the last fault is over
POINTER = "grids/latest.json"
RECORDS = re.compile(  # of how a run went: when, in which order, how much it read; a report names its grid
    r"grids/(latest[\w.-]*|collection)\.json|patches/\w+/(run\.md|(parts|screen)/.*)|reports/.*|grids/\w+/scorecard\.json"
)
STRUCK = {  # what is killed, and whether with all that it started
    "Prefect worker": ("worker", False),
    "Prefect worker and its runs": ("worker", True),
    "Dask scheduler": ("scheduler", True),
    "S3 server": ("s3", True),
    "Prefect server": ("prefect", True),
    "STAC server": ("stac", True),
}
READER = """
import json, sys, time
import numpy as np, s3fs, xarray as xr
endpoint, pointer = sys.argv[1:]
options = {"endpoint_url": endpoint, "use_listings_cache": False}
while True:
    began = time.time()
    try:
        grid = json.loads(s3fs.S3FileSystem(**options).cat_file(pointer))["grid"]
        values = xr.open_zarr(grid, storage_options=options).embedding.values
        told = {"grid": grid, "cells": int(np.isfinite(values).sum()), "sum": float(np.nansum(values, dtype="f8"))}
    except Exception as error:
        told = {"error": repr(error)[:300]}
    print(json.dumps({"began": began, "ended": time.time(), **told}), flush=True)
    time.sleep(1)
"""
TWIN = """
import sys
from flows.pipeline import pipeline
from tasks.params import PipelineParams
pipeline(PipelineParams.model_validate_json(sys.argv[1]))
"""


def variants(labels: str, count: int) -> list[PipelineParams]:
    """Parameters of small pipelines, each with a sample of its own."""
    encoder = EncoderParams(dim=64)
    scored = EvaluateParams(labels=(labels,), label="warmth", kind="regression", embedder=("coordinates",), folds=2)
    return [
        PipelineParams(
            sample=SAMPLE.model_copy(update={"seed": 100 + i}),
            train=TrainParams(encoder=encoder, steps=40, save_every=5, batch=32, degree=8, hidden=32, dim=16),
            encode=EncodeParams(shard_rows=10),
            publish=PublishParams(step=3.0, tile_cells=20),
            evaluate=scored,
            gate_margin=1.0,
        )
        for i in range(count)
    ]


def write_labels(path: Path) -> str:
    """A table of warmth by latitude, which no straight line fits: so the gate finds a grid better than coordinates."""
    lat, lon = (axis.ravel() for axis in np.meshgrid(np.arange(-50, 75, 2.5), np.arange(-175, 180, 5.0)))
    pd.DataFrame({"lon": lon, "lat": lat, "warmth": np.cos(np.radians(lat))}).to_csv(path, index=False)
    return str(path)


class Soak:
    """One soak on a station.

    Attributes:
        injected: The faults, and when each came.
        healed: When a burst of refusals ends, in seconds since the epoch.
        outages: From when to when the S3 server did not answer, in the same.
        reconciled: Ids of the runs that were ended, since nobody ran them.
        answered: Ids of the runs that did not end well, and were run again.
        twins: Pipelines from a command line, which no deployment's limit holds back.
    """

    def __init__(self, station: Station, params: list[PipelineParams]) -> None:
        self.station, self.params = station, params
        self.injected: invariants.Injected = []
        self.healed = float("inf")
        self.outages: list[tuple[float, float]] = []
        self.reconciled: set[str] = set()
        self.answered: set[str] = set()
        self.twins: list[subprocess.Popen[bytes]] = []
        self.files = S3FileSystem(endpoint_url=station.box.endpoint, use_listings_cache=False)

    def undisturbed(self) -> tuple[dict[str, str], invariants.Grids]:
        """The objects and the grids that undisturbed runs make; afterwards the first run's alone are there, anew."""
        self.wipe()
        for params in self.params:
            pipeline(params)
        expected, grids = self.objects(), invariants.grids()
        self.wipe()
        pipeline(self.params[0])
        found = self.objects()
        if differing := invariants.unlike(found, {path: expected.get(path, "") for path in found}):
            raise AssertionError(f"undisturbed runs differ: {differing}")
        return expected, grids

    def wipe(self) -> None:
        """Deletes every product."""
        for name in storage.names(f"s3://{PRODUCTS}"):
            storage.delete(f"s3://{PRODUCTS}/{name}")

    def objects(self) -> dict[str, str]:
        """The digest of every object of every product, by its path."""
        paths = {path.removeprefix(f"{PRODUCTS}/"): path for path in self.files.find(PRODUCTS)}
        return {
            name: hashlib.sha256(self.files.cat_file(path)).hexdigest()
            for name, path in paths.items()
            if not RECORDS.fullmatch(name)
        }

    def schedule(self, runs: int) -> None:
        """Schedules each set of parameters in its turn, `EVERY` seconds one after the other.

        The runs are made at once: the server makes none for the past, and may be dead when the first is due.
        """
        begin = datetime.now(UTC) + timedelta(seconds=SOON)
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("pipeline/pipeline")
            for i, params in enumerate(self.params):
                first = f"DTSTART:{begin + timedelta(seconds=EVERY * i):%Y%m%dT%H%M%SZ}"
                count = len(range(i, runs, len(self.params)))
                rule = f"{first}\nRRULE:FREQ=SECONDLY;INTERVAL={EVERY * len(self.params)};COUNT={count}"
                made = DeploymentScheduleCreate(
                    schedule=RRuleSchedule(rrule=rule), parameters=as_parameters(params), slug=f"variant-{i}"
                )
                client.create_deployment_schedules(deployment.id, [made])
            here, every = {"id": deployment.id}, {"min_runs": runs}
            client.request("POST", "/deployments/{id}/schedule", path_params=here, json=every)

    def inject(self, fault: Fault) -> None:
        """Does what the plan says."""
        say(f"{fault.kind}, for {fault.lasts:.0f} s")
        self.injected.append((datetime.now(UTC), fault))
        if fault.kind == "S3 server":
            self.outages.append((time.time(), float("inf")))
        if fault.kind in STRUCK:
            self.station.kill(*STRUCK[fault.kind], fault.lasts)
        elif fault.kind == "Dask worker":
            self.station.kill(DASK_WORKERS[int(fault.draw * len(DASK_WORKERS))], seconds=fault.lasts)
        elif fault.kind == "process of a run":
            found = self.station.engines()
            kill(*found[int(fault.draw * len(found)) :][:1])
        elif fault.kind == "second run at once":
            self.twins.append(self.twin(self.params[int(fault.draw * len(self.params))]))
        else:
            self.station.proxy.inject(slow_down(), share=0.5, seed=int(fault.draw * 1e6))
            self.healed = time.time() + fault.lasts

    def twin(self, params: PipelineParams) -> subprocess.Popen[bytes]:
        """The pipeline from a command line."""
        command = [sys.executable, "-c", TWIN, params.model_dump_json()]
        with (self.station.home / "twins.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=die_with_parent)

    def supervise(self) -> None:
        """Starts again what is down, ends a burst of refusals, and notes when the S3 server is back."""
        self.station.supervise()
        if self.healed < time.time():
            self.station.proxy.heal()
        if self.outages and self.outages[-1][1] == float("inf") and self.station.answers("s3"):
            self.outages[-1] = (self.outages[-1][0], time.time())

    def operate(self) -> list[FlowRun]:
        """Ends what nobody runs any more, and runs again what did not end well; all runs, none if Prefect is away."""
        with suppress(httpx.HTTPError, RuntimeError):  # as its client raises where nothing answers
            self.reconciled |= {str(run.id) for run in reconcile(SILENT)}
            found = invariants.every_run()
            bad = [run for run in found if invariants.is_whole(run) and invariants.ended_badly(run)]
            new = [run for run in bad if str(run.id) not in self.answered]
            for run in new:
                say(f"{run.name} ended {run.state.name}: run again")
                start("pipeline", PipelineParams.model_validate(run.parameters["params"]))
                self.answered.add(str(run.id))
            return [] if new else found
        return []

    def tend(self, until: float) -> None:
        """Supervises and operates until a moment."""
        while (left := until - time.time()) > 0:
            self.supervise()
            self.operate()
            time.sleep(min(ROUND, left))

    def drain(self, due: int) -> list[FlowRun]:
        """Goes on without faults until nothing is under way and nothing waits; all runs."""
        end, found = time.time() + DRAIN, []
        while time.time() < end:
            self.supervise()
            found = self.operate()
            if (
                len(invariants.scheduled(found)) >= due
                and all(map(invariants.is_final, found))
                and not self.under_way()
            ):
                break
            time.sleep(ROUND)
        return found

    def under_way(self) -> bool:
        """Whether pipelines from a command line run still."""
        return any(twin.poll() is None for twin in self.twins)

    def run(self, seconds: float, due: int, seed: int) -> list[FlowRun]:
        """The plan under the schedules; all runs when it is over."""
        self.schedule(due)
        begin = time.time()
        for fault in plan(seed, seconds):
            self.tend(begin + fault.at)
            self.inject(fault)
        self.tend(begin + seconds)
        say("no more faults")
        return self.drain(due)


def as_parameters(params: PipelineParams) -> dict[str, object]:
    """A deployment's parameters."""
    return {"params": json.loads(params.model_dump_json())}


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


@contextmanager
def reader(station: Station):
    """Reads `latest` with plain xarray about every second; yields the list that takes, at the end, what it met."""
    told: list[dict] = []
    path = station.home / "read.jsonl"
    with path.open("w") as output:
        command = [sys.executable, "-c", READER, station.box.endpoint, f"{PRODUCTS}/{POINTER}"]
        process = subprocess.Popen(command, stdout=output, cwd=station.home, preexec_fn=die_with_parent)
    yield told
    process.kill()
    process.wait()
    told += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def soak(station: Station, params: list[PipelineParams], minutes: float, seed: int) -> list[str]:
    """A whole soak; prints its table, and returns what does not hold."""
    station.open()
    one, due = Soak(station, params), int(minutes * 60 // EVERY)
    expected, grids = one.undisturbed()
    say(f"{len(params)} pipelines ran undisturbed: {len(expected)} objects")
    with reader(station) as told:
        runs = one.run(minutes * 60, due, seed)
    table, unexplained = invariants.fates(
        one.injected, runs, one.reconciled, timedelta(minutes=SILENT, seconds=-float(HEARTBEAT))
    )
    print(invariants.as_markdown(table), flush=True)
    read, down = sum("grid" in line for line in told), len(one.outages)
    say(f"{due} runs scheduled, {len(one.answered)} run again, {len(one.reconciled)} ended by reconcile")
    say(f"latest was read {read} times, and {len(told) - read} times not while the S3 server was down, {down} times")
    return [
        *invariants.unfinished(runs, due, params),
        *unexplained,
        *invariants.held_slots(),
        *invariants.orphans(station),
        *invariants.half_published(),
        *invariants.unlike(one.objects(), expected),
        *invariants.misread(told, grids, one.outages),
    ]


def main() -> int:
    """1 where an invariant does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where logs and data go, to stay; by default they are deleted.")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and so closes the station
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        home = (given.folder or Path(folder)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        params = variants(write_labels(home / "labels.csv"), min(VARIANTS, int(given.minutes * 60 // EVERY)))
        station = Station(home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY=HEARTBEAT)
        os.environ.update(station.environment)
        with temporary_settings({PREFECT_API_URL: station.environment["PREFECT_API_URL"]}):
            try:
                problems = soak(station, params, given.minutes, given.seed)
            finally:
                station.close()
    print("\n".join(problems) or "every invariant holds")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
