"""Defines the flow `prune`, which deletes old versions of the grid."""

from prefect import flow

from flows.deployed import HOUR
from tasks.params import PruneParams
from tasks.steps import prune_grids


@flow(name="prune", flow_run_name="prune to {params.keep}", timeout_seconds=12 * HOUR)
def prune(params: PruneParams = PruneParams()) -> list[str]:
    """Deletes old versions of the grid. The latest and the previous version of each line, and what they need, stay.

    Args:
        params: What to keep.

    Returns:
        The URLs of the versions that were deleted, or would be with `dry_run`.
    """
    return [version.grid for version in prune_grids(params.keep, **params.model_dump(exclude={"keep"}))]
