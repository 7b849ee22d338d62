"""Sets up a Prefect server: pool, queues, the deployments of prefect.yaml, their schedules, and automations.

Everything may be made again and again: what is there is kept, and what was set in the UI since is told, not lost.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyOptions, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound, ParameterBindError, ParameterTypeError, SignatureMismatchError
from prefect.settings import PREFECT_API_URL
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from prefect.variables import Variable
from prefect.workers.process import ProcessWorker

from infra import schedules
from infra.errors import UserError
from infra.schedules import Plan
from infra.settings import FILE, file, settings

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "prefect.yaml"
AUTOMATIONS = Path(__file__).with_name("automations.yaml")
POOL = TAG = "rangegrid"
ROOM = 4  # runs at a time: a pipeline and its step, a long run, and a quick one that need not wait
QUEUES = {"quick": (1, None), "default": (5, 2), "long": (10, 1)}  # priority, and most runs at a time
LAID = "rangegrid_laid"  # Prefect variable with digests of what was deployed last
NOWHERE = "00000000-0000-0000-0000-000000000000"  # placeholder in the file: id of the block for alerts
EVERY = "prefect.deployment.*"  # placeholder in the file: our deployments, or one by name

Take = Literal["ui", "file"]


def api_url() -> str:
    """Returns the URL of the Prefect server that is set: in the environment, a settings file or Prefect's profile.

    Raises:
        UserError: None is, or nothing answers there.
    """
    url = PREFECT_API_URL.value()
    if url is None:
        raise UserError(
            "no Prefect server is set: export PREFECT_API_URL, as http://127.0.0.1:4200/api, or put it into the "
            "settings file; `rangegrid serve` starts a server"
        )
    with get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise silent(url, error)
    return url


def silent(url: str | None, error: Exception) -> UserError:
    """Returns the error of a server that is not there, in one sentence."""
    return UserError(
        f"no Prefect server answers at {url} ({type(error).__name__}): start it with `rangegrid serve`, mend "
        "PREFECT_API_URL, or unset it: commands that make a product need no server"
    )


def deployments() -> dict[str, dict[str, Any]]:
    """Returns the deployments of prefect.yaml by their names, which are those of their flows."""
    return {found["name"]: found for found in yaml.safe_load(CONFIG.read_text())["deployments"]}


def on_server(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """Returns our deployment of a name, or nothing where it is not deployed."""
    try:
        return client.read_deployment_by_name(f"{name}/{name}")
    except ObjectNotFound:
        return None


class Told(NamedTuple):
    """What was done to one deployment or automation."""

    name: str
    what: str
    """What was done, in one line."""


def deploy(path: Path | None = None, take: Take | None = None) -> list[Told]:
    """Makes all that is missing on the server that is set, and lays the operator's schedules over it.

    Args:
        path: The file of schedules; by default `schedules.yaml` beside the settings file.
        take: Of what was set in the UI since the last time and differs from the file: `ui` writes it into the file,
            `file` replaces it. By default it is kept and told.

    Returns:
        What became of each, where there is something to tell.

    Raises:
        UserError: No server answers, or the file is wrong; nothing is changed then.
    """
    api_url()
    path = path or file().parent / schedules.NAME
    ours = deployments()
    wanted = schedules.read(path, ours)
    flows = {name: import_object(found["entrypoint"]) for name, found in ours.items()}
    for name, planned in wanted.items():
        _check(path, flows[name], planned)
    with get_client(sync_client=True) as client:
        pool = make_pool(client)
        told: list[Told] = []
        laid: dict[str, str] = dict(Variable.get(LAID, {}))
        for name, found in ours.items():
            told += _deploy(client, pool, found, flows[name], wanted.get(name), laid, path, take)
        told += _automate(client, laid)
        Variable.set(LAID, laid, overwrite=True)
    return told


def _check(path: Path, flow: Flow[..., Any], wanted: Plan) -> None:
    """Refuses parameters that the flow would refuse; one that makes no runs may lack some."""
    everywhere = schedules.parameters(wanted)
    for entry in wanted:
        given = everywhere | entry.parameters
        if not entry.is_schedule or not entry.active:
            given = _any_url(flow) | given
        try:
            flow.validate_parameters(given)
        except (ParameterTypeError, ParameterBindError, SignatureMismatchError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{path}: the parameters of {entry.deployment} ({entry.told()}) are refused: {said}"
            ) from None


def _any_url(flow: Flow[..., Any]) -> dict[str, str]:
    """Supplies placeholders for what the flow needs and an entry may leave to whoever starts a run."""
    needed = inspect.signature(flow.fn).parameters.values()
    return {p.name: "any" for p in needed if p.default is p.empty and p.annotation in (str, "str")}


def make_pool(client: SyncPrefectClient) -> WorkPool:
    """Makes the work pool with its queues; one that is there, of whatever type, stays as it is."""
    try:
        return client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=POOL, type="process", concurrency_limit=ROOM, base_job_template=template)
        return client.create_work_pool(pool)
    finally:
        for name, (priority, limit) in QUEUES.items():
            _make_queue(client, name, priority, limit)


def _make_queue(client: SyncPrefectClient, name: str, priority: int, limit: int | None) -> None:
    try:
        found = client.read_work_queue_by_name(name, POOL)
    except ObjectNotFound:
        client.create_work_queue(name, priority=priority, concurrency_limit=limit, work_pool_name=POOL)
        return
    if name == "default" and found.concurrency_limit is None and found.priority != priority:  # as Prefect makes it
        url = f"/work_pools/{POOL}/queues/{name}"
        client.request("PATCH", url, json={"priority": priority, "concurrency_limit": limit})


def _deploy(
    client: SyncPrefectClient,
    pool: WorkPool,
    ours: dict[str, Any],
    flow: Flow[..., Any],
    of_file: Plan | None,
    laid: dict[str, str],
    path: Path,
    take: Take | None,
) -> Iterator[Told]:
    name = ours["name"]
    default = schedules.of_config(ours)
    wanted = default if of_file is None else of_file
    found = on_server(client, name)
    there = schedules.of_server(name, found) if found else wanted
    touched = there != wanted and digest(there) != laid.get(name, digest(default))
    if touched and take == "ui":
        schedules.keep(path, {name: there})
        yield Told(name, f"what was set in the UI is in {path} now: {tell(there)}")
    elif touched and take is None:
        if of_file is None:
            instead = ""
        else:
            instead = f", in place of the file's {tell(of_file)}"
        yield Told(
            name,
            f"kept what was set in the UI{instead}: {tell(there)}. `rangegrid deploy --take ui` writes it into {path}, "
            "`--take file` replaces it",
        )
    chosen = there if touched and take != "file" else wanted
    if not touched or take:
        laid[name] = digest(chosen)
    _create(client, pool, ours, flow, found, chosen)


def _create(
    client: SyncPrefectClient,
    pool: WorkPool,
    ours: dict[str, Any],
    flow: Flow[..., Any],
    found: DeploymentResponse | None,
    wanted: Plan,
) -> None:
    """Makes or renews a deployment; its queue, limit, tags and variables stay where somebody set others."""
    limit = ours["concurrency_limit"]
    queue = ours["work_pool"]["work_queue_name"]
    moved = found is not None and found.work_queue_name not in (None, "default")
    kept = found.global_concurrency_limit if found else None
    client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=ours["name"],
        description=ours["description"],
        tags=list(dict.fromkeys([*ours["tags"], *(found.tags if found else [])])),
        entrypoint=ours["entrypoint"],
        pull_steps=[],
        work_pool_name=pool.name,
        work_queue_name=found.work_queue_name if found and moved else queue,
        concurrency_limit=kept.limit if kept else limit["limit"],
        concurrency_options=ConcurrencyOptions.model_validate(
            {key: value for key, value in limit.items() if key != "limit"}
        ),
        job_variables=_with_place(found.job_variables or {} if found else {}, pool),
        parameters=schedules.parameters(wanted),
        schedules=schedules.creates(wanted),
        parameter_openapi_schema=parameter_schema(flow).model_dump(exclude_unset=True),
        enforce_parameter_schema=True,
    )


def _with_place(variables: dict[str, Any], pool: WorkPool) -> dict[str, Any]:
    """Passes on where the settings are: a run on this machine reads the same file, and relative paths begin there.

    Containers have their settings in their environment.
    """
    environment = {key: value for key, value in variables.get("env", {}).items() if key != FILE}
    if pool.type != "process" or not file().is_file():
        return variables | {"env": environment}
    return variables | {"env": environment | {FILE: str(file())}, "working_dir": str(file().parent)}


def digest(content: Any) -> str:
    """Returns a short name of what was laid, by which a change since is known."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def tell(wanted: Plan) -> str:
    """Tells a plan in one line."""
    return "; ".join(entry.told() for entry in wanted) or "no schedule"


