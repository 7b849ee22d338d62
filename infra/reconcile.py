"""Ends flow runs that were killed with everything around them, and would show as RUNNING for ever.

A run tells that it lives every three minutes (`PREFECT_FLOWS_HEARTBEAT_FREQUENCY`). One that has been silent for long
is ended as crashed, which frees its place under the deployment's limit; run again, it goes on from what is stored.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.states import Crashed

from infra.deployments import TAG, api_url, deployments, on_server

BEGUN = ["RUNNING", "PENDING", "CANCELLING"]
PAGE = 200


@dataclass(frozen=True)
class Begun:
    """The runs of a server that have begun and not ended."""

    server: str
    """URL of the API that was asked."""
    ours: list[FlowRun]
    """Runs of rangegrid: with its tag, of its flows and, if of a deployment, of its deployments."""
    others: list[FlowRun]
    """All other runs, which are left alone."""


def begun() -> Begun:
    """Returns the runs that have begun and not ended.

    Raises:
        UserError: No server is set, or it does not answer.
    """
    url = api_url()
    with get_client(sync_client=True) as client:
        runs = _begun(client)
        tagged = {run.flow_id for run in runs if TAG in run.tags}
        flows = {flow for flow in tagged if client.read_flow(flow).name in deployments()}
        ids = {None, *(found.id for name in deployments() if (found := on_server(client, name)))}
    ours = [run for run in runs if TAG in run.tags and run.flow_id in flows and run.deployment_id in ids]
    return Begun(url, ours, [run for run in runs if run not in ours])


def reconcile(silent_minutes: float) -> list[FlowRun]:
    """Ends as crashed the runs of rangegrid that have sent no heartbeat for some minutes, and returns them.

    Args:
        silent_minutes: More than two heartbeats, or a run that lives may be taken for dead.

    Raises:
        UserError: No server is set, or it does not answer.
    """
    since = datetime.now(UTC) - timedelta(minutes=silent_minutes)
    found = begun().ours
    with get_client(sync_client=True) as client:
        ended = [run for run in found if _changed(run) < since and not _heard(client, run.id, since)]
        message = f"ended by reconcile: silent for {silent_minutes:g} minutes. Run it again, and it goes on"
        for run in ended:
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    return ended


def _begun(client: SyncPrefectClient) -> list[FlowRun]:
    wanted = FlowRunFilter.model_validate({"state": {"type": {"any_": BEGUN}}})
    found: list[FlowRun] = []
    while len(found) % PAGE == 0:
        page = client.read_flow_runs(
            flow_run_filter=wanted, sort=FlowRunSort.START_TIME_ASC, limit=PAGE, offset=len(found)
        )
        if not page:
            break
        found += page
    return found


def _changed(run: FlowRun) -> datetime:
    assert run.state is not None  # for the type checker: it was found by its state
    return run.state.timestamp


def _heard(client: SyncPrefectClient, run: UUID, since: datetime) -> bool:
    beats = EventFilter(
        occurred=EventOccurredFilter(since=since),
        event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
        resource=EventResourceFilter(id=[f"prefect.flow-run.{run}"]),
    )
    return bool(client.read_events(filter=beats, limit=1).events)
