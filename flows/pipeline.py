"""Deployment `pipeline`: everything in order, from a STAC catalog to a scored global grid."""

from prefect import flow
from pydantic import Field

from flows.encode import encode
from flows.evaluate import evaluate
from flows.publish import publish
from flows.sample import sample
from flows.train import train
from infra import clusters
from tasks.encode import EncodeParams
from tasks.evaluate import EvaluateParams
from tasks.params import Params
from tasks.publish import PublishParams
from tasks.sample import SampleParams
from tasks.train import TrainParams


class PipelineParams(Params):
    """The parameters of every step."""

    sample: SampleParams = Field(default_factory=SampleParams)
    """Where, when and how many patches."""
    train: TrainParams = Field(default_factory=TrainParams)
    """Architecture and schedule of the location encoder."""
    encode: EncodeParams = Field(default_factory=EncodeParams)
    """How the database is encoded."""
    publish: PublishParams = Field(default_factory=PublishParams)
    """Which grid, which retrieval."""
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    """Which labels and splits."""


@flow(name="pipeline", flow_run_name="pipeline, {params.sample.patches} patches")
def pipeline(params: PipelineParams = PipelineParams()) -> dict[str, str]:
    """Runs sample, train, encode, publish and evaluate, each of which resumes.

    Args:
        params: The parameters of every step.

    Returns:
        The URLs of the patches, checkpoint, database, grid and report.
    """
    with clusters.connect():
        patches = sample(params.sample)
        checkpoint = train(patches, params.train)
        database = encode(patches, checkpoint, params.encode)
        grid = publish(checkpoint, database, params.publish)
        report = evaluate(checkpoint, database, params.evaluate)
    return {
        "patches": patches,
        "checkpoint": checkpoint,
        "database": database,
        "grid": grid,
        "report": report,
    }
