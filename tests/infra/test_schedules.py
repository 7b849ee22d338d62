"""Deployments on a Prefect server, and the operator's schedules over them: an upgrade loses nothing that was set."""

import asyncio
import json
import os
import subprocess
import sys
import uuid

import pytest
import yaml
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Pending, Running
from prefect.workers.base import BaseWorker, BaseWorkerResult
from prefect.workers.process import ProcessJobConfiguration

from infra import deployments, schedules
from infra.deployments import deploy, on_server
from infra.errors import UserError
from infra.reconcile import begun, reconcile
from infra.sandbox import servers

DIGESTS = """
import yaml
from prefect.events.schemas.automations import AutomationCore
from infra.deployments import AUTOMATIONS, _content
for automation in yaml.safe_load(AUTOMATIONS.read_text())["automations"]:
    print(_content(AutomationCore.model_validate(automation)))
"""
FILE = """\
# the field campaign
- deployment: sample
  cron: "15 4 * * 3"
  timezone: Europe/Berlin
  parameters: {params: {patches: 77}}
- deployment: pipeline
  parameters: {params: {sample: {patches: 2000}}}
"""


@pytest.fixture
def client(prefect):
    """A client of a server on which nothing of ours is deployed."""
    with get_client(sync_client=True) as client:
        for name in deployments.deployments():
            if found := on_server(client, name):
                client.delete_deployment(found.id)
        for automation in client.read_automations():
            client.delete_automation(automation.id)
        if client.read_variable_by_name(deployments.LAID):
            client.delete_variable_by_name(deployments.LAID)
        yield client


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The operator's file, beside settings that keep products."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANGEGRID_STORAGE_URL", "RANGEGRID_SETTINGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text("RANGEGRID_STORAGE_URL=products\n")
    (tmp_path / schedules.NAME).write_text(FILE)
    return tmp_path / schedules.NAME


def told(**given):
    return {line.name: line.what for line in deploy(**given) if line.name != "alerts"}


def in_ui(client, name, cron, active, parameters):
    """What the UI sends where a schedule is edited."""
    found = on_server(client, name)
    for schedule in found.schedules:
        client.delete_deployment_schedule(found.id, schedule.id)
    schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron=cron, timezone="Asia/Tokyo"), active=active)
    client.create_deployment_schedules(found.id, [schedule])
    client.update_deployment(found.id, DeploymentUpdate(parameters=parameters))


def has(client, name):
    """Crons with time zone and parameters and whether they are on, and the deployment's own parameters."""
    found = on_server(client, name)
    rules = [(s.schedule.cron, s.schedule.timezone, s.active, s.parameters) for s in found.schedules]
    return rules, found.parameters


def test_an_upgrade_keeps_cron_parameters_and_active(client, path):
    """Of the file and of the UI; what the UI has and the file has not is told until a command settles it."""
    assert told() == {}
    file = ([("15 4 * * 3", "Europe/Berlin", True, {"params": {"patches": 77}})], {})
    assert has(client, "sample") == file
    assert has(client, "pipeline") == ([], {"params": {"sample": {"patches": 2000}}})
    assert has(client, "train") == ([("0 3 1 * *", "UTC", False, {})], {})
    ui = ([("7 7 * * *", "Asia/Tokyo", True, {})], {"patches": "s3://b/patches/1"})
    in_ui(client, "train", "7 7 * * *", True, {"patches": "s3://b/patches/1"})
    in_ui(client, "sample", "8 8 * * *", False, {})
    kept = told()  # an upgrade
    assert set(kept) == {"sample", "train"}
    assert "15 4 * * 3 Europe/Berlin" in kept["sample"]
    assert "8 8 * * * Asia/Tokyo, off" in kept["sample"]
    assert all("rangegrid deploy --take ui" in what for what in kept.values())
    assert has(client, "train") == ui
    assert has(client, "sample")[0] == [("8 8 * * *", "Asia/Tokyo", False, {})]
    told(take="file")
    assert has(client, "sample") == file
    assert has(client, "train") == ([("0 3 1 * *", "UTC", False, {})], {})
    in_ui(client, "train", "7 7 * * *", True, {"patches": "s3://b/patches/1"})
    assert set(told(take="ui")) == {"train"}
    assert path.read_text().startswith("# the field campaign")
    client.delete_deployment(on_server(client, "train").id)
    assert told() == {}  # a restore, without Prefect's database
    assert has(client, "train") == ui