def automations(client: SyncPrefectClient) -> list[AutomationCore]:
    """Returns the automations of the file: those that alert only where there is a block that they go to.

    Raises:
        UserError: The settings name a block that is not there.
    """
    block = _block(client, settings().alerts)
    known = {name: found for name in deployments() if (found := on_server(client, name))}
    ids = {EVERY.replace("*", name): f"prefect.deployment.{found.id}" for name, found in known.items()}
    told = yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    filled = [_replace(automation, {NOWHERE: block, EVERY: list(ids.values()), **ids}) for automation in told]
    return [
        AutomationCore.model_validate(automation) for automation in filled if block or NOWHERE not in str(automation)
    ]


def _replace(content: Any, values: dict[str, Any]) -> Any:
    """Returns the content with its placeholders replaced, where their values are known."""
    if isinstance(content, dict):
        return {key: _replace(value, values) for key, value in content.items()}
    if isinstance(content, list):
        return [_replace(value, values) for value in content]
    if isinstance(content, str):
        return values.get(content) or content
    return content


def _block(client: SyncPrefectClient, name: str | None) -> str | None:
    if name is None:
        return None
    kind, _, own = name.partition("/")
    try:
        return str(client.read_block_document_by_name(own, kind).id)
    except ObjectNotFound:
        raise UserError(
            f"RANGEGRID_ALERTS is {name!r}, and the server has no such block: make it (`prefect block ls` shows those "
            "that are there), or take the setting out"
        ) from None


