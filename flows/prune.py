"""Deployment `prune`: deletes old versions of the grid."""

from prefect import flow

from flows.deployed import HOUR
from tasks.params import PruneParams
from tasks.steps import prune_grids


@flow(name="prune", flow_run_name="prune to {params.keep}", timeout_seconds=12 * HOUR)
def prune(params: PruneParams = PruneParams()) -> list[str]:
    """Deletes old versions of the grid; never the latest or the previous one of a line, or what these need.

    Args:
        params: What to keep.

    Returns:
        The URLs of what was (or would be) deleted.
    """
    return [version.grid for version in prune_grids(params.keep, **params.model_dump(exclude={"keep"}))]
