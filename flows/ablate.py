"""Deployment `ablate`: what one choice in retrieval is worth."""

from prefect import flow

from flows.deployed import HOUR, made
from flows.inputs import settle
from tasks.params import AblateParams, Choice
from tasks.steps import ablate_database


@flow(name="ablate", flow_run_name="ablate {choice} of {database}", timeout_seconds=12 * HOUR)
def ablate(choice: Choice, checkpoint: str, database: str, params: AblateParams = AblateParams()) -> str:
    """Scores the variants of one choice by probes on labels.

    Args:
        choice: strategy, k, temperature, beta, size, values or variants.
        checkpoint: URL of the checkpoint, or newest:LINE, which is that of the database.
        database: URL of the database encoded with it, or newest:LINE.
        params: Which steps, labels and splits.

    Returns:
        The URL of the report.
    """
    fixed = settle(choice=choice, checkpoint=checkpoint, database=database, params=params)
    return made(ablate_database(*fixed))
