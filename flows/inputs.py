"""Settles what a run's parameters leave open, once, so that whoever runs it again builds on the same inputs."""

from collections.abc import Iterator
from typing import Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from tasks.artifacts import show_table
from tasks.newest import resolve
from tasks.units import log


def settle(**parameters: Any) -> Any:
    """Returns a flow's parameters with dates in place of rolling windows, and URLs in place of `newest`.

    Inside a run, these replace the run's own parameters: they are seen on its page, and a retry or a person that runs
    it again uses them.

    Args:
        **parameters: All of the flow's parameters, by name.

    Returns:
        Their values in the same order, or the value itself where there is a single one.

    Raises:
        UserError: The line of a `newest` has no product yet.
    """
    fixed = resolve(parameters, flow_run.scheduled_start_time)
    if fixed != parameters:
        _tell(parameters, fixed)
    if len(fixed) > 1:
        return tuple(fixed.values())
    return next(iter(fixed.values()))


def _tell(asked: dict[str, Any], fixed: dict[str, Any]) -> None:
    before, after = dict(_leaves(asked)), dict(_leaves(fixed))
    rows = [
        {"parameter": name, "asked": before[name], "fixed": value}
        for name, value in after.items()
        if value != before[name]
    ]
    for row in rows:
        log().warning("%s: %s is %s", *row.values())
    if (context := FlowRunContext.get()) and context.flow and context.flow_run:
        show_table(rows, "inputs", "What the parameters left open, as it was settled at the first attempt of this run")
        name = str(context.flow.flow_run_name).format(**fixed)
        with get_client(sync_client=True) as client:
            kept = context.flow.serialize_parameters(fixed)
            client.update_flow_run(context.flow_run.id, parameters=kept, name=name)


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the single values in nested parameters, with their dotted names."""
    for name, value in values.items():
        content = value.model_dump() if hasattr(value, "model_dump") else value
        if isinstance(content, dict):
            yield from _leaves(content, f"{path}{name}.")
        else:
            yield path + name, content
