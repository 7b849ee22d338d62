"""Deployment `evaluate`: the paper's comparison for one database."""

from prefect import flow

from flows.deployed import HOUR, made
from tasks.params import EvaluateParams
from tasks.steps import evaluate_database


@flow(name="evaluate", flow_run_name="evaluate {database}", timeout_seconds=12 * HOUR)
def evaluate(checkpoint: str, database: str, params: EvaluateParams = EvaluateParams()) -> str:
    """Scores the embeddings by probes on labels, on random and on spatially blocked splits.

    Args:
        checkpoint: URL of the checkpoint.
        database: URL of the database encoded with it.
        params: Which labels and splits.

    Returns:
        The URL of the report.
    """
    return made(evaluate_database(checkpoint, database, params))
