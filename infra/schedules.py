"""Reads the operator's schedules and parameters of deployments from `schedules.yaml` beside the settings file.

What it says is laid over the deployments whenever they are deployed. What was set in the UI since is kept, and told.
"""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from zoneinfo import available_timezones

import yaml
from cronsim import CronSim, CronSimError
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML

from infra.errors import UserError

NAME = "schedules.yaml"


class Entry(BaseModel):
    """A schedule of a deployment with its parameters; without times, the default parameters of every run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    deployment: str
    """Name of a deployment of rangegrid."""
    cron: str | None = None
    """Times, as five fields of cron."""
    interval: float | None = Field(None, ge=60)
    """Interval in seconds, in place of cron."""
    anchor: datetime | None = None
    """Time at which the interval begins."""
    rrule: str | None = None
    """Rule of iCalendar, in place of cron."""
    timezone: str = "UTC"
    """Time zone of the schedule, such as Europe/Berlin."""
    active: bool = True
    """Whether the schedule starts runs."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the flow."""

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, text: str | None) -> str | None:
        try:
            if text:
                CronSim(text, datetime(2000, 1, 1))
        except CronSimError as error:
            raise ValueError(f"{text!r} is no cron ({error}): give five fields, as 0 3 * * 1") from None
        return text

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in available_timezones():
            raise ValueError(f"{name!r} is no time zone: give one as Europe/Berlin or UTC")
        return name

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if sum(rule is not None for rule in (self.cron, self.interval, self.rrule)) > 1:
            raise ValueError("give one of cron, interval and rrule")
        return self

    @property
    def is_schedule(self) -> bool:
        """Tells whether the entry starts runs by itself."""
        return any((self.cron, self.interval, self.rrule))

    def told(self) -> str:
        """Tells it in one line."""
        when = self.cron or (f"every {self.interval:g} s" if self.interval else self.rrule)
        given = f", {self.parameters}" if self.parameters else ""
        if when:
            return f"{when} {self.timezone}{'' if self.active else ', off'}{given}"
        return f"each run{given}"

    def content(self) -> dict[str, Any]:
        """Returns what differs from the defaults, as the file has it."""
        return self.model_dump(mode="json", exclude_defaults=True)


Plan = tuple[Entry, ...]  # the entries of one deployment


def plan(entries: Iterable[Entry]) -> Plan:
    """Returns the entries of one deployment in an order of their own, so that equal plans are equal."""
    return tuple(
        sorted((e for e in entries if e.is_schedule or e.parameters), key=lambda entry: entry.model_dump_json())
    )


def of_server(name: str, found: DeploymentResponse) -> Plan:
    """Returns what a server has for a deployment.

    Args:
        name: Its name.
        found: As the server tells it.
    """
    entries = [Entry(deployment=name, parameters=found.parameters)]
    for schedule in found.schedules:
        given: dict[str, Any] = {"active": schedule.active, "parameters": schedule.parameters}
        rule = schedule.schedule
        zone = {"timezone": rule.timezone or "UTC"}
        if isinstance(rule, CronSchedule):
            given |= zone | {"cron": rule.cron}
        elif isinstance(rule, IntervalSchedule):
            given |= zone | {"interval": rule.interval.total_seconds(), "anchor": rule.anchor_date}
        elif isinstance(rule, RRuleSchedule):
            given |= zone | {"rrule": rule.rrule}
        else:
            continue
        entries.append(Entry.model_construct(**Entry(deployment=name).model_dump() | given))
    return plan(entries)


def of_config(deployment: dict[str, Any]) -> Plan:
    """Returns what prefect.yaml has for a deployment."""
    name = deployment["name"]
    entries = [Entry(deployment=name, parameters=deployment.get("parameters", {}))]
    for schedule in deployment.get("schedules", []):
        given = {key: value for key, value in schedule.items() if key in Entry.model_fields}
        entries.append(Entry(deployment=name, **given))
    return plan(entries)


def parameters(wanted: Plan) -> dict[str, Any]:
    """Returns those that every run of the deployment begins with."""
    return next((entry.parameters for entry in wanted if not entry.is_schedule), {})


def creates(wanted: Plan) -> list[DeploymentScheduleCreate]:
    """Returns the schedules as Prefect takes them."""
    return [
        DeploymentScheduleCreate(schedule=_rule(entry), active=entry.active, parameters=entry.parameters)
        for entry in wanted
        if entry.is_schedule
    ]


def _rule(entry: Entry) -> CronSchedule | IntervalSchedule | RRuleSchedule:
    if entry.cron:
        return CronSchedule(cron=entry.cron, timezone=entry.timezone)
    if entry.rrule:
        return RRuleSchedule(rrule=entry.rrule, timezone=entry.timezone)
    anchor = {"anchor_date": entry.anchor} if entry.anchor else {}
    return IntervalSchedule.model_validate({"interval": entry.interval, "timezone": entry.timezone, **anchor})


def read(path: Path, known: Iterable[str]) -> dict[str, Plan]:
    """Reads the operator's file; where there is none, nothing is laid over.

    Args:
        path: The file.
        known: Names of the deployments that there are.

    Returns:
        The plan of each deployment that the file names.

    Raises:
        UserError: It is no such file, or names what there is not.
    """
    try:
        content = yaml.safe_load(path.read_text()) or []
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({error}): mend the file") from None
    if not isinstance(content, list):
        raise UserError(f"{path} is no list: give one entry a schedule, as `- {{deployment: sample, cron: 0 3 * * 1}}`")
    entries = [_entry(path, number, item, set(known)) for number, item in enumerate(content, 1)]
    named = dict.fromkeys(entry.deployment for entry in entries)
    return {name: plan(entry for entry in entries if entry.deployment == name) for name in named}


def _entry(path: Path, number: int, item: Any, known: set[str]) -> Entry:
    try:
        entry = Entry.model_validate(item)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}, entry {number}: {where} is {first['input']!r}: {said}. Mend the file") from None
    if entry.deployment not in known:
        raise UserError(
            f"{path}, entry {number}: there is no deployment {entry.deployment!r}: {', '.join(sorted(known))}"
        )
    return entry


def keep(path: Path, plans: dict[str, Plan]) -> None:
    """Writes the plans of some deployments into the operator's file, in place of what it says of these alone.

    Comments and the order of everything else stay.

    Raises:
        UserError: The file cannot be written.
    """
    file = YAML()
    content = (file.load(path.read_text()) if path.exists() else None) or []
    for index in reversed([i for i, item in enumerate(content) if item["deployment"] in plans]):
        del content[index]
    content.extend(entry.content() for wanted in plans.values() for entry in wanted)
    beside = path.with_suffix(".new")
    try:
        with beside.open("w") as stream:
            file.dump(content, stream)
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): let this user write beside it") from None
