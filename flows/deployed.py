"""What a flow does otherwise where it runs as a deployment: it tells its product, and starts others by their names."""

import inspect
from typing import Any

from prefect import Flow
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment
from prefect.states import Completed
from rich.console import Console

from infra import storage
from infra.errors import UserError
from tasks.cards import home_of
from tasks.units import in_run

HOUR = 3600.0  # a flow's timeout ends one that hangs: it is some times what the largest run should take


def be_quiet(console: Console) -> None:
    """Silences a run's output that nobody reads any more, since its worker died: rich itself would end the run."""
    console.quiet = True


Console.on_broken_pipe = be_quiet  # type: ignore[assignment,method-assign]


def in_deployment() -> bool:
    """Whether this run was started from a deployment."""
    return deployment.id is not None


def made(url: str) -> Any:
    """Returns a flow's result: the URL, which the run's state tells too, to the UI and to what started the run.

    Raises:
        UserError: The product is not at the URL, read anew from the storage, so that nothing ends well that is lost.
    """
    try:
        card = storage.read_json(storage.join(home_of(url), "card.json"))
        whole = bool(card["kind"]) and (home_of(url) == url or storage.exists(storage.join(url, "zarr.json")))
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise _lost(url) from error
    if not whole:
        raise _lost(url)
    return Completed(message=url, data=url) if in_run() else url


def _lost(url: str) -> UserError:
    return UserError(
        f"the product was written to {url} and is not there: something else empties that storage, or the run has "
        "another under the same name; `rangegrid doctor` tells what a run sees"
    )


def run_deployed(step: Flow[..., str], *arguments: Any) -> str:
    """Runs a step as the deployment of its name and waits for it, so that it can be looked at and rerun alone.

    Args:
        step: A flow whose result is `made`.
        arguments: As the flow takes them.

    Returns:
        The URL of its product.

    Raises:
        UserError: It is not deployed, or did not end well.
    """
    named = inspect.signature(step.fn).bind(*arguments).arguments
    try:
        run = run_deployment(f"{step.name}/{step.name}", parameters=step.serialize_parameters(named), poll_interval=5)
    except ObjectNotFound as error:
        raise UserError(f"the step {step.name} is not deployed: `rangegrid deploy` deploys it") from error
    if run.state is None or not run.state.is_completed():
        ended = f"{run.state.name}: {run.state.message}" if run.state else "nothing is known of it"
        raise UserError(
            f"the step {step.name} did not complete ({ended}): mend the cause and run this again, and what is there "
            f"already is kept. Its run is {run.name!r}"
        )
    return str(run.state.message)
