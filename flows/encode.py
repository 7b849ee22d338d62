"""Deployment `encode`: the two-resolution database."""

from prefect import flow

from infra import clusters
from tasks.params import EncodeParams
from tasks.steps import encode_database


@flow(name="encode", flow_run_name="encode {patches}")
def encode(patches: str, checkpoint: str, params: EncodeParams = EncodeParams()) -> str:
    """Encodes patches into the database of keys (low resolution) and values (high resolution).

    Args:
        patches: URL of the patches.
        checkpoint: URL of the checkpoint whose space the keys live in.
        params: How to encode.

    Returns:
        The URL of the database.
    """
    with clusters.connect() as client:
        return encode_database(client, patches, checkpoint, params)
