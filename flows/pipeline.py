"""Deployment `pipeline`: everything in order, from a STAC catalog to a scored global grid."""

from prefect import flow

from flows.encode import encode
from flows.evaluate import evaluate
from flows.publish import publish
from flows.sample import sample
from flows.train import train
from infra import clusters
from tasks.params import PipelineParams
from tasks.stac import write_item
from tasks.steps import promote_evaluated
from tasks.updates import home_of


@flow(name="pipeline", flow_run_name="pipeline, {params.sample.patches} patches")
def pipeline(params: PipelineParams = PipelineParams()) -> dict[str, str]:
    """Runs sample, train, encode, publish and evaluate, each of which resumes; then the gate, and the promotion.

    Args:
        params: The parameters of every step.

    Returns:
        The URLs of the patches, checkpoint, database, grid and report.
    """
    with clusters.connect():
        patches = sample(params.sample)
        checkpoint = train(patches, params.train)
        database = encode(patches, checkpoint, params.encode)
        grid = publish(checkpoint, database, params.publish.model_copy(update={"promote": False}))
        report = evaluate(checkpoint, database, params.evaluate, grid)
        write_item(home_of(grid))  # again: its score card is there now
        if params.publish.promote:
            promote_evaluated(grid, params.gate_margin)
    return {
        "patches": patches,
        "checkpoint": checkpoint,
        "database": database,
        "grid": grid,
        "report": report,
    }