def _automate(client: SyncPrefectClient, laid: dict[str, str]) -> Iterator[Told]:
    if settings().alerts is None:
        yield Told("alerts", "none are sent: set RANGEGRID_ALERTS to a notification block, as slack-webhook/duty")
    for automation in automations(client):
        found = next(iter(client.read_automations_by_name(automation.name)), None)
        if found is None:
            client.create_automation(automation)
        elif _content(found) != laid.get(automation.name, _content(found)):
            yield Told(automation.name, "kept as it was changed in the UI; deleted there, it is made anew")
            continue
        else:
            client.update_automation(found.id, automation.model_copy(update={"enabled": found.enabled}))
        laid[automation.name] = _content(client.read_automations_by_name(automation.name)[0])


def _content(automation: AutomationCore) -> str:
    """Returns the digest of what an automation does, whether or not it is on."""
    content = automation.model_dump(include={"trigger", "actions", "description"})
    return digest(json.dumps(content, sort_keys=True, default=_in_order))


def _in_order(value: Any) -> Any:
    """Returns sets sorted, since the order of Python's differs between processes."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def upcoming(client: SyncPrefectClient) -> list[tuple[str, str]]:
    """Returns (deployment, its plan in words) of every schedule that is on."""
    found = {name: on_server(client, name) for name in deployments()}
    plans = [(name, schedules.of_server(name, there)) for name, there in found.items() if there and not there.paused]
    return [(name, e.told()) for name, entries in plans for e in entries if e.is_schedule and e.active]
