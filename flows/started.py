"""How a command runs a flow: on the Prefect server that is set, else as the plain function that it is.

Without a server nothing is to be seen but the terminal; one of its own would take half a minute.
"""

from typing import Any

from prefect import Flow, tags
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings

from infra.errors import Unavailable
from tasks.units import in_run

TAG = "rangegrid"  # of every run, as of the deployments': alerts and `rangegrid reconcile` look for it


def start(flow: Flow[..., Any], *arguments: Any) -> Any:
    """Runs a flow and returns its result.

    Args:
        flow: The flow.
        *arguments: As it takes them.

    Raises:
        Unavailable: A server is set, and does not answer.
    """
    if in_run():
        return flow(*arguments)
    url = get_current_settings().api.url
    if url is None:
        return flow.fn(*arguments)
    check_answers(url)
    with tags(TAG):
        return flow(*arguments)


def check_answers(url: str) -> None:
    """Refuses, before any work, a server that does not answer."""
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error:
        raise Unavailable(
            f"the Prefect server {url} does not answer ({type(error).__name__}): start it, or unset PREFECT_API_URL to "
            "run without one"
        )
