"""Defines the flow `publish`, which makes the grid of one database."""

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
    """Writes the RANGE+ embedding of every land cell of a grid to storage, as Zarr.

    Args:
        checkpoint: URL of the checkpoint, or newest:LINE for the one that the database was encoded with.
        database: URL of the database encoded with the checkpoint, or newest:LINE.
        params: Which grid, and which retrieval.

    Returns:
        The URL of the grid's Zarr.
    """
    return made(publish_grid(*settle(checkpoint=checkpoint, database=database, params=params)))
