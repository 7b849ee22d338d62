"""Deployment `pipeline`: everything in order, from a STAC catalog to a scored global grid."""

from typing import Any

from prefect import flow

from flows.deployed import HOUR, in_deployment, run_deployed
from flows.encode import encode
from flows.evaluate import evaluate
from flows.inputs import settle
from flows.publish import publish
from flows.sample import sample
from flows.started import start
from flows.train import train
from infra import clusters
from tasks.params import PipelineParams
from tasks.steps import promote_evaluated


@flow(name="pipeline", flow_run_name="pipeline, {params.sample.patches} patches", timeout_seconds=168 * HOUR)
def pipeline(params: PipelineParams = PipelineParams()) -> dict[str, str]:
    """Runs sample, train, encode, publish and evaluate, each of which resumes; then the gate, and the promotion.

    As a deployment, it runs each step as a deployment too; else all here, on one cluster.

    Args:
        params: The parameters of every step.

    Returns:
        The URLs of the patches, checkpoint, database, grid and report.
    """
    params = settle(params=params)
    if in_deployment():
        return run_steps(params, run_deployed)
    with clusters.connect():
        return run_steps(params, start)


def run_steps(params: PipelineParams, run: Any) -> dict[str, str]:
    """The steps in order; `run(flow, *arguments)` runs one and returns the URL of its product."""
    patches = run(sample, params.sample)
    checkpoint = run(train, patches, params.train)
    database = run(encode, patches, checkpoint, params.encode)
    grid = run(publish, checkpoint, database, params.publish.model_copy(update={"promote": False}))
    report = run(evaluate, checkpoint, database, params.evaluate, grid)
    if params.publish.promote:
        promote_evaluated(grid, params.gate_margin, params.publish.drift_alert)
    return {
        "patches": patches,
        "checkpoint": checkpoint,
        "database": database,
        "grid": grid,
        "report": report,
    }
