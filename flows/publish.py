"""Deployment `publish`: the grid of one database."""

from prefect import flow

from flows.deployed import HOUR, made
from flows.inputs import settle
from tasks.params import PublishParams
from tasks.steps import publish_grid


@flow(
    name="publish",
    flow_run_name="publish {params.method} in steps of {params.step:g} of {database}",
    timeout_seconds=72 * HOUR,
)
def publish(checkpoint: str, database: str, params: PublishParams = PublishParams()) -> str:
    """Writes RANGE+ at every land cell of a grid to storage, as Zarr.

    Args:
        checkpoint: URL of the checkpoint, or newest:LINE, which is that of the database.
        database: URL of the database encoded with it, or newest:LINE.
        params: Which grid, which retrieval.

    Returns:
        The URL of the grid's Zarr.
    """
    return made(publish_grid(*settle(checkpoint=checkpoint, database=database, params=params)))
