"""Runs a flow for a command: on the Prefect server that is set, else as the plain function that it is.

Without a server, only the terminal shows progress: starting a temporary server would take half a minute.
"""

from typing import Any

from prefect import Flow, tags
from prefect.settings import PREFECT_API_URL

from tasks.units import in_run


def start(flow: Flow[..., Any], *arguments: Any) -> Any:
    """Runs a flow and returns its result.

    Args:
        flow: The flow.
        *arguments: As the flow takes them.

    Raises:
        UserError: A server is set and does not answer.
    """
    if in_run():
        return flow(*arguments)
    if PREFECT_API_URL.value() is None:
        return flow.fn(*arguments)
    from infra.deployments import TAG, api_url  # here, since only a server needs them

    api_url()
    with tags(TAG):
        return flow(*arguments)