def test_a_run_is_handed_the_place_of_the_settings_and_waits_in_a_queue_of_its_kind(client, path):
    told()
    found = on_server(client, "sample")
    assert found.job_variables["env"]["RANGEGRID_SETTINGS"] == str(path.with_name(".env"))
    assert found.job_variables["working_dir"] == str(path.parent)
    queues = {queue.name: queue.priority for queue in client.read_work_queues(work_pool_name="rangegrid")}
    assert queues == {"quick": 1, "default": 5, "long": 10}
    named = {name: on_server(client, name).work_queue_name for name in deployments.deployments()}
    assert named["sample"] == named["evaluate"] == named["prune"] == "quick"
    assert named["train"] == named["encode"] == named["ablate"] == named["pipeline"] == "default"
    assert named["publish"] == "long"
    client.update_deployment(found.id, DeploymentUpdate(job_variables=found.job_variables | {"env": {"MINE": "1"}}))
    path.with_name(".env").unlink()
    told()
    assert on_server(client, "sample").job_variables["env"] == {"MINE": "1"}


class Worker(BaseWorker):
    """Prefect's own, but what it starts is no process: a run of `publish` takes until it is released."""

    type = "process"
    job_configuration = ProcessJobConfiguration

    async def run(self, flow_run, configuration, task_status=None):
        task_status.started("nobody")
        await self.client.set_flow_run_state(flow_run.id, Running())
        if flow_run.name.startswith("publish"):
            await self.released.wait()
        await self.client.set_flow_run_state(flow_run.id, Completed())
        return BaseWorkerResult(status_code=0, identifier="nobody")


