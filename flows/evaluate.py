"""Deployment `evaluate`: the paper's comparison for a database, for a grid, or for any encoder."""

from prefect import flow

from flows.deployed import HOUR, made
from flows.inputs import settle
from tasks.params import EvaluateParams
from tasks.steps import evaluate_database


@flow(name="evaluate", flow_run_name="evaluate {database}", timeout_seconds=12 * HOUR)
def evaluate(
    checkpoint: str | None = None,
    database: str | None = None,
    params: EvaluateParams = EvaluateParams(),
    grid: str | None = None,
) -> str:
    """Scores embeddings by probes on labels, on random and on spatially blocked splits.

    Args:
        checkpoint: URL of the checkpoint, or newest:LINE, that of the database; none, to evaluate other encoders or
            grids alone.
        database: URL of the database encoded with it, or newest:LINE.
        params: Which labels, embedders and splits.
        grid: URL of the grid published from them, or newest:LINE: it is scored too, and gets its score card.

    Returns:
        The URL of the report.
    """
    fixed = settle(checkpoint=checkpoint, database=database, params=params, grid=grid)
    return made(evaluate_database(*fixed))
