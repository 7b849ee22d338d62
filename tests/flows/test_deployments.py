"""The deployments as an operator meets them: what `prefect.yaml` says, and the forms made of the parameters."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Failed
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from urllib3 import Retry

from flows.deployed import made
from infra import buckets, clusters, retries, storage
from infra.errors import Unavailable, UserError
from infra.imagery import ranges
from infra.imagery.cogs import read_scene
from infra.sandbox import servers
from infra.stac import api
from infra.stac.catalogs import Catalog, search
from tasks import steps, units
from tasks.params import SampleParams
from tasks.steps import may_mend, sample_patches
from tasks.units import UnitsFailed
from tests import archive

CONFIG = Path(__file__).parents[2] / "prefect.yaml"
DEPLOYMENTS = {d["name"]: d for d in yaml.safe_load(CONFIG.read_text())["deployments"]}


def schema(name):
    return parameter_schema(import_object(DEPLOYMENTS[name]["entrypoint"])).model_dump()


def test_prefect_reads_the_file():
    read = PrefectYamlModel.model_validate(yaml.safe_load(CONFIG.read_text()))
    assert read.pull == []
    assert {d.name for d in read.deployments} >= {"sample", "train", "encode", "publish", "evaluate", "pipeline"}
    assert {d.concurrency_limit.collision_strategy for d in read.deployments} == {"ENQUEUE"}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_is_the_flow_of_its_name_and_says_what_it_does(name):
    """`flows.deployed.run_deployed` finds deployments by the names of flows."""
    deployment = DEPLOYMENTS[name]
    flow = import_object(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert flow.name == name
    assert flow.timeout_seconds
    assert len(deployment["description"]) > 30
    assert "rangegrid" in deployment["tags"]
    assert not [s for s in deployment.get("schedules", []) if s["active"]]  # an operator turns them on


def test_a_schedule_makes_runs(prefect):
    """By the server's own insert, which fails with some versions of SQLAlchemy."""
    flow = import_object(DEPLOYMENTS["prune"]["entrypoint"])
    every_hour = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(hours=1)))
    with get_client(sync_client=True) as client:
        made = client.create_deployment(client.create_flow(flow), name="scheduled", schedules=[every_hour])
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": made}, json={"min_runs": 3})
        runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id={"any_": [made]}))
    assert len(runs) >= 3
    assert all(run.state.is_scheduled() and run.auto_scheduled for run in runs)


def test_a_run_ends_well_only_after_its_product_was_read_back(prefect, tmp_path):
    """Whatever became of it between its writing and the end."""
    home = tmp_path / "grids" / "1"
    home.mkdir(parents=True)

    @Flow
    def publish():
        return made(f"{home.as_uri()}/grid.zarr")

    for lost in ("card.json", "grid.zarr/zarr.json"):
        with pytest.raises(UserError, match=f"the product was written to {home.as_uri()}/grid.zarr and is not there"):
            publish()
        (home / lost).parent.mkdir(exist_ok=True)
        (home / lost).write_text('{"kind": "grid"}')
    assert publish(return_state=True).message == f"{home.as_uri()}/grid.zarr"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_field_of_a_form_says_what_it_is_in_the_declared_order(name):
    form = schema(name)
    models = form.get("definitions", {})
    for model in [form, *models.values()]:
        fields = model["properties"]
        assert [field["position"] for field in fields.values()] == list(range(len(fields)))
        for field, said in fields.items():
            named = models.get(said.get("$ref", "").rpartition("/")[2], {})  # a model that says the same says it once
            assert said.get("description") or named.get("description"), f"{field} has no description"


def test_a_form_has_bounds_and_choices():
    fields = schema("publish")["definitions"]["PublishParams"]["properties"]
    assert (fields["beta"]["minimum"], fields["beta"]["maximum"]) == (0, 1)
    assert fields["beta"]["description"].endswith(". At least 0, at most 1.")  # the UI shows no bounds by itself
    assert fields["compact_dims"]["description"].endswith(". At least 1, at most 8,192.")  # of what may be unset too
    assert fields["method"]["enum"] == ["multi-head", "range+", "range"]
    assert fields["step"]["exclusiveMinimum"] == 0
    assert list(fields)[:3] == ["region", "buffer_km", "step"]  # as they are declared, not by their names


