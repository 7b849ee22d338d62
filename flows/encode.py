"""Defines the flow `encode`, which makes the two-resolution database."""

from prefect import flow

from flows.deployed import HOUR, made
from flows.inputs import settle
from tasks.params import EncodeParams
from tasks.steps import encode_database


@flow(name="encode", flow_run_name="encode {patches}", timeout_seconds=24 * HOUR)
def encode(patches: str, checkpoint: str, params: EncodeParams = EncodeParams()) -> str:
    """Encodes patches into the database of keys (low resolution) and values (high resolution).

    Args:
        patches: URL of the patches, or newest:LINE.
        checkpoint: URL of the checkpoint that encodes the keys, or newest:LINE.
        params: How to encode.

    Returns:
        The URL of the database.
    """
    return made(encode_database(*settle(patches=patches, checkpoint=checkpoint, params=params)))
