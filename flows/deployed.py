"""Holds what differs where a flow runs as a deployment: it reports its product and starts other deployments."""

import inspect
import logging
from functools import partial
from typing import Any

from prefect import Flow
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.runtime import deployment
from prefect.states import Completed

from infra import storage
from infra.errors import UserError
from tasks.cards import Card, home_of, read_card
from tasks.units import Screen, in_run

HOUR = 3600.0  # seconds; timeouts of flows end runs that hang, and are a few times what the largest run should take


def _outlive_worker() -> None:
    """Lets this process go on where the worker that reads its log dies: rich would end it at the next line.

    Prefect 3.8 makes the console of its log itself, so that rich's own way, a subclass, is open to ours alone.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.console.on_broken_pipe = partial(Screen.on_broken_pipe, handler.console)


_outlive_worker()


def in_deployment() -> bool:
    """Tells whether this run was started from a deployment."""
    return deployment.id is not None


def made(url: str) -> Any:
    """Returns a flow's result, the URL of its product, after the product was read back from the storage.

    In a run, the URL is also the message of the run's state: for the UI, and for the flow that started the run.

    Raises:
        UserError: The product is not at the URL.
    """
    try:
        card = read_card(home_of(url), Card)
    except UserError as error:
        raise _lost(url) from error
    whole = bool(card.kind) and (home_of(url) == url or storage.exists(storage.join(url, "zarr.json")))
    if not whole:
        raise _lost(url)
    if in_run():
        return Completed(message=url, data=url)
    return url


def _lost(url: str) -> UserError:
    return UserError(
        f"the product was written to {url} and is not there: something else empties that storage, or the run has "
        "another storage under the same name. `rangegrid doctor` tells what a run sees"
    )


def run_deployed(step: Flow[..., str], *arguments: Any) -> str:
    """Runs a step as the deployment of its name and waits for it: a run of its own can be inspected and rerun alone.

    Args:
        step: A flow that returns what `made` makes.
        arguments: As the flow takes them.

    Returns:
        The URL of its product.

    Raises:
        UserError: The step is not deployed, or did not complete.
    """
    named = inspect.signature(step.fn).bind(*arguments).arguments
    try:
        run = run_deployment(f"{step.name}/{step.name}", parameters=step.serialize_parameters(named), poll_interval=5)
    except ObjectNotFound as error:
        raise UserError(f"the step {step.name} is not deployed: `rangegrid deploy` deploys it") from error
    if run.state is None or not run.state.is_completed():
        if run.state:
            ended = f"{run.state.name}: {run.state.message}"
        else:
            ended = "nothing is known of it"
        raise UserError(
            f"the step {step.name} did not complete ({ended}): mend the cause and run this again, and what is there "
            f"already is kept. Its run is {run.name!r}"
        )
    return str(run.state.message)
