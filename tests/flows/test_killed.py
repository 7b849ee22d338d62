"""A real Prefect server, worker and deployments; what runs a flow is killed, and one rerun completes."""

import threading
import time
from collections import Counter

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.encode import encode
from flows.sample import sample
from flows.train import train
from infra import storage
from infra.reconcile import reconcile
from tasks.cards import home_of, read_card
from tasks.params import (
    EncodeParams,
    EncoderParams,
    EvaluateParams,
    JoinParams,
    PipelineParams,
    PublishParams,
    TrainParams,
)
from tasks.patches.store import open_patches
from tasks.products import DatabaseCard, GridCard
from tasks.release import versions
from tests import invariants
from tests.flows.test_pipeline import SAMPLE
from tests.station import Station, kill, start, state
from tests.tasks.test_faults import first

PATIENCE = 2400  # seconds: a worker, a flow and a cluster each start a Python of their own, and a pipeline six
TRAIN = TrainParams(
    encoder=EncoderParams(dim=64), steps=40, save_every=5, batch=16, degree=8, hidden=32, dim=16, device="cpu"
)
GRID = PublishParams(step=3.0, tile_cells=20)
TAKES = {
    "sample": (),
    "train": ("patches",),
    "encode": ("patches", "checkpoint"),
    "publish": ("checkpoint", "database"),
}
WRITES = {"sample": "/pixels/c/", "train": "/training.pt", "encode": "/keys/c/", "publish": "/embedding/c/"}  # a unit's
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def station(tmp_path_factory):
    made = Station(tmp_path_factory.mktemp("station"))
    with (
        pytest.MonkeyPatch.context() as patch,
        temporary_settings({PREFECT_API_URL: made.environment["PREFECT_API_URL"]}),
    ):
        for name, value in made.environment.items():
            patch.setenv(name, value)
        try:
            made.open()
            yield made
        finally:
            made.close()


@pytest.fixture(autouse=True)
def sound(station):
    """Whatever was killed: in the end everything is up, no slot is held, nothing is left over or half published."""
    station.proxy.heal()
    station.proxy.faults.clear()
    station.supervise()
    yield
    assert invariants.held_slots() == []
    assert invariants.orphans(station) == []
    assert [version.grid for version in versions.versions() if version.state == "unfinished"] == []


def until(answers, station=None):
    end = time.monotonic() + PATIENCE
    while not (found := answers()):
        assert time.monotonic() < end, "it did not come to pass"
        if station:
            station.supervise()
        time.sleep(0.2)
    return found


def ended(run, station):
    """The last state of a run, while what died is started again."""
    until(lambda: state(run).is_final(), station)
    return state(run)


def begun():
    """The samples whose places are being screened, or were."""
    root = "s3://rangegrid/patches"
    return {name for name in storage.names(root) if storage.names(storage.join(root, name, "screen"))}


def test_a_run_killed_with_its_worker_is_ended_and_one_rerun_completes(station):
    """It has a cluster of its own, which dies with it."""
    params, before = SAMPLE.model_copy(update={"seed": 77}), begun()
    station.kill("worker")
    station.start("worker", RANGEGRID_CLUSTER="local")
    killed = start("sample", params)
    until(lambda: state(killed).is_running() and begun() - before)
    station.kill("worker")
    assert state(killed).is_running()  # and it would stay so for ever
    assert reconcile(silent_minutes=15) == []  # it was heard of just now
    assert [run.id for run in reconcile(silent_minutes=0)] == [killed.id]
    assert state(killed).is_crashed()
    assert "Run it again" in state(killed).message
    again = start("sample", params)  # the deployment takes one at a time: the dead run holds its place no more
    assert ended(again, station).is_completed(), state(again).message
    assert len(open_patches(state(again).message).manifest) == params.patches
    assert reconcile(silent_minutes=0) == []


def test_a_step_outlives_its_dask_scheduler(station):
    """Nobody reruns it: the step is tried again by itself, on a new connection."""
    before = begun()
    run = start("sample", SAMPLE.model_copy(update={"seed": 78}))
    until(lambda: begun() - before)
    station.kill("scheduler")
    assert ended(run, station).is_completed(), state(run).message


def test_a_run_outlives_the_prefect_server(station):
    """It keeps its place under the limit, whose lease is on the server's disk: without it Prefect cancels the run."""
    params, before, back = SAMPLE.model_copy(update={"seed": 79}), begun(), threading.Event()
    station.proxy.inject(first(lambda: back.wait(PATIENCE)), lambda r: r.method == "PUT" and WRITES["sample"] in r.path)
    run = start("sample", params)
    until(lambda: begun() - before)
    station.kill("prefect")
    until(lambda: station.answers("prefect"), station)
    with get_client(sync_client=True) as client:
        client.renew_concurrency_lease(state(run).state_details.deployment_concurrency_lease_id, 300)
    back.set()
    assert ended(run, station).is_completed(), state(run).message
    assert len(open_patches(state(run).message).manifest) == params.patches


