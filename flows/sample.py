"""Deployment `sample`: Sentinel-2 patches from a STAC catalog."""

from prefect import flow

from infra import clusters
from tasks.params import SampleParams
from tasks.steps import sample_patches


@flow(name="sample", flow_run_name="sample {params.patches} patches")
def sample(params: SampleParams = SampleParams()) -> str:
    """Samples image patches uniformly on land and stores them with their manifest.

    Args:
        params: Where, when and how many.

    Returns:
        The URL of the patches.
    """
    with clusters.connect() as client:
        return sample_patches(client, params)
