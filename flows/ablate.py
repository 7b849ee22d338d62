"""Defines the flow `ablate`, which measures what one choice of the retrieval is worth."""

from prefect import flow

from flows.deployed import HOUR, made
from flows.inputs import settle
from tasks.params import AblateParams, Choice
from tasks.steps import ablate_database


@flow(name="ablate", flow_run_name="ablate {choice} of {database}", timeout_seconds=12 * HOUR)
def ablate(choice: Choice, checkpoint: str, database: str, params: AblateParams = AblateParams()) -> str:
    """Scores the variants of one choice of the retrieval by probes (small supervised models) on labels.

    Args:
        choice: strategy, k, temperature, beta, size, values or variants.
        checkpoint: URL of the checkpoint, or newest:LINE for the one that the database was encoded with.
        database: URL of the database encoded with the checkpoint, or newest:LINE.
        params: Which variants, labels and splits.

    Returns:
        The URL of the report.
    """
    fixed = settle(choice=choice, checkpoint=checkpoint, database=database, params=params)
    return made(ablate_database(*fixed))
