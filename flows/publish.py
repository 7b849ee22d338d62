"""Deployment `publish`: the global grid of one database."""

from prefect import flow

from infra import clusters
from tasks.params import PublishParams
from tasks.steps import publish_grid


@flow(name="publish", flow_run_name="publish {params.step_degrees} degree")
def publish(checkpoint: str, database: str, params: PublishParams = PublishParams()) -> str:
    """Writes RANGE+ at every land cell of a global grid to storage, as Zarr.

    Args:
        checkpoint: URL of the checkpoint.
        database: URL of the database encoded with it.
        params: Which grid, which retrieval.

    Returns:
        The URL of the grid's Zarr.
    """
    with clusters.connect() as client:
        return publish_grid(client, checkpoint, database, params)
