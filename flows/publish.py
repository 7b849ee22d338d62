"""Deployment `publish`: the grid of one database."""

from prefect import flow

from flows.deployed import HOUR, made
from tasks.params import PublishParams
from tasks.steps import publish_grid


@flow(name="publish", flow_run_name="publish {params.method} in steps of {params.step:g}", timeout_seconds=72 * HOUR)
def publish(checkpoint: str, database: str, params: PublishParams = PublishParams()) -> str:
    """Writes RANGE+ at every land cell of a grid to storage, as Zarr.

    Args:
        checkpoint: URL of the checkpoint.
        database: URL of the database encoded with it.
        params: Which grid, which retrieval.

    Returns:
        The URL of the grid's Zarr.
    """
    return made(publish_grid(checkpoint, database, params))
