"""Defines the flow `pipeline`: all steps in order, from a STAC catalog to a scored global grid."""

import time
from datetime import timedelta
from typing import Any

from prefect import Flow, flow
from prefect.states import Completed

from flows.deployed import HOUR, in_deployment, run_deployed
from flows.encode import encode
from flows.evaluate import evaluate
from flows.inputs import settle
from flows.join import join
from flows.publish import publish
from flows.sample import sample
from flows.started import start
from flows.train import train
from infra import clusters, storage
from infra.addresses import as_url
from infra.errors import UserError
from tasks.artifacts import show_table
from tasks.cards import home_of
from tasks.database.store import read_pair
from tasks.params import EvaluateParams, PipelineParams
from tasks.steps import promote_evaluated
from tasks.units import in_run, in_words

BASE_GRID = "base grid"
BESIDE = ("coordinates", "location encoder", "RANGE+", "multi-head")  # embedders beside a grid of the base


@flow(name="pipeline", flow_run_name="pipeline, {params.sample.patches} patches", timeout_seconds=168 * HOUR)
def pipeline(params: PipelineParams = PipelineParams()) -> Any:
    """Runs sample, train, encode, publish and evaluate, and promotes the grid if its scores allow it.

    With a base, the patches are encoded with its checkpoint and joined to its database. The same cells are published of
    the base alone too, and the report compares the two.

    Each step resumes where an earlier run ended. As a deployment, the pipeline runs each step as a deployment too.
    Otherwise all steps run here, on one cluster.

    Args:
        params: The parameters of every step.

    Returns:
        The URLs of the patches, checkpoint, database, grid and report; with a base also of the patches' own database
        and of the base's grid.
    """
    params = settle(params=params).in_region()
    rows: list[dict[str, Any]] = []
    try:
        if in_deployment():
            urls = run_steps(params, run_deployed, rows)
        else:
            with clusters.connect():
                urls = run_steps(params, start, rows)
    finally:
        show_table(rows, "pipeline", "What was made, at what cost, and what the gate said")
    message = f"{urls['grid']}: {rows[-1]['what it is']}"
    if in_run():
        return Completed(message=message, data=urls)
    return urls


def run_steps(params: PipelineParams, run: Any, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Runs the steps in order.

    Args:
        params: The parameters of every step.
        run: `run(flow, *arguments)` runs a step and returns the URL of its product.
        rows: Gets a row for each product as it is made, and one for the promotion gate.

    Returns:
        The URLs by name of product.
    """
    urls: dict[str, str] = {}

    def make(product: str, step: Flow[..., str], *arguments: Any) -> str:
        began = time.monotonic()
        urls[product] = url = run(step, *arguments)
        took = timedelta(seconds=round(time.monotonic() - began))
        rows.append(_row(product, url, str(took), in_words(storage.size(home_of(url)))))
        return url

    base = [as_url(url) for url in params.base]
    if base:
        read_pair(*base)
    patches = make("patches", sample, params.sample)
    published, evaluated = params.publish.model_copy(update={"promote": False}), params.evaluate
    if base:
        checkpoint, world = base
        own = make("own-database", encode, patches, checkpoint, params.encode)
        database = make("database", join, [world, own])
        before = make("base-grid", publish, checkpoint, world, published)
        evaluated = beside(evaluated, before)
    else:
        checkpoint = make("checkpoint", train, patches, params.train)
        database = make("database", encode, patches, checkpoint, params.encode)
    grid = make("grid", publish, checkpoint, database, published)
    make("report", evaluate, checkpoint, database, evaluated, grid)
    try:
        rows.append(_row("gate", _pass_gate(grid, params)))
    except UserError as error:
        rows.append(_row("gate", str(error)))
        raise
    return urls


def beside(params: EvaluateParams, grid: str) -> EvaluateParams:
    """Returns parameters of an evaluation with one more grid in it, to which all are compared if to nothing else."""
    asked = (*(params.embedder or BESIDE), f"{BASE_GRID}={grid}")
    return params.model_copy(update={"embedder": asked, "reference": params.reference or BASE_GRID})


def _row(what: str, it_is: str, took: str = "", stored: str = "") -> dict[str, Any]:
    return {"what": what, "what it is": it_is, "took": took, "stored": stored}


def _pass_gate(grid: str, params: PipelineParams) -> str:
    """Promotes the grid if its scores allow it, and returns in words what was done."""
    if not params.publish.promote:
        return "not promoted, since `promote` is false"
    promoted = promote_evaluated(grid, params.gate_margin, params.publish.drift_alert)
    if promoted:
        return "promoted: readers have it"
    return "not promoted again, since it was rolled back"