def test_a_sample_overtakes_the_grids_that_run_and_wait(client, path):
    told()
    inputs = {"checkpoint": "s3://b/c", "database": "s3://b/d"}

    def due(name, deployment, **parameters):
        found = on_server(client, deployment).id
        return client.create_flow_run_from_deployment(found, name=name, parameters=parameters).id

    grids = [due(name, "publish", **inputs) for name in ("publish 1", "publish 2")]
    samples = []

    def states(runs):
        return sorted(client.read_flow_run(run).state.type.value for run in runs)

    async def until(runs, state):
        async with asyncio.timeout(servers.PATIENCE):
            while state not in states(runs):
                await asyncio.sleep(0.05)

    async def work():
        async with Worker(work_pool_name="rangegrid") as worker:
            worker.released = asyncio.Event()
            await worker.sync_with_backend()
            await worker.get_and_submit_flow_runs()
            await until(grids, "RUNNING")
            samples.append(due("sample", "sample"))
            await worker.get_and_submit_flow_runs()
            await until(samples, "COMPLETED")
            seen = states(grids)
            worker.released.set()
            return seen

    assert asyncio.run(work()) == ["RUNNING", "SCHEDULED"]
    for run in (*grids, *samples):
        client.delete_flow_run(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("deployment: sample", "is no list"),
        ("- {deployment: smaple}", "entry 1: there is no deployment 'smaple'"),
        ("- {deployment: sample, cron: every day}", "entry 1: cron is 'every day'"),
        ("- {deployment: sample, cron: 0 3 * * 1, timezone: Berlin}", "entry 1: timezone is 'Berlin'"),
        ("- {deployment: sample, corn: 0 3 * * 1}", "entry 1: corn"),
        ("- {deployment: sample, parameters: {params: {patches: -1}}}", "the parameters of sample"),
        ("- {deployment: sample, parameters: {params: {scene: nearest}}}", "needs a date"),
        ("- {deployment: publish, cron: 0 3 2 * *}", "checkpoint"),
        ("- {deployment: publish, parameters: {params: {step: 0.7}}}", "a step of 0.7 does not divide"),
        ("- {deployment: sample, parameters: {parms: {}}}", "parms"),
        ("- [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_laid(client, path, content, message):
    path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        told()
    assert str(path) in str(raised.value)
    assert on_server(client, "sample") is None


def test_alerts_are_made_where_there_is_a_block_for_them_and_never_to_nobody(client, path, nobody, monkeypatch):
    alerts = next(line for line in deploy() if line.name == "alerts")
    assert "RANGEGRID_ALERTS" in alerts.what
    (silent,) = client.read_automations()
    assert silent.trigger.match_related[1].root["prefect.resource.id"] == [
        f"prefect.deployment.{on_server(client, name).id}" for name in deployments.deployments()
    ]
    monkeypatch.setenv("RANGEGRID_ALERTS", "custom-webhook/duty")
    with pytest.raises(UserError, match="RANGEGRID_ALERTS is 'custom-webhook/duty', and the server has no such block"):
        told()
    block = CustomWebhookNotificationBlock(name="duty", url=f"http://{nobody}").save("duty", overwrite=True)
    assert told() == told() == {}
    made = client.read_automations()
    of_file = yaml.safe_load(deployments.AUTOMATIONS.read_text())["automations"]
    assert {automation.name for automation in made} == {automation["name"] for automation in of_file}
    assert len(made) == len(of_file)  # made once
    blocks = {str(a.block_document_id) for automation in made for a in automation.actions if hasattr(a, "subject")}
    assert blocks == {str(block)}
    assert str(uuid.UUID(int=0)) not in json.dumps([automation.model_dump(mode="json") for automation in made])


def test_another_process_knows_what_was_laid_as_unchanged():
    """Sets have another order in each: the automations would count as changed in the UI, and never be renewed."""
    told = {
        subprocess.run(
            [sys.executable, "-c", DIGESTS], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert told != {""}


def test_reconcile_ends_ours_and_no_others(client, path):
    """A payroll, running and pending; one that has our tag, and one of the name of a flow of ours."""
    told()

    @flow
    def payroll():
        """Pays."""

    @flow(name="train")
    def theirs():
        """Is another's."""

    others = [client.create_flow_run(payroll, state=state, tags=tags) for state in (Running(), Pending())
              for tags in ([], ["rangegrid"])]  # fmt: skip
    other = client.create_deployment(client.create_flow(theirs), name="nightly", tags=["rangegrid"])
    others.append(client.create_flow_run_from_deployment(other, state=Running()))
    others.append(client.create_flow_run(theirs, state=Running()))
    ours = client.create_flow_run_from_deployment(on_server(client, "sample").id, state=Running())
    found = begun()
    assert found.server == PREFECT_API_URL.value()
    assert [run.id for run in found.ours] == [ours.id]
    assert {run.id for run in others} <= {run.id for run in found.others}
    assert reconcile(silent_minutes=15) == []
    assert [run.id for run in reconcile(silent_minutes=0)] == [ours.id]
    assert client.read_flow_run(ours.id).state.is_crashed()
    for run in others:
        assert client.read_flow_run(run.id).state.type == run.state.type
        client.delete_flow_run(run.id)


def test_without_a_server_nothing_is_looked_at(nobody):
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(UserError, match="no Prefect server is set"),
    ):
        reconcile(15)
    with (
        temporary_settings({PREFECT_API_URL: f"http://{nobody}/api"}),
        pytest.raises(UserError, match=f"no Prefect server answers at http://{nobody}/api"),
    ):
        reconcile(15)