@pytest.fixture(scope="module")
def inputs(station):
    """The URLs of patches, checkpoint and database."""
    patches = sample(SAMPLE)
    checkpoint = train(patches, TRAIN)
    return {"patches": patches, "checkpoint": checkpoint, "database": encode(patches, checkpoint)}


KILLED = [(step, "s3") for step in TAKES]
KILLED += [
    ("sample", "dask-1"),
    ("encode", "dask-1"),
    ("publish", "dask-1"),
    ("publish", "worker"),
    ("train", "engine"),
    ("publish", "engine"),
]


def begin(step, inputs, number):
    """A run of a step on parameters whose product is not there yet."""
    params = {
        "sample": SAMPLE.model_copy(update={"seed": 80 + number}),
        "train": TRAIN.model_copy(update={"seed": 80 + number}),
        "encode": EncodeParams(shard_rows=10 + number),
        "publish": GRID.model_copy(update={"beta": number / 10}),
    }
    return start(step, params[step], **{name: inputs[name] for name in TAKES[step]})


@pytest.mark.parametrize("number", range(len(KILLED)), ids=["-".join(case) for case in KILLED])
def test_a_step_completes_by_itself_or_by_one_rerun(station, inputs, number):
    """kill -9 when its second unit is being written, of what is named.

    The engine is a run's own process: only its death needs the rerun. The Prefect worker is killed without its runs.
    """
    step, victim = KILLED[number]

    def strike():
        if victim == "engine":
            kill(*station.engines())
        else:
            station.kill(victim, family=victim != "worker", seconds=2)

    station.proxy.inject(first(strike), lambda r: r.method == "PUT" and WRITES[step] in r.path, times=1, skip=1)
    run = begin(step, inputs, number)
    reached = ended(run, station)
    assert station.proxy.faults["first"] == 1
    if victim == "engine":
        assert reached.is_crashed()
        reached = ended(begin(step, inputs, number), station)
    assert reached.is_completed(), reached.message
    assert storage.exists(storage.join(home_of(reached.message) if step == "publish" else reached.message, "card.json"))


def test_a_region_is_sampled_joined_and_published_by_deployments(station, inputs):
    """Of the demo's west, to the inputs' database: by the pipeline's deployment, and by those of its steps."""
    region, sampled = {"region": ("-5 43 8 50",)}, SAMPLE.model_copy(update={"spacing_km": 180.0})
    scored = EvaluateParams(embedder=("coordinates",), folds=2, spacing_km=40)
    whole = PipelineParams(
        **region, base=(inputs["checkpoint"], inputs["database"]), sample=sampled, publish=GRID, evaluate=scored
    )
    run = start("pipeline", whole.model_copy(update={"publish": GRID.model_copy(update={"promote": False})}))
    assert ended(run, station).is_completed(), state(run).message
    assert names_of(run) == {"sample": 1, "encode": 1, "join": 1, "publish": 2, "evaluate": 1}
    patches = done("sample", station, sampled.model_copy(update=region))
    own = done("encode", station, EncodeParams(), patches=patches, checkpoint=inputs["checkpoint"])
    joined = done("join", station, JoinParams(), databases=[inputs["database"], own])
    card = read_card(joined, DatabaseCard)
    assert {origin.region is None for origin in card.origins} == {True, False}
    published = GRID.model_copy(update=region | {"promote": False})
    grid = done("publish", station, published, checkpoint=inputs["checkpoint"], database=joined)
    assert read_card(home_of(grid), GridCard).region.name == "-5 43 8 50"


def done(name, station, params, **arguments):
    """What a run of a deployment made."""
    run = start(name, params, **arguments)
    assert ended(run, station).is_completed(), state(run).message
    return state(run).message


def names_of(run):
    """How many runs of each deployment a run of the pipeline started."""
    with get_client(sync_client=True) as client:
        steps = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [run.id]}))
        assert all(step.state.is_completed() for step in steps)
        return Counter(client.read_flow(step.flow_id).name for step in steps)


def test_the_pipeline_runs_each_step_as_its_own_deployment(station, tmp_path):
    scored = EvaluateParams(points=200, embedder=("coordinates", "wrap"), folds=2)
    params = PipelineParams(sample=SAMPLE, train=TRAIN, publish=GRID, evaluate=scored)
    whole = start("pipeline", params)
    assert ended(whole, station).is_completed(), state(whole).message
    with get_client(sync_client=True) as client:
        steps = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [whole.id]}))
        names = {client.read_flow(run.flow_id).name: run.state for run in steps}
    assert set(names) == {"sample", "train", "encode", "publish", "evaluate"}
    assert all(ended.is_completed() for ended in names.values())
    assert storage.exists(storage.join(names["publish"].message, "zarr.json"))
