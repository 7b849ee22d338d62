"""Defines the flow `evaluate`, the paper's comparison for a database, a grid, or any location encoder."""

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
    """Scores embeddings by probes (small supervised models) on labels, with random and spatially blocked splits.

    Args:
        checkpoint: URL of the checkpoint, or newest:LINE for the one that the database was encoded with. None: only
            other encoders or grids are evaluated.
        database: URL of the database encoded with the checkpoint, or newest:LINE.
        params: Which labels, embedding methods and splits.
        grid: URL of the grid published from them, or newest:LINE. It is scored too, and gets a score card.

    Returns:
        The URL of the report.
    """
    fixed = settle(checkpoint=checkpoint, database=database, params=params, grid=grid)
    return made(evaluate_database(*fixed))
