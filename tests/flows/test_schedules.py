"""What a schedule makes, month after month: runs that Prefect says were due then, on a real catalog and S3 storage."""

from datetime import UTC, datetime

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

from flows.encode import encode
from flows.evaluate import evaluate
from flows.publish import publish
from flows.sample import sample
from flows.train import train
from infra import storage
from infra.errors import UserError
from tasks.params import PublishParams, TrainParams
from tasks.patches.store import open_patches
from tests.flows.test_pipeline import SAMPLE

MONTHS = ("2021-07", "2022-02", "2023-04")  # of the demo planet's scenes in the north
DUE = [datetime(2021, 8, 1, 3, tzinfo=UTC), datetime(2022, 3, 1, 3, tzinfo=UTC), datetime(2023, 5, 1, 3, tzinfo=UTC)]
POINTS = "s3://rangegrid/schedules/points.csv"
LISTED = {"places": "list", "source": POINTS, "patches": 8, "max_cloud_percent": 100, "min_clear_fraction": 0.1}
PARAMS = SAMPLE.model_copy(update={**LISTED, "datetime": "previous month", "line": "europe"})
SMALL = TrainParams(steps=2, batch=4, degree=2, hidden=8, dim=4, held_out_share=0)
COARSE = PublishParams(step=15.0, tile_cells=4, promote=False)


@pytest.fixture(autouse=True)
def threads(sandbox, prefect, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", "s3://rangegrid/schedules")
    monkeypatch.setenv("RANGEGRID_CLUSTER", "threads")


def due(flow, when, **parameters):
    """Runs a flow as the run of a schedule that was due then; its id and its result."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(
            flow, parameters=flow.serialize_parameters(parameters), state=Scheduled(scheduled_time=when)
        )
    return run.id, run_flow(flow, run)


def again(flow, run_id):
    """Runs the same run again, as Retry on its page does."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Scheduled(), force=True)
        return run_flow(flow, client.read_flow_run(run_id))


def month(when):
    _, patches = due(sample, when, params=PARAMS)
    _, checkpoint = due(train, when, patches="newest:europe", params=SMALL)
    _, database = due(encode, when, patches="newest:europe", checkpoint="newest:europe")
    _, grid = due(publish, when, checkpoint="newest:europe", database="newest:europe", params=COARSE)
    return {"patches": patches, "checkpoint": checkpoint, "database": database, "grid": grid}


@pytest.fixture(scope="module")
def made(sandbox, prefect):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", "s3://rangegrid/schedules")
        patch.setenv("RANGEGRID_CLUSTER", "threads")
        points = [f"{lon},{lat}" for lat in (44.6, 46.2, 47.4, 48.6) for lon in (1.1, 2.3, 3.4, 4.2, 5.3)]
        storage.write(POINTS, "\n".join(["lon,lat", *points]).encode())
        return [month(when) for when in DUE]


def test_three_months_make_three_samples_and_three_grids(made):
    for product in ("patches", "checkpoint", "database", "grid"):
        assert len({month[product] for month in made}) == 3, product
    for month, expected in zip(made, MONTHS, strict=True):
        patches = open_patches(month["patches"])
        assert len(patches.manifest) == 8
        assert set(patches.manifest["datetime"].str[:7]) == {expected}
        assert (patches.card.line, patches.card.recipe.datetime[:7]) == ("europe", expected)
        card = storage.read_json(month["grid"].replace("grid.zarr", "card.json"))
        assert (card["database"], card["checkpoint"]) == (month["database"], month["checkpoint"])
        assert storage.read_json(storage.join(month["database"], "card.json"))["patches"] == patches.card.fingerprint


def test_a_run_tells_what_it_looked_up_and_keeps_it_when_it_is_run_again(made):
    run_id, grid = due(publish, DUE[2], checkpoint="newest:europe", database="newest:europe", params=COARSE)
    assert grid == made[2]["grid"]
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key={"any_": ["inputs"]}))
    assert (run.parameters["checkpoint"], run.parameters["database"]) == (made[2]["checkpoint"], made[2]["database"])
    assert made[2]["database"] in run.name
    assert any(made[2]["database"] in a.data and "newest:europe" in a.data for a in shown if a.flow_run_id == run_id)
    due(train, DUE[2], patches="newest:europe", params=SMALL.model_copy(update={"seed": 1}))
    newer = due(encode, DUE[2], patches="newest:europe", checkpoint="newest:europe")[1]
    assert newer not in [month["database"] for month in made]
    assert again(publish, run_id) == grid
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_id).parameters == run.parameters


def test_a_window_is_that_of_the_day_when_the_run_was_due_whenever_it_is_run(made):
    run_id, patches = due(sample, DUE[1], params=PARAMS)
    assert patches == made[1]["patches"]
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_id).parameters["params"]["datetime"] == "2022-02-01/2022-02-28"
    assert again(sample, run_id) == patches


def test_a_sample_that_is_there_enters_a_further_line(made):
    """Lines are no part of a fingerprint; and the line that had it keeps its own newest."""
    assert due(sample, DUE[0], params=PARAMS.model_copy(update={"line": "alps"}))[1] == made[0]["patches"]
    alps = due(train, DUE[0], patches="newest:alps", params=SMALL)[1]
    assert alps == made[0]["checkpoint"]
    assert due(encode, DUE[0], patches="newest:alps", checkpoint="newest:alps")[1] == made[0]["database"]
    assert due(train, DUE[2], patches="newest:europe", params=SMALL)[1] != alps


def test_a_line_without_products_is_refused_before_any_work(made):
    for line, told in (("africa", "'africa'"), ("", "the line without a name")):
        with pytest.raises(UserError, match=f"no finished patches of .*{told}"):
            due(train, DUE[0], patches=f"newest:{line}".removesuffix(":"), params=SMALL)
    with pytest.raises(UserError, match="no finished grid"):
        due(evaluate, DUE[0], checkpoint="newest:alps", database="newest:alps", grid="newest:africa")