def test_only_the_urls_of_what_is_built_on_are_asked_for():
    assert schema("publish")["required"] == ["checkpoint", "database"]
    assert schema("sample")["required"] == schema("pipeline")["required"] == []


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Unavailable("the archive rests"), True),
        (UnitsFailed("3 of 9 units failed"), True),
        (ConnectionError("the scheduler is gone"), True),
        (UserError("no such band"), False),
    ],
)
def test_what_may_mend_by_itself_is_tried_again_where_nobody_watches(error, again, monkeypatch):
    failed = Failed(data=error)
    assert not may_mend(sample_patches, None, failed)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "1")
    assert may_mend(sample_patches, None, failed) == again


def test_an_outage_of_the_archive_is_tried_again_by_a_deployment(tmp_path, prefect, monkeypatch):
    """What the archive itself raises, through the failures of units, the step and Prefect's own retries."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "1")
    monkeypatch.setenv("RANGEGRID_COLLECTION", "s2")
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "home").as_uri())
    files, places = archive.scene(tmp_path / "a"), archive.listed(tmp_path, [[200, 200], [500, 500]])
    options = {"patches": 2, "places": "list", "source": places, "patch_pixels": 64, "bands": archive.BANDS}
    outage = range(len(files), len(files) + 3 * ranges.ATTEMPTS + 5)  # after the bands were opened: all tries of a unit
    with archive.served(tmp_path, lambda _: (503, {}) if len(server.asked) - 1 in outage else None) as server:
        item = archive.item("a", {band: f"{server.url}/a/{band}.tif" for band in files})
        monkeypatch.setenv("RANGEGRID_STAC_URL", archive.catalog(tmp_path, [item]))
        step = steps._task(sample_patches.__wrapped__, name="sample").with_options(retry_delay_seconds=0)
        state = step(SampleParams(**options), return_state=True)
    assert state.is_completed(), state
    with get_client(sync_client=True) as client:
        assert client.read_task_run(state.state_details.task_run_id).run_count == 2


def storage_down(url):
    storage.read("s3://bucket/object")


def catalog_down(url):
    search(Catalog(url, "s2"), "2021-01-01/2021-12-31", np.array([[2.0, 45.0]]), 100)


def archive_down(url):
    read_scene({"B02": f"{url}/B02.tif"}, np.array([[2.0, 45.0]]), 64, 10)


def archive_busy(url):
    with archive.served(".", lambda path: (503, {})) as server:
        archive_down(server.url)


def archive_refuses(url):
    with archive.served(".", lambda path: (403, {})) as server:
        archive_down(server.url)


def web_down(url):
    storage.read(f"{url}/labels.csv")


def web_busy(url):
    with archive.served(".", lambda path: (503, {})) as server:
        web_down(server.url)


def catalog_file_refused(url):
    with archive.served(".", lambda path: (403, {})) as server:
        catalog_down(f"{server.url}/items.json")


@pytest.mark.parametrize(
    "source",
    [
        *(storage_down, web_down, web_busy),
        *(catalog_down, catalog_file_refused),
        *(archive_down, archive_busy, archive_refuses),
    ],
)
def test_what_each_source_raises_while_it_is_down_may_pass_also_out_of_a_unit(source, tmp_path, monkeypatch):
    (port,) = servers.free_ports(1)
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "1")
    for module, name, value in (
        (buckets, "ATTEMPTS", 1),
        (buckets, "RETRIES", {"max_retries": 0}),
        (api, "RETRY", Retry(0)),
        (retries, "FIRST_WAIT", 0.001),
        (units, "RETRIES", 0),
    ):
        monkeypatch.setattr(module, name, value)
    with clusters.connect("threads") as client, pytest.raises(UserError) as caught:
        units.run_units(client, source, [f"http://127.0.0.1:{port}"], label="reading")
    assert may_mend(sample_patches, None, Failed(data=caught.value)), caught.value
    with pytest.raises(Unavailable):
        source(f"http://127.0.0.1:{port}")


def test_what_a_scheduler_raises_while_it_is_down_may_pass(monkeypatch, tmp_path):
    (port,) = servers.free_ports(1)
    monkeypatch.setattr(clusters, "ANSWER", 1)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "1")
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    with pytest.raises(Unavailable) as caught, clusters.connect(f"tcp://127.0.0.1:{port}"):
        pass
    assert may_mend(sample_patches, None, Failed(data=caught.value))
